"""Facts that are measured, not recognised: length, level, onsets, tempo, pitch and spectral shape, with their units.

Of several channels the one with the most energy is measured. librosa does the work (McFee et al. 2015); what it does
not say, how sure a figure is, is added here: a tempo of noise is no tempo.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from audio_llm.audio import Waveform, resample
from audio_llm.inspection.fingerprints import spectra
from data_prep.corpus.compiled import librosa
from data_prep.corpus.facts import Fact

RATE = 16_000  # Hz
HOP = 256  # samples between frames: 16 ms
FRAME = 2048  # samples of a frame
STRIDE = 1024  # samples between frames of which the pitch is found: half a frame
LEAD = RATE // 4  # samples of silence that are put before a sound
BEATS = 8 * RATE // HOP  # frames within which beats are looked for: 8 s
THIN = 8  # frames between the places around which they are: 0.13 s
SILENCE = -60.0  # dB re full scale: frames below it are silent
PITCHES = (65.0, 2000.0)  # Hz, C2 to B6
SOURCE = "librosa"
_BLOCK = 16  # frames whose pitch is found at once
_PARTS = 4  # of the mel filters


def measured(waveform: Waveform) -> list[Fact]:
    """The facts of a sound. A sound without energy has a length and a silence alone.

    ``duration`` s; ``loudness`` dB (root mean square re full scale); ``silence`` (share of frames below −60 dB);
    ``onsets`` (how often a sound begins); ``tempo`` beats per minute, from four onsets on; ``pitch`` Hz (median over
    periodic frames); ``centroid`` Hz (mean of the power spectrum, weighted by the frames' energy).
    """
    seconds = waveform.seconds
    facts = [Fact("", "duration", round(seconds, 2), "s", "file")]
    energies = [float(channel @ channel) for channel in waveform.samples]
    samples = waveform.samples[int(np.argmax(energies))]  # (time,)
    level = 10 * float(np.log10(max(max(energies) / max(1, len(samples)), 1e-20)))
    if level <= SILENCE or len(samples) < FRAME:
        return [*facts, Fact("", "silence", 1.0 if level <= SILENCE else 0.0, "", "level")]
    facts.append(Fact("", "loudness", round(level, 1), "dB", "level"))
    mono = resample(Waveform(samples[None], waveform.sample_rate, "mono"), RATE).samples[0]
    return [*facts, *_spectral(np.ascontiguousarray(mono, dtype=np.float32))]


def _spectral(samples: np.ndarray) -> Iterator[Fact]:
    # What is there from the first sample on begins there: silence before it shows its beginning.
    before, length = LEAD + FRAME // 2, max(FRAME, len(samples))
    led = np.zeros(before + length + FRAME // 2, np.float32)
    led[before : before + len(samples)] = samples
    bands, energy, spectrum = _summed(led)
    silent = 10 * np.log10(np.maximum(energy / (FRAME**2 / 8), 1e-12)) < SILENCE
    yield Fact("", "silence", round(float(silent.mean()), 3), "", "level")
    number, sure, strength = _onsets(bands)
    yield Fact("", "onsets", number, "", SOURCE, round(sure, 3))
    if number >= 4:
        tempo, steady = _tempo(strength)
        yield Fact("", "tempo", round(tempo, 1), "beats per minute", SOURCE, round(min(sure, steady), 3))
    pitch, periodic = _pitch(led[LEAD:], ~silent[:: STRIDE // HOP])
    if pitch:
        yield Fact("", "pitch", round(pitch, 1), "Hz", SOURCE, round(periodic, 3))
    frequencies = np.fft.rfftfreq(FRAME, 1 / RATE)
    yield Fact("", "centroid", round(float(spectrum @ frequencies / energy.sum()), 1), "Hz", SOURCE)


def _summed(led: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the power spectra of a sound with the silence of `LEAD` before it: their mel bands (bands, frames); and, of
    the frames behind that silence, their energies (frames,) and their sum (frequencies,). A block of them at a time is
    looked at while a processor's cache holds it."""
    first = -(-LEAD // HOP)
    bands, energies, spectrum, done = [], [], np.zeros(FRAME // 2 + 1), 0
    for power in spectra(led, _hann(), HOP):
        bands.append(np.concatenate([power[:, used] @ filters for used, filters in _mel()], axis=1))
        energies.append(power.sum(axis=1))
        spectrum += power[max(0, first - done) :].sum(axis=0)
        done += len(power)
    return np.concatenate(bands).T, np.concatenate(energies)[first:], spectrum


@cache
def _hann() -> np.ndarray:
    return np.asarray(librosa().filters.get_window("hann", FRAME), np.float32)


@cache
def _mel() -> list[tuple[slice, np.ndarray]]:
    """The mel filters, some at a time (frequencies, bands), and the frequencies that these hear: with all of them in
    one matrix, nearly all of it zeros, a spectrum takes twice as long. librosa makes it anew for every sound."""
    whole = np.asarray(librosa().filters.mel(sr=RATE, n_fft=FRAME)).T
    parts = np.array_split(whole, _PARTS, axis=1)
    heard = [np.flatnonzero(part.any(axis=1)) for part in parts]
    used = [slice(int(places[0]), int(places[-1]) + 1) for places in heard]
    return [(place, np.ascontiguousarray(part[place])) for place, part in zip(used, parts, strict=True)]


def _onsets(bands: np.ndarray) -> tuple[int, float, np.ndarray]:
    """How many beginnings, how sure: the weakest one's strength over what lies between them, re the strongest; and the
    strength of every frame after the silence of `LEAD`, (frames,). `bands`: (bands, frames) of power."""
    levels = librosa().power_to_db(bands)
    strength = librosa().onset.onset_strength(S=levels, sr=RATE, hop_length=HOP)
    peaks = librosa().onset.onset_detect(onset_envelope=strength, sr=RATE, hop_length=HOP, units="frames", delta=0.1)
    if not len(peaks):
        return 0, 0.0, strength
    between = np.ones(len(strength), dtype=bool)
    for peak in peaks:
        between[max(0, peak - 4) : peak + 8] = False
    rest = float(np.quantile(strength[between], 0.95)) if between.any() else 0.0
    strongest = float(strength[peaks].max())
    return len(peaks), float(np.clip((strength[peaks].min() - rest) / strongest, 0, 1)), strength[LEAD // HOP :]


def _tempo(strength: np.ndarray) -> tuple[float, float]:
    """Beats per minute, and how steady: autocorrelation of the onset strength at the lag of a beat, re its energy."""
    tempo = float(librosa().feature.tempo(tg=_tempogram(strength), sr=RATE, hop_length=HOP)[0])
    centred = strength - strength.mean()
    lag = round(60 / tempo * RATE / HOP)
    energy = float(centred @ centred)
    if not 0 < lag < len(centred) or energy <= 0:
        return tempo, 0.0
    near = [float(centred[shift:] @ centred[: len(centred) - shift]) for shift in (lag - 1, lag, lag + 1) if shift > 0]
    return tempo, float(np.clip(sum(near) / energy if len(near) == 3 else max(near) / energy, 0, 1))


def _tempogram(strength: np.ndarray) -> np.ndarray:
    """Autocorrelations of the onset strength around every `THIN`-th frame, (lags, frames): librosa's ``tempogram`` has
    them around each, and their mean, which is what is asked for, is the same."""
    around = np.pad(strength, BEATS // 2, mode="linear_ramp")
    frames = librosa().util.frame(around, frame_length=BEATS, hop_length=THIN)[:, : -(-len(strength) // THIN)]
    window = librosa().filters.get_window("hann", BEATS)[:, None]
    return librosa().util.normalize(librosa().autocorrelate(frames * window, axis=0), axis=0)


def _pitch(padded: np.ndarray, loud: np.ndarray) -> tuple[float, float]:
    """Median of the fundamental (YIN, de Cheveigné and Kawahara 2002) over frames that repeat themselves after a
    period, and the share of loud frames that do; (0, 0) where fewer than one in ten does. `padded`: (time,), half a
    frame of silence on both sides; `loud`: (frames,)."""
    low, high = PITCHES
    every = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::STRIDE]  # (frames, samples)
    pitches = []
    places = np.flatnonzero(loud[: len(every)])
    for start in range(0, len(places), _BLOCK):
        frames = every[places[start : start + _BLOCK]]
        framing = {"sr": RATE, "frame_length": FRAME, "hop_length": FRAME, "center": False}  # one behind the other
        found = librosa().yin(frames.ravel(), fmin=low, fmax=high, **framing)
        pitches += [pitch for frame, pitch in zip(frames, found.tolist(), strict=True) if _repeats(frame, pitch)]
    inside = [pitch for pitch in pitches if low * 1.02 < pitch < high * 0.98]  # at an end, nothing was found
    share = len(pitches) / max(1, int(loud.sum()))
    return (float(np.median(inside)), share) if share >= 0.1 and inside else (0.0, 0.0)


def _repeats(frame: np.ndarray, pitch: float) -> bool:
    """Whether a frame (time,) is much the same a period of `pitch` later."""
    lag = round(RATE / pitch)
    one, other = frame[:-lag], frame[lag:]
    alike = float(one @ other)
    return alike > 0 and alike**2 > 0.81 * float(one @ one) * float(other @ other)
