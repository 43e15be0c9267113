"""Whisper's encoder (Radford et al. 2023, "Robust Speech Recognition via Large-Scale Weak Supervision").

The transformer is Transformers' own, with its keys under ``encoder.``; the log-mel is ours, on the module's device.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import WhisperConfig as TransformersConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from audio_llm import features
from audio_llm.encoders.base import AudioEncoder
from audio_llm.errors import ConfigError, describe

SAMPLE_RATE = 16000
_HOP = 160  # samples, of the log-mel
_TOKEN = 320  # samples: the second convolution takes every other frame


@dataclasses.dataclass
class WhisperConfig:
    """Size. The defaults are the published ``whisper-base`` on its 30 s window."""

    window_seconds: float = 30.0
    n_mels: int = 80  # 128 from large-v3 on
    hidden_size: int = 512
    depth: int = 6
    heads: int = 8
    mlp_size: int = 2048
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    @property
    def positions(self) -> int:
        """Tokens of a window, 50 a second."""
        return round(self.window_seconds * SAMPLE_RATE) // _TOKEN

    def check(self) -> None:
        """:class:`ConfigError` for a configuration that cannot be built."""
        for name in ("n_mels", "hidden_size", "depth", "heads", "mlp_size"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "1 or more", str(getattr(self, name))))
        if self.positions < 1 or round(self.window_seconds * SAMPLE_RATE) % _TOKEN:
            expected = f"a multiple of {_TOKEN / SAMPLE_RATE:g} s"
            raise ConfigError(describe("window_seconds", expected, f"{self.window_seconds:g}"))
        if self.hidden_size % self.heads or self.hidden_size % 2:
            expected = f"an even multiple of heads ({self.heads})"
            raise ConfigError(describe("hidden_size", expected, str(self.hidden_size)))


class Whisper(AudioEncoder):
    """Tokens after the last norm, 20 ms each. Silence fills the window, as in training; the mask leaves it out."""

    name = "whisper"
    config_class = WhisperConfig
    published = "audio_llm.checkpoints.whisper:load_published"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {},
        "large-v3": {"n_mels": 128, "hidden_size": 1280, "depth": 32, "heads": 20, "mlp_size": 5120},
        "tiny": {"window_seconds": 2.56, "hidden_size": 64, "depth": 2, "heads": 4, "mlp_size": 128},
    }

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.sample_rate, self.window_seconds = SAMPLE_RATE, config.window_seconds
        self.layouts, self.num_channels = ("mono",), 1
        self.hidden_size = config.hidden_size
        self.encoder = WhisperEncoder(
            TransformersConfig(
                num_mel_bins=config.n_mels,
                d_model=config.hidden_size,
                encoder_layers=config.depth,
                encoder_attention_heads=config.heads,
                encoder_ffn_dim=config.mlp_size,
                max_source_positions=config.positions,
                activation_function=config.activation,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                attn_implementation="sdpa",
            )
        )

    @property
    def layer_prefixes(self) -> list[str]:
        return [f"encoder.layers.{number}." for number in range(self.config.depth)]

    @property
    def num_tokens(self) -> int:
        return self.config.positions

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        maps = features.whisper_log_mel(waveform[:, 0], self.config.n_mels)[:, None]
        maps = maps.to(self.encoder.conv1.weight.dtype)
        if self.training and self.augment is not None:
            maps = self.augment(maps)
        if self.gradient_checkpointing and not self.encoder.is_gradient_checkpointing:
            self.encoder.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = self.encoder(maps[:, 0].transpose(1, 2)).last_hidden_state
        heard = (lengths.to(tokens.device)[:, None] + _TOKEN - 1) // _TOKEN
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < heard
