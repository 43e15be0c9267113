"""Whisper's encoder (Radford et al. 2023, "Robust Speech Recognition via Large-Scale Weak Supervision").

The transformer is Transformers' own, with its keys under ``encoder.``; the log-mel is ours, on the module's device.
Published weights are a folder as Transformers saves it, or the original ``{"dims", "model_state_dict"}``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import WhisperConfig as TransformersConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from audio_llm import config as recipes
from audio_llm.encoders import features
from audio_llm.encoders.published import (
    configured,
    length,
    read_published,
    read_transformers,
    rename,
    state_dict_of,
)
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.encoder import AudioEncoder, Published
from audio_llm.model.folder import load_strictly

SAMPLE_RATE = 16000
_TOKEN = 320  # samples: the second convolution takes every other frame


# Our field -> its name in Transformers' config.json and in the original file's `dims` (empty: not there).
FIELDS: dict[str, tuple[str, str]] = {
    "n_mels": ("num_mel_bins", "n_mels"),
    "hidden_size": ("d_model", "n_audio_state"),
    "depth": ("encoder_layers", "n_audio_layer"),
    "heads": ("encoder_attention_heads", "n_audio_head"),
    "mlp_size": ("encoder_ffn_dim", ""),
    "activation": ("activation_function", ""),
    "dropout": ("dropout", ""),
    "attention_dropout": ("attention_dropout", ""),
    "activation_dropout": ("activation_dropout", ""),
}


@dataclasses.dataclass
class WhisperConfig:
    """Size. The defaults are the published ``whisper-base`` on its 30 s window."""

    token: ClassVar[int] = _TOKEN  # samples

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
    def samples(self) -> int:
        """Of a window."""
        return round(self.window_seconds * SAMPLE_RATE)

    @property
    def positions(self) -> int:
        """Tokens of a window, 50 a second."""
        return self.samples // self.token

    def check(self) -> None:
        """:class:`ConfigError` for a configuration that cannot be built."""
        for name in ("n_mels", "hidden_size", "depth", "heads", "mlp_size"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "1 or more", str(getattr(self, name))))
        if self.samples < self.token or self.samples % self.token:
            expected = f"a multiple of {self.token / SAMPLE_RATE:g} s, a token's length"
            raise ConfigError(describe("window_seconds", expected, f"{self.window_seconds:g}"))
        if self.hidden_size % self.heads or self.hidden_size % 2:
            expected = f"an even multiple of heads ({self.heads})"
            raise ConfigError(describe("hidden_size", expected, str(self.hidden_size)))


class Whisper(AudioEncoder):
    """Tokens after the last norm, 20 ms each. Silence fills the window, as in training; the mask leaves it out."""

    name = "whisper"
    config_class = WhisperConfig
    signs = r"^(model\.)?encoder\.(conv\d\.weight|embed_positions\.weight|positional_embedding)$"
    transformers_type = "whisper"
    licence = "MIT (github.com/openai/whisper); the copies for Transformers: Apache-2.0"
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
        sizes = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()}
        self.encoder = WhisperEncoder(
            TransformersConfig(max_source_positions=config.positions, attn_implementation="sdpa", **sizes)
        )

    @property
    def layer_prefixes(self) -> list[str]:
        return [f"encoder.layers.{number}." for number in range(self.config.depth)]

    @property
    def num_tokens(self) -> int:
        return self.config.positions

    def count_tokens(self, samples: int) -> int:
        return -(-samples // _TOKEN)

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

    @classmethod
    def load_published(cls, path: str | os.PathLike[str], /, **fields: Any) -> Published:
        """See the base class. A window shorter than the file's keeps its first positions."""
        if Path(path).is_dir():
            config, weights = read_transformers(path, ("model.encoder.", "encoder."))
            if config.get("model_type") != cls.transformers_type:
                found = str(config.get("model_type"))
                raise CheckpointError(describe(f"model {path}", f"model_type {cls.transformers_type}", found))
            state, column = rename(weights, TRANSFORMERS_RENAMES, name=path), 0
        else:
            tree = read_published(path)
            state = rename(state_dict_of(tree, kind=cls.name, name=path), ORIGINAL_RENAMES, name=path)
            config, column = tree.get("dims", {}), 1
            if not isinstance(config, Mapping) or "n_audio_ctx" not in config:
                expected = "a Transformers folder, or the original file with 'dims'"
                raise CheckpointError(describe(f"checkpoint {path}", expected, "no 'dims'"))
        encoder = cls(_config(config, column, state, path, fields))
        wanted = encoder.config.positions
        if _POSITION_TABLE in state and "window_seconds" in fields and state[_POSITION_TABLE].shape[0] > wanted:
            state[_POSITION_TABLE] = state[_POSITION_TABLE][:wanted]
        load_strictly(encoder, state, str(path))
        return Published(encoder.eval())


# ------------------------------------------------------------------------------------------------------ published files

POSITIONS = ("max_source_positions", "n_audio_ctx")
TRANSFORMERS_RENAMES: tuple[tuple[str, str | None], ...] = ((r"^(?:model\.)?encoder\.", "encoder."),)
ORIGINAL_RENAMES: tuple[tuple[str, str | None], ...] = (
    (r"^decoder\.", None),
    (r"^encoder\.blocks\.", "encoder.layers."),
    (r"\.attn\.(query|key|value)\.", r".self_attn.\1."),
    (r"\.self_attn\.query\.", ".self_attn.q_proj."),
    (r"\.self_attn\.key\.", ".self_attn.k_proj."),
    (r"\.self_attn\.value\.", ".self_attn.v_proj."),
    (r"\.attn\.out\.", ".self_attn.out_proj."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"^encoder\.ln_post\.", "encoder.layer_norm."),
    (r"^encoder\.positional_embedding$", "encoder.embed_positions.weight"),
)
_POSITION_TABLE = "encoder.embed_positions.weight"


def _config(
    config: Mapping[str, Any],
    column: int,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    fields: dict[str, Any],
) -> WhisperConfig:
    plain = {ours: config[names[column]] for ours, names in FIELDS.items() if names[column] in config}
    if "mlp_size" not in plain and "encoder.layers.0.fc1.weight" in state:
        plain["mlp_size"] = length(state["encoder.layers.0.fc1.weight"])
    positions = config.get(POSITIONS[column])
    if not isinstance(positions, int):
        raise CheckpointError(describe(f"checkpoint {path}: {POSITIONS[column]}", "a whole number", repr(positions)))
    plain["window_seconds"] = positions * _TOKEN / SAMPLE_RATE
    with configured(path):
        built = recipes.build(WhisperConfig, {**plain, **fields}, where="Whisper configuration")
        built.check()
    return built
