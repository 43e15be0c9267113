"""audio-llm: an audio encoder, a Q-Former and a LoRA-adapted language model, from shards to a served endpoint.

Importing the package is cheap: torch, Transformers and vLLM are imported by the modules that need them.
"""

__version__ = "0.2.0"


def register() -> None:
    """Register configuration, model and processor with Transformers' Auto classes (idempotent; imports no vLLM)."""
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from audio_llm.model.configuration import AudioLLMConfig
    from audio_llm.model.modeling import AudioLLMForConditionalGeneration, AudioLLMModel
    from audio_llm.model.processing import AudioLLMFeatureExtractor, AudioLLMProcessor

    AutoConfig.register(AudioLLMConfig.model_type, AudioLLMConfig, exist_ok=True)
    AutoModel.register(AudioLLMConfig, AudioLLMModel, exist_ok=True)
    AutoModelForCausalLM.register(AudioLLMConfig, AudioLLMForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(AudioLLMConfig, AudioLLMForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(AudioLLMConfig, AudioLLMFeatureExtractor, exist_ok=True)
    AutoProcessor.register(AudioLLMConfig, AudioLLMProcessor, exist_ok=True)
