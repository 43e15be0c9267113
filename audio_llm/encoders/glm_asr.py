"""The tower of GLM-ASR-Nano (zai-org/GLM-ASR, 2025): Whisper's shape with rotary positions, on windows of 30 s.

Nothing is masked: a clip hears the silence that fills its window, which has no tokens. Behind the tower four tokens at
a time go through two linears into Llama; :mod:`audio_llm.model.native` reads the whole model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GlmAsrEncoderConfig
from transformers.models.glmasr.modeling_glmasr import GlmAsrEncoderLayer

from audio_llm.encoders import features
from audio_llm.encoders.qwen2_audio import (
    HOP,
    KEYS,
    MISNAMED,
    SAMPLE_RATE,
    TWO_LINEARS,
    Qwen2AudioTower,
    Qwen2AudioTowerConfig,
    text_config,
    two_linears,
)
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.layouts import NativeLayout

GROUP = 4  # tokens, of which the published code makes one embedding


@dataclasses.dataclass
class GlmAsrTowerConfig(Qwen2AudioTowerConfig):
    """Sizes. The defaults are those of GLM-ASR-Nano-2512. Nothing is dropped but attention."""

    rotary_theta: float = 10000.0
    rotary_share: float = 0.5  # of a head

    @property
    def rotary_size(self) -> int:
        return int(self.hidden_size // self.heads * self.rotary_share)

    def check(self) -> None:
        super().check()
        if self.rotary_size < 2 or self.rotary_size % 2 or self.rotary_share > 1:
            expected = f"a share that is an even part of a head ({self.hidden_size // self.heads})"
            raise ConfigError(describe("rotary_share", expected, f"{self.rotary_share:g}"))


class GlmAsrTower(Qwen2AudioTower):
    """Tokens after the last norm, 20 ms each, of which the clip has whole groups of four."""

    name = "glm_asr"
    config_class = GlmAsrTowerConfig
    transformers_type = "glmasr"
    native_types: ClassVar[tuple[str, ...]] = ("glmasr",)
    signs = r"^audio_tower\.layers\.\d+\.post_attention_layernorm\."
    licence = "see the model's page (GLM-ASR-Nano-2512: MIT)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "nano": {},
        "tiny": {"window_seconds": 2.56, "hidden_size": 64, "depth": 2, "heads": 4, "mlp_size": 128},
    }

    config: GlmAsrTowerConfig

    def positions(self) -> nn.Module:
        return nn.Identity()  # every layer turns its queries and keys

    def layer(self, number: int) -> nn.Module:
        config = self.config
        fields: dict[str, Any] = {
            "num_mel_bins": config.n_mels,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp_size,
            "hidden_act": config.activation,
            "attention_dropout": config.attention_dropout,
        }
        return GlmAsrEncoderLayer(GlmAsrEncoderConfig(**fields, attn_implementation="sdpa"), number)

    @property
    def num_tokens(self) -> int:
        return self.config.frames // 2

    def count_tokens(self, samples: int) -> int:
        return min(grouped(-(-samples // HOP)), self.num_tokens)

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        maps = features.whisper_log_mel(waveform[:, 0], self.config.n_mels, exact=True)[:, None]
        if self.training and self.augment is not None:
            maps = self.augment(maps)
        hidden = self.convolve(maps[:, 0].to(self.conv1.weight.dtype))  # (batch, frames / 2, hidden)
        tokens = self.layer_norm(self.through(hidden, position_embeddings=self.turns(hidden)))
        heard = torch.tensor([self.count_tokens(length) for length in lengths.tolist()], device=tokens.device)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < heard[:, None]

    def turns(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, n, rotary size) of the angles by which a layer turns `hidden` (batch, n, hidden)."""
        width = self.config.rotary_size
        rates = 1.0 / self.config.rotary_theta ** (torch.arange(0, width, 2, device=hidden.device).float() / width)
        angles = torch.arange(hidden.shape[1], device=hidden.device).float()[:, None] * rates
        angles = torch.cat([angles, angles], dim=-1)[None]
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)

    @classmethod
    def native_layout(cls, config: Any) -> NativeLayout:
        """The whole model: see :class:`~audio_llm.model.layouts.NativeEncoder`."""
        audio, rope = config.audio_config, config.audio_config.rope_parameters
        for name, expected, found in (
            ("intermediate_size", GROUP * audio.hidden_size, audio.intermediate_size),
            ("num_key_value_heads", audio.num_attention_heads, audio.num_key_value_heads),
            ("rope_parameters", "rope_type default", f"rope_type {rope['rope_type']}"),
        ):
            if expected != found:
                raise CheckpointError(describe(f"config.json: audio_config.{name}", str(expected), str(found)))
        return NativeLayout(
            encoder={
                "window_seconds": audio.max_position_embeddings * 2 * HOP / SAMPLE_RATE,
                "n_mels": audio.num_mel_bins,
                "hidden_size": audio.hidden_size,
                "depth": audio.num_hidden_layers,
                "heads": audio.num_attention_heads,
                "mlp_size": audio.intermediate_size,
                "activation": audio.hidden_act,
                "attention_dropout": audio.attention_dropout,
                "rotary_theta": rope["rope_theta"],
                "rotary_share": rope.get("partial_rotary_factor", 1.0),
            },
            projector={**two_linears(config, True, GROUP), "hidden_size": 2 * config.text_config.hidden_size},
            text=text_config(config.text_config, "llama"),
            keys=(*KEYS, *TWO_LINEARS, ("model.audio_encoder.layer_norm.", "audio_tower.norm.")),
            misnamed=MISNAMED,
            audio_token_id=config.audio_token_id,
            max_windows=21,  # where the folder's processor does not say
            least_rest=961,  # samples: of six frames there is no group, and so no embedding
        )


def grouped(frames: int) -> int:
    """Tokens of so many frames in whole groups: every other frame by the second convolution. A clip too short for a
    group has one, where the published code has none and answers without having heard it."""
    return max(((frames - 1) // 2 + 1) // GROUP, 1) * GROUP
