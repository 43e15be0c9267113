"""The tower of Music Flamingo (Ghosh et al. 2025, "Music Flamingo: Scaling Music Understanding in Audio Language
Models"): that of Audio Flamingo 3 on windows of 30 s, whose tokens are then turned by when they are heard.

A turn depends on the window's number in its clip. So the windows are chunks inside of one window here, and the clip is
read as one; behind the tower stands the projector as with Audio Flamingo 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audio_llm.encoders.audio_flamingo_3 import AudioFlamingo3Tower
from audio_llm.encoders.qwen2_audio import HOP, SAMPLE_RATE, pooled
from audio_llm.encoders.voxtral import VoxtralTowerConfig, joined
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.layouts import NativeLayout


@dataclasses.dataclass
class MusicFlamingoTowerConfig(VoxtralTowerConfig):
    """Sizes. The defaults are those of music-flamingo-2601-hf, on clips of up to five minutes."""

    rotary_theta: float = 1200.0
    rotary_share: float = 0.2  # of a token, that is turned by its chunk; as much again by its place in it
    frame_seconds: float = 0.01

    @property
    def rotary_size(self) -> int:
        return int(self.hidden_size * self.rotary_share)

    def check(self) -> None:
        super().check()
        if self.rotary_size < 2 or self.rotary_size % 2 or 2 * self.rotary_size > self.hidden_size:
            expected = f"a share that makes two even parts of hidden_size ({self.hidden_size})"
            raise ConfigError(describe("rotary_share", expected, f"{self.rotary_share:g}"))
        if self.chunk_frames % 4 or self.chunk_frames // 4 > self.rotary_theta:
            expected = f"a multiple of 4, up to {4 * int(self.rotary_theta)}"
            raise ConfigError(describe("chunk_frames", expected, str(self.chunk_frames)))


class MusicFlamingoTower(AudioFlamingo3Tower):
    """Tokens of a clip, 40 ms each, turned by their time in it."""

    name = "music_flamingo"
    config_class = MusicFlamingoTowerConfig
    transformers_type = "musicflamingo"
    native_types: ClassVar[tuple[str, ...]] = ("musicflamingo",)
    licence = "see the model's page (music-flamingo-2601-hf: NVIDIA OneWay Noncommercial License)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "7b": {},
        "tiny": {
            "window_seconds": 2.56, "chunk_frames": 128, "hidden_size": 64, "depth": 2, "heads": 4, "mlp_size": 128,
        },
    }  # fmt: skip

    config: MusicFlamingoTowerConfig

    def positions(self) -> nn.Module:
        return nn.Embedding(self.config.chunk_frames // 2, self.config.hidden_size)

    def count_tokens(self, samples: int) -> int:
        whole, rest = divmod(samples, self.config.chunk_frames * HOP)
        behind = -(-rest // HOP)  # frames
        # Behind whole chunks the published code has no token for one or two frames.
        last = 0 if not rest or whole and behind < 3 else pooled(behind)
        return whole * self.config.chunk_frames // 4 + last

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.chunk_frames * HOP
        counts = [-(-length // size) for length in lengths.tolist()]
        clips = zip(waveform[:, 0], counts, strict=True)
        chunks = torch.cat([clip[: count * size].unflatten(0, (-1, size)) for clip, count in clips])[:, None]
        number = torch.cat([torch.arange(count) for count in counts])  # of each chunk in its clip
        left = lengths.cpu().repeat_interleave(torch.tensor(counts)) - number * size
        tokens, _ = super().encode(chunks, left.clamp(max=size))
        heard = torch.tensor([self.count_tokens(length) for length in lengths.tolist()], device=tokens.device)
        return joined(self.turn(tokens, number.to(tokens.device)), counts, heard)

    def turn(self, tokens: Tensor, number: Tensor) -> Tensor:
        """`tokens` (chunks, n, hidden) of the chunks of this `number` (chunks,), their first pairs turned, in float64.

        One part of a token turns by its chunk's number, one by its place in it, and both the faster the later it is.
        """
        config, width = self.config, self.config.rotary_size
        step = 4 * config.frame_seconds
        place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        rates = 1.0 / config.rotary_theta ** (torch.arange(0, width, 2, device=tokens.device).float() / width)
        seconds = number[:, None] * (config.chunk_frames // 4) * step + place * step  # (chunks, n)
        by_chunk = (number.float() / config.rotary_theta)[:, None] * rates  # (chunks, width / 2)
        by_place = (place / config.rotary_theta * (2 * math.pi))[:, None] * rates  # (n, width / 2)
        shape = (*seconds.shape, len(rates))
        angles = torch.cat([by_chunk[:, None].expand(shape), by_place.expand(shape)], dim=-1)  # (chunks, n, width)
        angles = angles * (-seconds * 2 * math.pi)[..., None]
        cos, sin = angles.cos().double(), angles.sin().double()
        turned, rest = tokens[..., : 2 * width].double(), tokens[..., 2 * width :]
        one, other = turned.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([one * cos - other * sin, other * cos + one * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(tokens.dtype), rest], dim=-1)

    @classmethod
    def native_layout(cls, config: Any) -> NativeLayout:
        """The whole model: see :class:`~audio_llm.model.layouts.NativeEncoder`."""
        layout = super().native_layout(config)
        rope = config.rope_parameters
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(describe("config.json: rope_parameters", "rope_type default", rope["rope_type"]))
        chunk = 2 * config.audio_config.max_source_positions
        seconds = chunk * HOP / SAMPLE_RATE
        own = {
            "window_seconds": max(1, int(MusicFlamingoTowerConfig.window_seconds / seconds)) * seconds,
            "chunk_frames": chunk,
            "rotary_theta": rope["rope_theta"],
            "rotary_share": rope.get("partial_rotary_factor", 1.0),
            "frame_seconds": config.audio_frame_step,
        }
        return dataclasses.replace(
            layout,
            encoder={**layout.encoder, **own},
            max_windows=1,
            least_rest=1,
            chunk_length=seconds,
            around=(config.audio_bos_token_id, config.audio_eos_token_id),
        )
