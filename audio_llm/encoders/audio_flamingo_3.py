"""The tower of Audio Flamingo 3 (Goel et al. 2025, "Audio Flamingo 3: Advancing Audio Intelligence with Fully Open
Large Audio Language Models", §3.1): that of Qwen2-Audio, trained on.

A clip of up to ten minutes is cut into windows of 30 s, none of which hears another. Behind the tower are two linears,
then Qwen2; :mod:`audio_llm.model.native` reads the whole model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from audio_llm.encoders.qwen2_audio import KEYS, TWO_LINEARS, Qwen2AudioTower, two_linears
from audio_llm.model.layouts import NativeLayout


class AudioFlamingo3Tower(Qwen2AudioTower):
    """Tokens after the last norm, 40 ms each, of one window."""

    name = "audio_flamingo_3"
    transformers_type = "audioflamingo3"
    native_types: ClassVar[tuple[str, ...]] = ("audioflamingo3",)
    licence = "see the model's page (audio-flamingo-3-hf: NVIDIA OneWay Noncommercial License)"

    @classmethod
    def native_layout(cls, config: Any) -> NativeLayout:
        """The whole model: see :class:`~audio_llm.model.layouts.NativeEncoder`."""
        return dataclasses.replace(
            super().native_layout(config),
            projector=two_linears(config, config.projector_bias),
            keys=(*KEYS, *TWO_LINEARS),
            max_windows=20,  # where the folder's processor does not say
            least_rest=321,  # samples: of two frames there is no pair to take the mean of, and so no token
        )
