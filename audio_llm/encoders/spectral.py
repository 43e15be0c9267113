"""What the encoders for sound events share: log-mel and intensity planes, standardised per mel band and plane.

A stereo recording is read as ambisonics of which only W and Y are known, so that mono, stereo and four-channel models
differ in nothing but the planes that carry sound.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from audio_llm.encoders import features
from audio_llm.errors import ConfigError, describe
from audio_llm.model.encoder import AudioEncoder

# layout -> (channels, planes, accepted layouts); binaural is two channels as well, of another kind of microphone.
_LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "mono": (1, 1, ("mono",)),
    "stereo": (2, 7, ("stereo", "binaural")),
    "foa": (4, 7, ("foa",)),
}
_INTENSITY_PLANES = 3  # the last ones, where there are seven
_BAND_PLANES = {"mono": 1, "stereo": 3, "foa": 7}  # stereo has no empty planes when intensity is per band

# The front ends that published networks of several architectures share.
PSELDNETS_FRONT_END: dict[str, Any] = {
    "layout": "foa",
    "win_length": None,
    "hop": 240,
    "levels": "decibels",
    "peak_normalize": False,
    "window_seconds": 10.0,
}
PANNS_FRONT_END: dict[str, Any] = {
    "layout": "mono",
    "sample_rate": 32000,
    "win_length": None,
    "hop": 320,
    "fmin": 50.0,
    "fmax": 14000.0,
    "mel_scale": "slaney",
    "levels": "decibels",
    "peak_normalize": False,
    "window_seconds": 10.0,
}


@dataclasses.dataclass
class SpectralConfig:
    """Front end and window. The defaults are those of stereo SELD (DCASE 2025 task 3): 5 s at 24 kHz, 251 frames."""

    sample_rate: int = 24000
    n_fft: int = 1024
    win_length: int | None = 960  # samples of the Hann window, centred in n_fft
    hop: int = 480
    n_mels: int = 64
    fmin: float = 20.0
    fmax: float = 12000.0
    mel_scale: Literal["htk", "slaney"] = "htk"
    levels: Literal["log10", "decibels"] = "log10"  # of mel power; decibels are ten times as much
    intensity: Literal["unit", "band"] = "unit"  # of every bin, as published (in stereo: a sign); of every mel band
    peak_normalize: bool = True  # every window by its own peak: the published choice, which forgets how loud it was
    window_seconds: float = 5.0
    layout: Literal["mono", "stereo", "foa"] = "stereo"

    @property
    def frames(self) -> int:
        """STFT frames in a window."""
        return 1 + round(self.window_seconds * self.sample_rate) // self.hop

    def check(self) -> None:
        """:class:`ConfigError` for a front end that cannot be built."""
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            expected = f"0 <= fmin < fmax <= {self.sample_rate / 2:g} Hz"
            raise ConfigError(describe("fmin, fmax", expected, f"{self.fmin:g}, {self.fmax:g}"))
        if self.win_length is not None and not 1 <= self.win_length <= self.n_fft:
            raise ConfigError(describe("win_length", f"1 to n_fft ({self.n_fft})", str(self.win_length)))
        if round(self.window_seconds * self.sample_rate) <= self.n_fft // 2:
            expected = f"more than {self.n_fft // 2} samples (half of n_fft)"
            raise ConfigError(describe("window_seconds", expected, f"{self.window_seconds:g} s"))


class SpectralEncoder(AudioEncoder):
    """Base of encoders on these planes. A child builds its network and writes :meth:`encode_planes`."""

    config: SpectralConfig
    column_frames: int  # STFT frames that one step of the token grid stands for

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.sample_rate, self.window_seconds = config.sample_rate, config.window_seconds
        self.num_channels, self.num_planes, self.layouts = _LAYOUTS[config.layout]
        if config.intensity == "band":
            self.num_planes = _BAND_PLANES[config.layout]
        self.scalar = nn.ModuleList(nn.BatchNorm1d(config.n_mels) for _ in range(self.num_planes))  # published name

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(waveform.device.type, enabled=False):
            planes = self.planes(waveform)
        tokens = self.encode_planes(planes)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def planes(self, waveform: Tensor) -> Tensor:
        """Levels, then intensity: ``(batch, channels, time)`` → ``(batch, planes, frames, mels)`` float32."""
        config = self.config
        bank = features.mel_bank(
            config.sample_rate, config.n_fft, config.n_mels, config.fmin, config.fmax, waveform.device, config.mel_scale
        )

        def prepared(clips: Tensor) -> Tensor:
            clips = features.peak_normalize(clips) if config.peak_normalize else clips
            return features.mid_side(clips) if config.layout == "stereo" else clips

        planes_of = {"mono": features.log_mel_power, "stereo": features.pseudo_foa_planes, "foa": features.foa_planes}
        by_band = config.intensity == "band" and config.layout != "mono"
        function = features.band_planes if by_band else planes_of[config.layout]
        planes = features.of_stft(
            lambda spectrum: function(spectrum, bank),
            waveform,
            config.n_fft,
            config.hop,
            config.win_length,
            before=prepared,
        )
        if config.levels == "log10":
            return planes
        levels = self.num_channels if by_band or config.layout == "mono" else planes.shape[1] - _INTENSITY_PLANES
        return torch.cat((10.0 * planes[:, :levels], planes[:, levels:]), dim=1)

    def encode_planes(self, planes: Tensor) -> Tensor:
        """Tokens ``(batch, n, hidden)`` of planes as :meth:`planes` gives them."""
        raise NotImplementedError

    def standardize(self, planes: Tensor) -> Tensor:
        """Batch norm of every mel band of every plane; computed in float32 whatever the module was cast to."""
        norms: list[nn.BatchNorm1d] = list(self.scalar)  # type: ignore[arg-type]
        if self.training:
            columns = [norm(plane.transpose(1, 2)) for norm, plane in zip(norms, planes.unbind(dim=1), strict=True)]
            return torch.stack(columns, dim=1).transpose(2, 3)
        mean, variance = (torch.stack([getattr(norm, name).float() for norm in norms])
                          for name in ("running_mean", "running_var"))  # fmt: skip
        scale = torch.stack([norm.weight.float() for norm in norms]) * torch.rsqrt(variance + norms[0].eps)
        offset = torch.stack([norm.bias.float() for norm in norms])
        return (planes - mean[:, None]) * scale[:, None] + offset[:, None]

    def patches(self, tokens: Tensor) -> Tensor:
        assert self.grid is not None
        return tokens.unflatten(1, self.grid)
