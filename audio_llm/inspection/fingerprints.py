"""Fingerprints by which two recordings of the same sound are known, whatever was done to level, coding and cut.

After Haitsma and Kalker, "A highly robust audio fingerprinting system" (ISMIR 2002): 32 bits a frame, each the sign of
a difference of band energies, over neighbouring bands and frames. Frames of 0.37 s overlap so much that a shift by half
a hop changes few bits. Two sounds are compared at every lag; their score is (1 − 2·BER)·√frames of the bits that differ
(BER) in the frames that both have there. Frames in which nothing sounds do not count.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from audio_llm.audio import Waveform, resample

RATE = 11025  # Hz
WINDOW = 4096  # samples of a frame
HOP = 256  # samples between frames
LOW, HIGH = 300.0, 4000.0  # Hz of the first and the last band's edge
BITS = 32
FLOOR = 1e-6  # of the loudest frame's energy: below it nothing sounds
LEAST = 8  # frames that two sounds must have in common
THRESHOLD = 4.0  # score of two recordings of one sound: of ESC-10 no other pair reaches 3.4
_BLOCK = 16  # frames that are transformed at once
_RUN = 64  # frames with one key beyond which it tells nothing
_PER_KEY = 1 / 16  # other frames that a frame meets by chance, in each table
_VOTES = 2  # frames that meet at one lag


@dataclass(frozen=True)
class Fingerprint:
    """`words` (frames,) uint32, a bit for each pair of neighbouring bands; `sounds` (frames,) bool: what counts."""

    words: np.ndarray
    sounds: np.ndarray

    def encode(self) -> str:
        """As text: the words, little endian, then the flags, eight to a byte."""
        data = self.words.astype("<u4").tobytes() + np.packbits(self.sounds).tobytes()
        return f"{len(self.words)}:{base64.b64encode(data).decode()}"

    @classmethod
    def decode(cls, text: str) -> Fingerprint:
        """What :meth:`encode` gave. Raises :class:`ValueError` for anything else."""
        count, _, data = text.partition(":")
        raw, frames = base64.b64decode(data, validate=True), int(count)
        words = np.frombuffer(raw, "<u4", frames)
        return cls(words, np.unpackbits(np.frombuffer(raw, np.uint8, offset=4 * frames), count=frames).astype(bool))

    @property
    def signs(self) -> np.ndarray:
        """(frames, bits) float32: ±1, and 0 where nothing sounds."""
        bits = (self.words[:, None] >> np.arange(BITS, dtype=np.uint32)) & 1  # (frames, bits)
        return (2.0 * bits - 1).astype(np.float32) * self.sounds[:, None]


# Frequencies of a frame's spectrum that lie in some band.
_USED = slice(int(np.ceil(LOW * WINDOW / RATE)), int(np.ceil(HIGH * WINDOW / RATE)))


def _bands() -> np.ndarray:
    """(bands, used frequencies): which of them lie in which band."""
    edges = np.geomspace(LOW, HIGH, BITS + 2)
    frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)[_USED]
    return ((frequencies >= edges[:-1, None]) & (frequencies < edges[1:, None])).astype(np.float32)


_BANDS, _HANN = _bands(), np.hanning(WINDOW).astype(np.float32)


def fingerprint(waveform: Waveform) -> Fingerprint:
    """Of a sound of any length, rate and layout; of several channels, of their sum, of ambisonics its first."""
    samples = waveform.samples
    alone = len(samples) == 1 or waveform.layout == "foa"
    mixed = samples[:1] if alone else samples.sum(axis=0, keepdims=True) / len(samples)
    mono = resample(Waveform(mixed, waveform.sample_rate, "mono"), RATE).samples[0]
    mono = np.pad(mono, (0, max(0, WINDOW + HOP - len(mono))))
    energies = np.concatenate([power @ _BANDS.T for power in spectra(mono, _HANN, HOP, _USED)])  # (frames + 1, bands)
    total = energies.sum(1)
    loud = total > FLOOR * total.max()
    steps = energies[:, :-1] - energies[:, 1:]
    bits = (steps[1:] - steps[:-1]) > 0  # (frames, bits)
    words = (bits.astype(np.uint32) << np.arange(BITS, dtype=np.uint32)).sum(1, dtype=np.uint32)
    return Fingerprint(words, loud[1:] & loud[:-1])


def spectra(
    samples: np.ndarray,
    window: np.ndarray,
    hop: int,
    used: slice = slice(None),  # of the frequencies
) -> Iterator[np.ndarray]:
    """Power spectra of the frames of `samples` (time,), one each `hop`: blocks (frames, frequencies) float32, in order,
    so that an hour of sound takes no more memory than a second. `window`: (samples of a frame,) float32."""
    from scipy.fft import rfft  # NumPy's takes four times as long

    frames = np.lib.stride_tricks.sliding_window_view(samples, len(window))[::hop]  # (frames, samples)
    windowed = np.empty((min(_BLOCK, len(frames)), len(window)), np.float32)
    for start in range(0, len(frames), _BLOCK):
        block = frames[start : start + _BLOCK]
        found = rfft(np.multiply(block, window, out=windowed[: len(block)]), axis=1)[:, used]
        power = np.square(found.real)
        power += np.square(found.imag)
        yield power


def score(one: Fingerprint, other: Fingerprint) -> float:
    """The highest score over all lags at which both have `LEAST` frames in common; 0 where there is none."""
    first, second = one.signs, other.signs
    size = 1 << (len(first) + len(second) - 2).bit_length()

    def correlated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.fft.irfft(np.fft.rfft(a, size, axis=0) * np.conj(np.fft.rfft(b, size, axis=0)), size, axis=0)

    agreeing = correlated(first, second).sum(1) / BITS  # (lags,)
    common = np.rint(correlated(one.sounds[:, None].astype(float), other.sounds[:, None].astype(float))[:, 0])
    found = agreeing[common >= LEAST] / np.sqrt(common[common >= LEAST])
    return float(found.max(initial=0.0))


def pairs(
    prints: Sequence[Fingerprint], others: Sequence[Fingerprint] = (), threshold: float = THRESHOLD
) -> Iterator[tuple[int, int, float]]:
    """Pairs of `prints` (first < second), or of these and of `others` where there are any, whose score is reached.

    Only pairs are compared that meet: several frames of both, at one lag, have equal bits in one of four tables. A key
    has the more bits the more frames there are, so that the work grows with their number, not with its square.
    """
    for one, two in sorted(_meetings(prints, others)):
        found = score(prints[one], (others or prints)[two])
        if found >= threshold:
            yield one, two, found


def _meetings(prints: Sequence[Fingerprint], others: Sequence[Fingerprint]) -> set[tuple[int, int]]:
    every = [*prints, *others]
    words = np.concatenate([each.words[each.sounds] for each in every] or [np.zeros(0, np.uint32)])
    places = np.concatenate([np.flatnonzero(each.sounds) for each in every] or [np.zeros(0, int)])
    owners = np.repeat(np.arange(len(every)), [int(each.sounds.sum()) for each in every])
    width = int(np.clip(np.ceil(np.log2(max(len(words), 1) / _PER_KEY)), 16, BITS))
    votes = np.concatenate(
        [_votes(key, owners, places, len(prints) if others else 0, len(every)) for key in _keys(words, width)]
    )
    found, counts = np.unique(votes, return_counts=True)  # (pair, lag) as one number
    enough = np.unique(found[counts >= _VOTES] // _LAGS)
    shift = len(prints) if others else 0
    return {(int(pair) // len(every), int(pair) % len(every) - shift) for pair in enough}


_LAGS = 2**20  # more than any lag: 6 hours


def _keys(words: np.ndarray, width: int) -> Iterable[np.ndarray]:
    """Four choices of `width` bits of each word."""
    step = (BITS - width) / 3
    for table in range(4):
        turned = (words >> np.uint32(round(table * step))) if width < BITS else words
        yield turned & np.uint32(2**width - 1 if width < BITS else 2**32 - 1)
        if width == BITS:
            return


def _votes(keys: np.ndarray, owners: np.ndarray, places: np.ndarray, split: int, count: int) -> np.ndarray:
    """A number for each meeting of two frames: (first · count + second) · lags + lag."""
    order = np.argsort(keys, kind="stable")
    keys, owners, places = keys[order], owners[order], places[order]
    found = [np.zeros(0, np.int64)]
    for step in range(1, _RUN):
        same = keys[step:] == keys[:-step]
        if not same.any():
            break
        one, two = owners[:-step][same], owners[step:][same]  # ascending, as the sort is stable
        lag = places[step:][same] - places[:-step][same]
        apart = (one < split) & (two >= split) if split else one != two
        found.append(((one * count + two) * _LAGS + lag + _LAGS // 2)[apart])
    return np.concatenate(found)
