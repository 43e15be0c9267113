"""The tower of Voxtral (Liu et al. 2025, "Voxtral", §2.1): Whisper's encoder on chunks of 30 s, none of which hears
another.

Silence fills the last chunk, is heard like sound, and has its tokens. The loudest band of the whole clip sets the floor
of its log-mel, so that it is one clip and not a row of windows. Behind the tower four tokens at a time go through two
linears into Llama; :mod:`audio_llm.model.native` reads the whole model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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


@dataclasses.dataclass
class VoxtralTowerConfig(Qwen2AudioTowerConfig):
    """Sizes. The defaults are those of Voxtral-Mini-3B-2507, on clips of up to five minutes."""

    window_seconds: float = 300.0
    chunk_frames: int = 3000  # of the log-mel

    def check(self) -> None:
        super().check()
        if self.chunk_frames < 2 or self.chunk_frames % 2 or self.frames % self.chunk_frames:
            expected = f"an even number of which the window's {self.frames} frames are a multiple"
            raise ConfigError(describe("chunk_frames", expected, str(self.chunk_frames)))


class VoxtralTower(Qwen2AudioTower):
    """Tokens after the last norm, 20 ms each, of as many whole chunks as a clip reaches into."""

    name = "voxtral"
    config_class = VoxtralTowerConfig
    transformers_type = "voxtral"
    native_types: ClassVar[tuple[str, ...]] = ("voxtral",)
    licence = "see the model's page (Voxtral-Mini-3B-2507 and -Small-24B-2507: Apache-2.0)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mini": {},
        "tiny": {
            "window_seconds": 2.56, "chunk_frames": 128, "hidden_size": 64, "depth": 2, "heads": 4, "mlp_size": 128,
        },
    }  # fmt: skip

    config: VoxtralTowerConfig

    def positions(self) -> nn.Module:
        return nn.Embedding(self.config.chunk_frames // 2, self.config.hidden_size)

    @property
    def num_tokens(self) -> int:
        return self.config.frames // 2

    def count_tokens(self, samples: int) -> int:
        return -(-samples // (self.config.chunk_frames * HOP)) * self.config.chunk_frames // 2

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.chunk_frames
        counts = [-(-length // (size * HOP)) for length in lengths.tolist()]
        # Clip by clip, for what the last frame mirrors is where the clip's last chunk ends.
        clips = zip(waveform, counts, strict=True)
        maps = torch.cat([self.log_mel(clip[:, : count * size * HOP]) for clip, count in clips])
        if self.training and self.augment is not None:
            maps = self.augment(maps[:, None])[:, 0]
        hidden = self.convolve(maps.to(self.conv1.weight.dtype))  # (chunks, size / 2, hidden)
        hidden = self.layer_norm(self.transform(hidden, None))
        return joined(hidden, counts, torch.tensor(counts, device=hidden.device) * hidden.shape[1])

    def log_mel(self, clip: Tensor) -> Tensor:
        """(1, samples of whole chunks) -> (chunks, frames, mels)."""
        return features.whisper_log_mel(clip, self.config.n_mels, exact=True)[0].unflatten(
            0, (-1, self.config.chunk_frames)
        )

    @classmethod
    def native_layout(cls, config: Any) -> NativeLayout:
        """The whole model: see :class:`~audio_llm.model.layouts.NativeEncoder`. Raises :class:`CheckpointError` for one
        whose groups of tokens reach over a chunk's end."""
        audio = config.audio_config
        group, rest = divmod(audio.intermediate_size, audio.hidden_size)
        if rest or not group or audio.max_source_positions % group:
            expected = f"a multiple of hidden_size ({audio.hidden_size}) by a divisor of {audio.max_source_positions}"
            item = "config.json: audio_config.intermediate_size"
            raise CheckpointError(describe(item, expected, str(audio.intermediate_size)))
        chunk = 2 * audio.max_source_positions  # frames
        seconds = chunk * HOP / SAMPLE_RATE
        chunks = max(1, int(VoxtralTowerConfig.window_seconds / seconds))
        return NativeLayout(
            encoder={**cls.sizes(audio, chunks * seconds), "chunk_frames": chunk},
            projector=two_linears(config, bias=False, group=group),
            text=text_config(config.text_config, "llama"),
            keys=(*KEYS, *TWO_LINEARS),
            misnamed=MISNAMED,
            audio_token_id=config.audio_token_id,
            chunk_length=seconds,
        )


def joined(tokens: Tensor, counts: list[int], heard: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of chunks (chunks, n, hidden), `counts` of them a clip -> those of the clips (clips, m, hidden), and a
    mask over the first `heard` (clips,)."""
    rows = [part.flatten(0, 1) for part in tokens.split(counts)]  # (a clip's chunks · n, hidden)
    clips = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return clips, torch.arange(clips.shape[1], device=clips.device) < heard[:, None]
