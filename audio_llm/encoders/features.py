"""Front ends: batched torch functions, float32, on the device of their input.

Nothing here is a module or a buffer: filter banks and windows are constants of their settings, made in float64 and kept
per device, so that a model which is built on the meta device or cast to bfloat16 still hears in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LOG_FLOOR = 1e-10  # 10*log10 of it is the -100 dB that silence has
_ENERGY_FLOOR = 1e-16  # under the energy of one 16-bit step, so that ratios of energies do not depend on the gain
_MEL_BREAK_HZ = 1000.0  # the Slaney scale: linear below (200/3 Hz a mel), logarithmic above (27 mels per factor 6.4)
_MEL_HZ = 200.0 / 3.0
_MEL_LOG_STEP = math.log(6.4) / 27.0
Padding = Literal["reflect", "constant"]
_CPU = torch.device("cpu")
_GROUP = 16  # mel bands: as many floats as the widest registers of today's processors hold
_BLOCK = 2**21  # bytes of frames, for each thread: what is computed of them together stays near its level 2 cache


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's Auditory Toolbox scale (1998), float64 in and out."""
    above = _MEL_BREAK_HZ / _MEL_HZ + torch.log(hz.clamp(min=_MEL_BREAK_HZ) / _MEL_BREAK_HZ) / _MEL_LOG_STEP
    return torch.where(hz < _MEL_BREAK_HZ, hz / _MEL_HZ, above)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of :func:`hz_to_mel`."""
    knee = _MEL_BREAK_HZ / _MEL_HZ
    return torch.where(mel < knee, mel * _MEL_HZ, _MEL_BREAK_HZ * torch.exp((mel - knee) * _MEL_LOG_STEP))


def hz_to_htk(hz: Tensor) -> Tensor:
    """The logarithmic mel scale of HTK, ``2595·log10(1 + f/700)``, float64 in and out."""
    return 2595.0 * torch.log10(1.0 + hz / 700.0)


def htk_to_hz(mel: Tensor) -> Tensor:
    """Inverse of :func:`hz_to_htk`."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


@functools.lru_cache(maxsize=32)
def mel_bank(
    sample_rate: int,
    n_fft: int,
    n_mels: int,
    fmin: float,
    fmax: float,
    device: torch.device = _CPU,
    scale: Literal["slaney", "htk"] = "slaney",
) -> Tensor:
    """Triangles of equal area on a mel scale, ``(n_fft // 2 + 1, n_mels)`` float32, as ``librosa.filters.mel``.

    The result is shared: callers must not write to it.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
        to_mel, to_hz = (hz_to_mel, mel_to_hz) if scale == "slaney" else (hz_to_htk, htk_to_hz)
        ends = to_mel(torch.tensor([fmin, fmax], dtype=torch.float64))
        steps = torch.arange(n_mels + 2, dtype=torch.float64) / (n_mels + 1)
        edges = to_hz(ends[0] + steps * (ends[1] - ends[0]))
        lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
        rising = (bins[:, None] - lower) / (centre - lower)
        falling = (upper - bins[:, None]) / (upper - centre)
        bank = torch.minimum(rising, falling).clamp(min=0) * (2.0 / (upper - lower))
        return bank.float().to(device)


@functools.lru_cache(maxsize=32)
def hann(length: int, device: torch.device = _CPU, within: int | None = None) -> Tensor:
    """Periodic Hann window, ``(length,)`` float32; with `within`, centred in that many samples, zeros around it."""
    margin = 0 if within is None else within - length
    with torch.device("cpu"), torch.inference_mode(False):
        window = torch.hann_window(length, periodic=True, dtype=torch.float64).float()
        return torch.nn.functional.pad(window, (margin // 2, margin - margin // 2)).to(device)


@functools.lru_cache(maxsize=64)
def _bands(bank: Tensor, parts: int) -> list[tuple[slice, Tensor]]:
    """For every `_GROUP` mel bands of `bank`, the values they hear, `parts` to a bin, and the weights of those."""
    with torch.inference_mode(False):
        groups = []
        for weights in bank.split(_GROUP, dim=1):
            heard = weights.any(dim=1).nonzero()
            first, end = (int(heard[0]), int(heard[-1]) + 1) if len(heard) else (0, 1)
            weights = weights[first:end].repeat_interleave(parts, dim=0).contiguous()
            groups.append((slice(first * parts, end * parts), weights))
        return groups


def _in_blocks(tensor: Tensor) -> bool:
    """Whether it pays, and can be, to compute of `tensor` a part at a time: on a CPU, and not of shapes alone."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def forget_constants() -> None:
    """Make filter banks and windows anew: those that are made among tensors without data are of no use outside."""
    for function in (mel_bank, hann, _bands, povey, kaldi_mel_bank):
        function.cache_clear()


def in_mels(values: Tensor, bank: Tensor, parts: int = 1) -> Tensor:
    """``values @ bank`` for ``(..., bins)``, or for ``(..., bins · parts)`` where a bin has several values that add up.

    A triangle is zero but for a few bins: on a CPU, `_GROUP` mel bands at a time are computed from the bins between
    their outer edges. `bank` has to be one that is kept, as :func:`mel_bank`'s are.
    """
    if not _in_blocks(values):
        return values @ bank.repeat_interleave(parts, dim=0)
    rows = values.flatten(0, -2)
    mels = torch.cat([rows[:, heard] @ weights for heard, weights in _bands(bank, parts)], dim=1)
    return mels.unflatten(0, values.shape[:-1])


def mel_power(spectrum: Tensor, bank: Tensor, overwrite: bool = False) -> Tensor:
    """Mel power of a complex spectrum ``(..., bins)``: float32 ``(..., mels)``; `overwrite` uses the spectrum up.

    The bank adds up the squares of both parts: to add them before would take longer than the triangles do.
    """
    parts = torch.view_as_real(spectrum).flatten(-2)
    return in_mels((parts.square_() if overwrite else parts.square()).float(), bank, parts=2)


def framewise(
    function: Callable[..., Tensor], frames_of: Callable[[Tensor], tuple[Tensor, ...]], waveform: Tensor
) -> Tensor:
    """``function(*frames_of(waveform))`` for functions to which each clip and each frame is a matter of its own.

    `waveform` ``(batch, ..., time)``; `frames_of` gives tensors ``(batch, ..., frames, size)``, best overlapping views;
    `function` makes of them one ``(batch, ..., frames, n)``. On a CPU that is a few frames at a time: the intermediate
    results of a whole clip are megabytes, and to fetch those from memory takes longer than all arithmetic.
    """
    if not _in_blocks(waveform) or waveform.requires_grad:
        return function(*frames_of(waveform))
    budget = _BLOCK * torch.get_num_threads()
    rows = max(1, budget // max(1, waveform[:1].nbytes))
    result: Tensor | None = None
    for row in range(0, len(waveform), rows):
        frames = frames_of(waveform[row : row + rows])
        count = frames[0].shape[-2]
        step = -(-count // -(-frames[0].nbytes // budget))  # blocks of equal size
        for start in range(0, count, step):
            part = function(*(each[..., start : start + step, :] for each in frames))
            if result is None:
                if part.shape[-2] == count and len(part) == len(waveform):
                    return part
                # NumPy asks the kernel for large pages, torch does not: a tenth of the time of a large batch.
                shape = (len(waveform), *part.shape[1:-2], count, part.shape[-1])
                result = torch.from_numpy(np.empty(shape, dtype=part.numpy().dtype))
            result[row : row + rows, ..., start : start + step, :] = part
    assert result is not None
    return result


def stft(waveform: Tensor, n_fft: int, hop: int, win_length: int | None = None, padding: Padding = "reflect") -> Tensor:
    """Centred short-time Fourier transform with reflect (or ``constant``: zero) padding and a periodic Hann window.

    ``(batch, channels, time)`` float32 → complex64 ``(batch, channels, 1 + time // hop, n_fft // 2 + 1)``; unscaled.
    `time` must exceed ``n_fft // 2`` (reflect padding needs the samples). `win_length` is the window's length, at most
    and by default `n_fft`.
    """
    return of_stft(lambda spectrum: spectrum, waveform, n_fft, hop, win_length, padding)


def of_stft(
    function: Callable[[Tensor], Tensor],
    waveform: Tensor,
    n_fft: int,
    hop: int,
    win_length: int | None = None,
    padding: Padding = "reflect",
    before: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``function(stft(before(waveform), ...))`` by :func:`framewise`; see :func:`stft`.

    `function` is one of single frames, `before` (by default nothing) one of single clips.
    """
    # Not torch.stft: framing by hand and one batched rfft take a quarter of its time on a CPU.
    window, margin = hann(win_length or n_fft, waveform.device, n_fft), n_fft // 2

    def frames(clips: Tensor) -> tuple[Tensor]:
        clips = clips if before is None else before(clips)
        if padding == "reflect":  # as torch's own reflection, which takes several times as long
            if clips.shape[-1] <= margin:
                raise ValueError(f"expected more than {margin} samples to reflect, found {clips.shape[-1]}")
            ends = clips[..., 1 : margin + 1].flip(-1), clips[..., -margin - 1 : -1].flip(-1)
        else:
            ends = (clips.new_zeros((*clips.shape[:-1], margin)),) * 2
        return (torch.cat((ends[0], clips, ends[1]), dim=-1).unfold(-1, n_fft, hop),)

    return framewise(lambda frames: function(torch.fft.rfft(frames * window)), frames, waveform)


def decibels(amplitude: Tensor) -> Tensor:
    """``10·log10(max(x, 1e-10))``. Spatial-AST takes it of mel *amplitudes*, not powers, and so do we."""
    return 10.0 * torch.log10(amplitude.clamp(min=LOG_FLOOR))


_EMPTY = 1e-30  # beside the magnitude of a bin: far below any that is not zero


def magnitude(spectrum: Tensor) -> Tensor:
    """``spectrum.abs()`` in a quarter of its time on a CPU, at the price that magnitudes below 1e-22 become 0."""
    if spectrum.requires_grad:  # the derivative of a root is infinite at 0, that of abs() is taken as 0
        return spectrum.abs()
    return (spectrum.real.square() + spectrum.imag.square()).sqrt_()


def interaural_phase(spectrum: Tensor, magnitude: Tensor, bank: Tensor) -> Tensor:
    """Cosine and sine of the phase difference right − left, both through the mel bank (Zheng et al. 2024, BAT, §3.1).

    `spectrum` complex and `magnitude` ``(batch, 2, frames, bins)`` → ``(batch, 2, frames, mels)``. An empty bin has
    phase 0, as ``atan2(0, 0)`` has.
    """
    inverse = (magnitude + _EMPTY).reciprocal()
    return in_mels(_difference((spectrum.real + _EMPTY) * inverse, spectrum.imag * inverse), bank)


def _difference(real: Tensor, imaginary: Tensor) -> Tensor:
    """Right times conjugate of left: ``(batch, 2 channels, ...)`` → ``(batch, 2 parts, ...)``. Complex products on a
    CPU take three times as long as these."""
    left, right = (real[:, 0], imaginary[:, 0]), (real[:, 1], imaginary[:, 1])
    return torch.stack((right[0] * left[0] + right[1] * left[1], right[1] * left[0] - right[0] * left[1]), dim=1)


def weighted_phase(spectrum: Tensor, magnitude: Tensor, bank: Tensor) -> Tensor:
    """As :func:`interaural_phase`, with every bin weighted by its energy: quiet bins hold noise, not direction.

    The result is bounded by ±1: the real and imaginary part of the interaural coherence of each mel band.
    """
    energy = in_mels(magnitude[:, 0] * magnitude[:, 1], bank)
    return in_mels(_difference(spectrum.real, spectrum.imag), bank) / energy.clamp(min=_ENERGY_FLOOR)[:, None]


def intensity(spectrum: Tensor, bank: Tensor) -> Tensor:
    """Active intensity of first-order ambisonics per mel band, in the order x, y, z (Perotin et al. 2019).

    `spectrum` complex ``(batch, 4, frames, bins)``, ACN order W Y Z X, SN3D → ``(batch, 3, frames, mels)``.
    Divided by the energy density, so that one plane wave gives the unit vector towards its source.
    """
    omni, y, z, x = spectrum.unbind(dim=1)
    velocity = torch.stack((x, y, z), dim=1)
    active = in_mels((omni.conj()[:, None] * velocity).real, bank)
    density = 0.5 * mel_power(spectrum, bank).sum(dim=1)
    return active / density.clamp(min=_ENERGY_FLOOR)[:, None]


# ------------------------------------------------------------------------------ log-mel and intensity of PSELDNets

_INTENSITY_EPS = 1e-8  # beside the length of the intensity vector of one bin


def peak_normalize(waveform: Tensor) -> Tensor:
    """Divide each clip ``(batch, channels, time)`` by its largest magnitude over all channels; silence stays."""
    peak = waveform.abs().amax(dim=(1, 2), keepdim=True)
    return waveform / peak.masked_fill(peak == 0, 1.0)


def unit_intensity(spectrum: Tensor, bank: Tensor) -> Tensor:
    """Direction of the active intensity, one unit vector per frequency bin, then through the mel bank.

    `spectrum` complex ``(batch, 1 + k, frames, bins)``: the omnidirectional channel, then `k` of Y, Z, X →
    ``(batch, k, frames, mels)`` in that order (Hu et al. 2024, PSELDNets). Unlike :func:`intensity`, quiet bins count
    as much as loud ones.
    """
    omni, velocity = spectrum[:, :1], spectrum[:, 1:]
    active = omni.real * velocity.real + omni.imag * velocity.imag
    length = active.square().sum(dim=1, keepdim=True).sqrt()
    return in_mels(active / (length + _INTENSITY_EPS), bank)


def band_intensity(spectrum: Tensor, bank: Tensor) -> Tensor:
    """Direction of the active intensity per mel band, weighted by energy: the direction cosines of one plane wave.

    `spectrum` complex ``(batch, 1 + k, frames, bins)``: the omnidirectional channel, then `k` of Y, Z, X →
    ``(batch, k, frames, mels)`` in that order. Divided by the power of the omnidirectional channel, because a stereo
    recording does not tell the energy density; values that no plane wave gives are clamped to 1. Unlike
    :func:`unit_intensity`, whose single component in stereo is a sign, it tells how far to the side a source is.
    """
    omni, velocity = spectrum[:, :1], spectrum[:, 1:]
    active = in_mels(omni.real * velocity.real + omni.imag * velocity.imag, bank)
    return (active / mel_power(omni, bank).clamp(min=_ENERGY_FLOOR)).clamp(-1.0, 1.0)


def log_mel_power(spectrum: Tensor, bank: Tensor, overwrite: bool = False) -> Tensor:
    """``log10`` of :func:`mel_power` of every channel, floor 1e-10: complex ``(..., bins)`` → ``(..., mels)``."""
    return mel_power(spectrum, bank, overwrite).clamp_(min=LOG_FLOOR).log10_()


def foa_planes(spectrum: Tensor, bank: Tensor) -> Tensor:
    """Log-mel powers and intensity of first-order ambisonics.

    `spectrum` complex ``(batch, 4, frames, bins)``, ACN order W Y Z X → ``(batch, 7, frames, mels)``:
    :func:`log_mel_power` of every channel, then :func:`unit_intensity` along Y, Z, X.
    """
    return torch.cat((log_mel_power(spectrum, bank), unit_intensity(spectrum, bank)), dim=1)


def band_planes(spectrum: Tensor, bank: Tensor) -> Tensor:
    """:func:`log_mel_power` of every channel, then :func:`band_intensity`: ``(batch, 1 + k, …)`` → 1 + 2k planes."""
    return torch.cat((log_mel_power(spectrum, bank), band_intensity(spectrum, bank)), dim=1)


def mid_side(waveform: Tensor) -> Tensor:
    """Left and right ``(batch, 2, time)`` → W = (L + R)/2 and Y = (L − R)/2, ``(batch, 2, time)``.

    Exactly the W and Y of an ambisonic recording where left and right are coincident cardioids facing the sides.
    """
    left, right = waveform.unbind(dim=1)
    return torch.stack(((left + right) / 2, (left - right) / 2), dim=1)


def pseudo_foa_planes(spectrum: Tensor, bank: Tensor) -> Tensor:
    """:func:`foa_planes` where only W and Y are known, as in stereo: complex ``(batch, 2, frames, bins)`` → 7 planes.

    Planes 2 and 3 are the floor and planes 5 and 6 zero, kept so that weights for four channels fit. Exchanging left
    and right before :func:`mid_side` negates plane 4 and changes nothing else.
    """
    planes = foa_planes(spectrum, bank)
    floor = torch.full_like(planes[:, :2], math.log10(LOG_FLOOR))
    return torch.cat((planes[:, :2], floor, planes[:, 2:], torch.zeros_like(floor)), dim=1)


# --------------------------------------------------------------------------------------------------- UrbanSound mel

DYNAMIC_RANGE_DB = 80.0


def power_mel(waveform: Tensor, bank: Tensor, n_fft: int, hop: int) -> Tensor:
    """Mel power with zero padding at the ends, ``(batch, channels, time)`` → ``(batch, channels, frames, mels)``.

    As ``librosa.feature.melspectrogram(..., power=2, center=True)``; `bank` is :func:`mel_bank`'s. float32.
    """
    # Transformed in float64 (which Apple's GPUs lack): 80 dB below a loud tone float32 rounding is 0.0005 dB.
    precise = None if waveform.device.type == "mps" else Tensor.double

    def power(spectrum: Tensor) -> Tensor:
        return mel_power(spectrum, bank, overwrite=True)

    return of_stft(power, waveform, n_fft, hop, padding="constant", before=precise)


def relative_decibels(power: Tensor) -> Tensor:
    """Levels below each clip's own maximum, in [−80, 0] dB: ``librosa.power_to_db(power, ref=numpy.max)`` per row.

    `power` ``(batch, ...)``. Silence is −80 dB throughout, where librosa's floored reference would make it the maximum.
    """
    level = decibels(power)
    peak = level.flatten(1).amax(dim=1).view(-1, *[1] * (power.ndim - 1))
    relative = (level - peak).clamp(min=-DYNAMIC_RANGE_DB)
    return torch.where(peak > 10.0 * math.log10(LOG_FLOOR), relative, -DYNAMIC_RANGE_DB)


def full_scale_decibels(power: Tensor) -> Tensor:
    """Levels against a fixed reference, in [−80, 0] dB, so that it is kept how loud a clip was.

    0 dB is a power of 1e4: what a sine at a tenth of full scale gives in the bank of a 2048-point transform.
    """
    return (decibels(power) - 40.0).clamp(min=-DYNAMIC_RANGE_DB, max=0.0)


# ------------------------------------------------------------------------------------------------------- Kaldi fbank

_FBANK_FLOOR = 1.1920928955078125e-07  # float32's epsilon, under which Kaldi takes no logarithm
_INT16_SCALE = 32768.0  # Kaldi reads 16-bit samples as they are
_PREEMPHASIS = 0.97


@functools.lru_cache(maxsize=8)
def povey(length: int, device: torch.device = _CPU) -> Tensor:
    """Kaldi's default window, a symmetric Hann to the power of 0.85: ``(length,)`` float32, 0 at both ends."""
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.hann_window(length, periodic=False, dtype=torch.float64).pow(0.85).float().to(device)


@functools.lru_cache(maxsize=8)
def kaldi_mel_bank(sample_rate: int, n_fft: int, n_mels: int, fmin: float, device: torch.device = _CPU) -> Tensor:
    """Triangles of unit height, straight on the mel scale itself, from `fmin` to half the rate, without that last bin.

    ``(n_fft // 2 + 1, n_mels)`` float32. A triangle narrower than a bin may hold none: its output is the floor.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        bins = hz_to_htk(torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64))
        first, last = hz_to_htk(torch.tensor([fmin, sample_rate / 2], dtype=torch.float64))
        step = (last - first) / (n_mels + 1)
        centre = first + step * torch.arange(1, n_mels + 1)
        bank = (1 - (bins[:, None] - centre).abs() / step).clamp(min=0)
        bank[-1] = 0
        return bank.float().to(device)


def fbank_frames(samples: int, window: int = 400, hop: int = 160) -> int:
    """How many whole windows lie in `samples` (0 where there is none)."""
    return 0 if samples < window else 1 + (samples - window) // hop


def kaldi_fbank(waveform: Tensor, n_mels: int = 128, sample_rate: int = 16000) -> Tensor:
    """Log-mel filter bank with Kaldi's defaults (Povey et al. 2011), as BEATs hears: 25 ms windows every 10 ms.

    `waveform` ``(batch, time)`` in [−1, 1], at least one window long → ``(batch, frames, n_mels)`` float32, natural
    logarithm of the energy on the scale of 16-bit samples. No dither; windows that are not whole are left out.
    """
    window, hop, fmin = sample_rate // 40, sample_rate // 100, 20.0
    n_fft = 2 ** math.ceil(math.log2(window))
    bank = kaldi_mel_bank(sample_rate, n_fft, n_mels, fmin, waveform.device)
    # 0 at both ends: the first sample of a window, which has none before it to take 0.97 of, does not matter.
    shape = torch.nn.functional.pad(_INT16_SCALE * povey(window, waveform.device), (0, n_fft - window))
    part = math.gcd(window, hop)

    def frames(clips: Tensor) -> tuple[Tensor, Tensor]:
        """Emphasised frames as long as the transform, and the means of the windows that they begin with."""
        count = fbank_frames(clips.shape[-1], window, hop)
        rest = (count - 1) * hop + n_fft - clips.shape[-1]
        emphasised = torch.nn.functional.pad(clips[:, 1:] - _PREEMPHASIS * clips[:, :-1], (1, max(0, rest)))
        sums = clips[:, : clips.shape[-1] // part * part].unflatten(-1, (-1, part)).sum(dim=-1)
        means = sums.unfold(-1, window // part, hop // part).sum(dim=-1, keepdim=True) / window
        return emphasised.unfold(-1, n_fft, hop)[:, :count], means[:, :count]

    def levels(frames: Tensor, means: Tensor) -> Tensor:
        # Emphasis before the mean is taken away: of a constant it leaves 0.03.
        windows = (frames - (1 - _PREEMPHASIS) * means).mul_(shape)
        return mel_power(torch.fft.rfft(windows), bank, overwrite=True).clamp_(min=_FBANK_FLOOR).log_()

    with torch.autocast(waveform.device.type, enabled=False):  # half precision would overflow in the energies
        return framewise(levels, frames, waveform.float())


# --------------------------------------------------------------------------------------------------- Whisper log-mel

_WHISPER_RANGE = 8.0  # powers of ten under a clip's own maximum


def whisper_log_mel(waveform: Tensor, n_mels: int = 80, exact: bool = False) -> Tensor:
    """Whisper's log-mel (Radford et al. 2023): ``(batch, time)`` at 16 kHz → ``(batch, time // 160, n_mels)`` float32.

    400-point windows every 160 samples, Slaney mels of the power, log10 with 8 powers of ten of range under each clip's
    maximum, then scaled to about [−1, 1]. The original runs on clips filled with zeros to 30 s; so should the caller.
    `exact`: to the bit what Transformers' extractor gives (else to 2e-5, in very quiet bands), in some times the time.
    """
    bank = mel_bank(16000, 400, n_mels, 0.0, 8000.0, waveform.device)
    with torch.autocast(waveform.device.type, enabled=False):
        if exact:
            window = torch.hann_window(400, device=waveform.device)  # whose float32 sines round otherwise than hann's
            spectrum = torch.stft(waveform.float(), 400, 160, window=window, return_complex=True)[..., :-1]
            level = (bank.T @ spectrum.abs().square()).clamp_(min=LOG_FLOOR).log10_().transpose(1, 2)
            level = torch.maximum(level, level.amax(dim=(1, 2), keepdim=True) - _WHISPER_RANGE)
            return level.add_(4.0).mul_(0.25)
        # The transform's last frame, centred on the end, is one that Whisper leaves out.
        level = of_stft(lambda spectrum: log_mel_power(spectrum, bank, True), waveform.float()[:, None], 400, 160)
        level = level[:, 0, :-1]
        level = torch.maximum(level, level.amax(dim=(1, 2), keepdim=True) - _WHISPER_RANGE)
        return level.add_(4.0).mul_(0.25)
