"""Front ends: batched torch functions, float32, on the device of their input.

Nothing here is a module or a buffer: filter banks and windows are constants of their settings, made in float64 and kept
per device, so that a model which is built on the meta device or cast to bfloat16 still hears in float32.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LOG_FLOOR = 1e-10  # 10*log10 of it is the -100 dB that silence has
_ENERGY_FLOOR = 1e-16  # under the energy of one 16-bit step, so that ratios of energies do not depend on the gain
_MEL_BREAK_HZ = 1000.0  # the Slaney scale: linear below (200/3 Hz a mel), logarithmic above (27 mels per factor 6.4)
_MEL_HZ = 200.0 / 3.0
_MEL_LOG_STEP = math.log(6.4) / 27.0
_CPU = torch.device("cpu")


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's Auditory Toolbox scale (1998), float64 in and out."""
    above = _MEL_BREAK_HZ / _MEL_HZ + torch.log(hz.clamp(min=_MEL_BREAK_HZ) / _MEL_BREAK_HZ) / _MEL_LOG_STEP
    return torch.where(hz < _MEL_BREAK_HZ, hz / _MEL_HZ, above)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of :func:`hz_to_mel`."""
    knee = _MEL_BREAK_HZ / _MEL_HZ
    return torch.where(mel < knee, mel * _MEL_HZ, _MEL_BREAK_HZ * torch.exp((mel - knee) * _MEL_LOG_STEP))


@functools.lru_cache(maxsize=32)
def mel_bank(
    sample_rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float, device: torch.device = _CPU
) -> Tensor:
    """Triangles of equal area on the Slaney scale, ``(n_fft // 2 + 1, n_mels)`` float32, as ``librosa.filters.mel``.

    The result is shared: callers must not write to it.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
        ends = hz_to_mel(torch.tensor([fmin, fmax], dtype=torch.float64))
        steps = torch.arange(n_mels + 2, dtype=torch.float64) / (n_mels + 1)
        edges = mel_to_hz(ends[0] + steps * (ends[1] - ends[0]))
        lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
        rising = (bins[:, None] - lower) / (centre - lower)
        falling = (upper - bins[:, None]) / (upper - centre)
        bank = torch.minimum(rising, falling).clamp(min=0) * (2.0 / (upper - lower))
        return bank.float().to(device)


@functools.lru_cache(maxsize=32)
def hann(length: int, device: torch.device = _CPU) -> Tensor:
    """Periodic Hann window, ``(length,)`` float32."""
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.hann_window(length, periodic=True, dtype=torch.float64).float().to(device)


def stft(waveform: Tensor, n_fft: int, hop: int) -> Tensor:
    """Centred short-time Fourier transform with reflect padding and a periodic Hann window.

    ``(batch, channels, time)`` float32 → complex64 ``(batch, channels, 1 + time // hop, n_fft // 2 + 1)``; unscaled.
    `time` must exceed ``n_fft // 2`` (reflect padding needs the samples).
    """
    # Not torch.stft: framing by hand and one batched rfft take a quarter of its time on a CPU.
    padded = torch.nn.functional.pad(waveform, (n_fft // 2, n_fft // 2), mode="reflect")
    return torch.fft.rfft(padded.unfold(-1, n_fft, hop) * hann(n_fft, waveform.device))


def decibels(amplitude: Tensor) -> Tensor:
    """``10·log10(max(x, 1e-10))``. Spatial-AST takes it of mel *amplitudes*, not powers, and so do we."""
    return 10.0 * torch.log10(amplitude.clamp(min=LOG_FLOOR))


def unit_phasor(spectrum: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the phase of a complex spectrum; an empty bin has phase 0, as ``atan2(0, 0)`` has."""
    empty = magnitude == 0
    inverse = magnitude.masked_fill(empty, 1.0).reciprocal()
    return (spectrum.real * inverse).masked_fill(empty, 1.0), spectrum.imag * inverse


def interaural_phase(spectrum: Tensor, magnitude: Tensor, bank: Tensor) -> Tensor:
    """Cosine and sine of the phase difference right − left, both through the mel bank (Zheng et al. 2024, BAT, §3.1).

    `spectrum` complex and `magnitude` ``(batch, 2, frames, bins)`` → ``(batch, 2, frames, mels)``.
    """
    cosine, sine = unit_phasor(spectrum, magnitude)
    return _difference(cosine, sine) @ bank


def _difference(real: Tensor, imaginary: Tensor) -> Tensor:
    """Right times conjugate of left: ``(batch, 2 channels, ...)`` → ``(batch, 2 parts, ...)``."""
    left, right = (real[:, 0], imaginary[:, 0]), (real[:, 1], imaginary[:, 1])
    return torch.stack((right[0] * left[0] + right[1] * left[1], right[1] * left[0] - right[0] * left[1]), dim=1)


def weighted_phase(spectrum: Tensor, magnitude: Tensor, bank: Tensor) -> Tensor:
    """As :func:`interaural_phase`, with every bin weighted by its energy: quiet bins hold noise, not direction.

    The result is bounded by ±1: the real and imaginary part of the interaural coherence of each mel band.
    """
    energy = (magnitude[:, 0] * magnitude[:, 1]) @ bank
    return _difference(spectrum.real, spectrum.imag) @ bank / energy.clamp(min=_ENERGY_FLOOR)[:, None]


def intensity(spectrum: Tensor, bank: Tensor) -> Tensor:
    """Active intensity of first-order ambisonics per mel band, in the order x, y, z (Perotin et al. 2019).

    `spectrum` complex ``(batch, 4, frames, bins)``, ACN order W Y Z X, SN3D → ``(batch, 3, frames, mels)``.
    Divided by the energy density, so that one plane wave gives the unit vector towards its source.
    """
    omni, y, z, x = spectrum.unbind(dim=1)
    velocity = torch.stack((x, y, z), dim=1)
    active = (omni.conj()[:, None] * velocity).real @ bank
    density = 0.5 * (spectrum.real.square() + spectrum.imag.square()).sum(dim=1) @ bank
    return active / density.clamp(min=_ENERGY_FLOOR)[:, None]
