"""The audio tower of Qwen2.5-Omni's thinker (Xu et al. 2025, "Qwen2.5-Omni Technical Report", §2.2).

As Qwen2-Audio's, but in chunks of two seconds, none of which hears another: so it takes sounds of up to 300 s. Its last
linear is the projector of the whole model, which :mod:`audio_llm.model.native` reads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audio_llm.encoders.qwen2_audio import LINEAR, Qwen2AudioTower, Qwen2AudioTowerConfig, pooled, text_config
from audio_llm.errors import ConfigError, describe
from audio_llm.model.layouts import NativeForm, NativeLayout


@dataclasses.dataclass
class OmniTowerConfig(Qwen2AudioTowerConfig):
    """Sizes. The defaults are those of Qwen2.5-Omni-7B."""

    window_seconds: float = 300.0
    chunk_frames: int = 200  # of the log-mel

    def check(self) -> None:
        super().check()
        if self.chunk_frames < 4 or self.chunk_frames % 4:
            raise ConfigError(describe("chunk_frames", "a multiple of 4", str(self.chunk_frames)))


class OmniTower(Qwen2AudioTower):
    """Tokens after the last norm, 40 ms each, from chunks that are heard one by one."""

    name = "qwen2_5_omni"
    config_class = OmniTowerConfig
    transformers_type = "qwen2_5_omni"
    native_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    signs = r"^(thinker\.)?audio_tower\.ln_post\."
    licence = "see the model's page (Qwen2.5-Omni-7B: Apache-2.0; -3B: Qwen Research)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "7b": {},
        "tiny": {"window_seconds": 4.8, "hidden_size": 64, "depth": 2, "heads": 4, "mlp_size": 128},
    }

    config: OmniTowerConfig

    def positions(self) -> nn.Module:
        return Sinusoids(self.config.hidden_size)

    def attend(self, maps: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        size, batch = self.config.chunk_frames, len(maps)
        maps = nn.functional.pad(maps, (0, 0, 0, -maps.shape[1] % size))
        place = torch.arange(maps.shape[1], device=maps.device)
        chunks = maps.masked_fill(~(place < frames[:, None])[..., None], 0.0).unflatten(1, (-1, size)).flatten(0, 1)
        left = frames[:, None] - place[::size]  # (batch, chunks): frames of the clip from the chunk's start on
        lengths = left.clamp(0, size).flatten()  # (batch · chunks,)
        heard = lengths > 0
        inside = (torch.arange(size, device=maps.device) < lengths[heard, None])[:, None]  # (rows, 1, size)
        hidden = nn.functional.gelu(self.conv1(chunks[heard].transpose(1, 2))) * inside
        hidden = nn.functional.gelu(self.conv2(hidden)).transpose(1, 2)  # (rows, size / 2, hidden)
        hidden = self.transform(hidden, (lengths[heard] - 1) // 2 + 1)
        hidden = self.layer_norm(hidden.unflatten(1, (-1, 2)).mean(2))  # (rows, size / 4, hidden)
        tokens = hidden.new_zeros(len(chunks), *hidden.shape[1:]).index_put((heard.nonzero()[:, 0],), hidden)
        tokens = tokens.unflatten(0, (batch, -1)).flatten(1, 2)  # (batch, chunks · size / 4, hidden)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < pooled(frames)[:, None]

    @classmethod
    def native_layout(cls, config: Any) -> NativeLayout:
        """The thinker, alone or in its whole folder."""
        whole = config.model_type == "qwen2_5_omni"
        config, under = (config.thinker_config, "thinker.") if whole else (config, "")
        fields = cls.sizes(config.audio_config, OmniTowerConfig.window_seconds)
        return NativeLayout(
            encoder={**fields, "chunk_frames": 2 * config.audio_config.n_window},
            projector=LINEAR,
            text=text_config(config.text_config, alike=("qwen2_5_omni_text",)),
            keys=(
                ("model.audio_encoder.layer_norm.", f"{under}audio_tower.ln_post."),
                ("model.projector.linear.", f"{under}audio_tower.proj."),
                ("model.audio_encoder.", f"{under}audio_tower."),
                ("model.language_model.", f"{under}model."),
                ("lm_head.", f"{under}lm_head."),
            ),
            # Two embeddings of the tower have no use; the talker and what it speaks with answer in sound.
            others=(f"{under}audio_tower.audio_bos_eos_token.", f"{under}visual.", "talker.", "token2wav."),
            audio_token_id=config.audio_token_index,
        )

    @classmethod
    def native_forms(cls) -> dict[str, NativeForm]:
        """``omni``: with the thinker under its name, as published and as others serve it; ``thinker``: it alone."""
        return {"omni": NativeForm(_under_thinker, _whole_config), "thinker": NativeForm(_alone, _thinker_config)}


_PARTS = ("thinker.", "talker.", "token2wav.")
_NUMBERS = ("dtype", "torch_dtype")  # of the weights, at either level


def _under_thinker(key: str) -> str:
    return key if key.startswith(_PARTS) else f"thinker.{key}"


def _alone(key: str) -> str | None:
    return None if key.startswith(_PARTS[1:]) else key.removeprefix("thinker.")


def _whole_config(facts: dict[str, Any]) -> dict[str, Any]:
    if facts.get("model_type") == "qwen2_5_omni":
        return facts
    own = {"architectures": ["Qwen2_5OmniForConditionalGeneration"], "model_type": "qwen2_5_omni"}
    kept = {key: value for key, value in facts.items() if key in _NUMBERS}
    return {**own, "enable_audio_output": False, **kept, "thinker_config": facts}


def _thinker_config(facts: dict[str, Any]) -> dict[str, Any]:
    if facts.get("model_type") != "qwen2_5_omni":
        return facts
    own = {"architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"], "model_type": "qwen2_5_omni_thinker"}
    kept = {key: value for key, value in facts.items() if key in _NUMBERS}
    return {**facts["thinker_config"], **kept, **own}


class Sinusoids(nn.Module):
    """Sines, then cosines of a position, from one radian a position to one in 10,000 positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, place: Tensor) -> Tensor:
        """(n,) -> (n, width) float32."""
        half = self.width // 2
        rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=place.device).float())
        angles = place[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)
