"""audio-llm: an audio encoder, a Q-Former and a LoRA-adapted language model, from shards to a served endpoint.

Importing the package is cheap: torch, Transformers and vLLM are imported by the modules that need them.
"""

__version__ = "0.1.0"
