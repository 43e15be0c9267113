"""Configuration of the model as Transformers knows it (``model_type: audio_llm``)."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from audio_llm.errors import CheckpointError
from audio_llm.model.encoder import AudioEncoder, build_encoder
from audio_llm.model.projector import projector_class


class AudioLLMConfig(PreTrainedConfig):
    """Encoder, projector and language model of an audio-language model.

    `encoder` is what ``model.encoder.build_encoder`` takes (its ``name`` and the fields of its configuration),
    `projector` what ``model.projector.build_projector`` takes, `text_config` any causal language model's configuration.
    An audio longer than one window of the encoder becomes several, at most `max_windows`. `audio_token_id` stands in a
    prompt for each embedding of an audio, `audio_marks` are the ids of what the chat template writes around it.
    `orders` are those that it was taught, of :data:`audio_llm.language.prompts.ORDERS`.
    """

    model_type = "audio_llm"
    sub_configs = {"text_config": AutoConfig}

    text_config: Any = None  # a dict in a file, a configuration once built
    encoder: dict | None = None
    projector: dict | None = None
    audio_token_id: int = 0
    audio_marks: list[int] | None = None
    max_windows: int = 4
    orders: list[str] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            name = fields.pop("model_type", None)
            if name not in CONFIG_MAPPING:
                raise CheckpointError(f"config.json: text_config has the unknown model_type {name!r}.")
            self.text_config = CONFIG_MAPPING[name](**fields)
        elif self.text_config is None:
            self.text_config = CONFIG_MAPPING["qwen2"]()
        self.encoder = dict(self.encoder or {"name": "spatial_ast"})
        self.projector = dict(self.projector or {})
        # Transformers ties from the top-level flag, vLLM's inner model from text_config: they must not differ.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @property
    def forbidden_token_ids(self) -> list[int]:
        """What marks audio and is no word: the model may never say it, or its reply would be read back as sound."""
        return [self.audio_token_id, *(self.audio_marks or [])]

    def window_tokens(self, samples: int) -> int:
        """Embeddings of a window with `samples` samples of sound, and so its placeholders in a prompt."""
        _, projector = projector_class(self.projector or {})
        return int(projector.count(samples, lambda n: self.on_paper.count_tokens(n)))

    @property
    def on_paper(self) -> AudioEncoder:
        """Its encoder, without weights."""
        return _on_paper(json.dumps(self.encoder, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _on_paper(encoder: str) -> AudioEncoder:
    """The encoder of a configuration (JSON), without weights."""
    with torch.device("meta"):
        return build_encoder(json.loads(encoder))
