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


def measured(waveform: Waveform) -> list[Fact]:
    """The facts of a sound. A sound without energy has a length and a silence alone.

    ``duration`` s; ``loudness`` dB (root mean square re full scale); ``silence`` (share of frames below −60 dB);
    ``onsets`` (how often a sound begins); ``tempo`` beats per minute, from four onsets on; ``pitch`` Hz (median over
    periodic frames); ``centroid`` Hz (mean of the power spectrum, weighted by the frames' energy).
    """
    seconds = waveform.seconds
    facts = [Fact("", "duration", round(seconds, 2), "s", "file")]
    samples = waveform.samples[int(np.square(waveform.samples).sum(axis=1).argmax())]  # (time,)
    level = _decibels(float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))))
    if level <= SILENCE or len(samples) < FRAME:
        return [*facts, Fact("", "silence", 1.0 if level <= SILENCE else 0.0, "", "level")]
    facts.append(Fact("", "loudness", round(level, 1), "dB", "level"))
    mono = resample(Waveform(samples[None], waveform.sample_rate, "mono"), RATE).samples[0]
    return [*facts, *_spectral(np.ascontiguousarray(mono, dtype=np.float32))]


def _spectral(samples: np.ndarray) -> Iterator[Fact]:
    padded = np.pad(samples, (0, max(0, FRAME - len(samples))))
    # What is there from the first sample on begins there: silence before it shows its beginning.
    led = np.pad(padded, (LEAD + FRAME // 2, FRAME // 2))
    window = np.asarray(librosa().filters.get_window("hann", FRAME), np.float32)
    every = np.concatenate(list(spectra(led, window, HOP)))  # (frames, frequencies), the first ones of the silence
    power = every[-(-LEAD // HOP) :]
    energy = power.sum(axis=1)
    silent = 10 * np.log10(np.maximum(energy / (FRAME**2 / 8), 1e-12)) < SILENCE
    yield Fact("", "silence", round(float(silent.mean()), 3), "", "level")
    number, sure, strength = _onsets(every)
    yield Fact("", "onsets", number, "", SOURCE, round(sure, 3))
    if number >= 4:
        tempo, steady = _tempo(strength)
        yield Fact("", "tempo", round(tempo, 1), "beats per minute", SOURCE, round(min(sure, steady), 3))
    pitch, periodic = _pitch(padded, ~silent[:: STRIDE // HOP])
    if pitch:
        yield Fact("", "pitch", round(pitch, 1), "Hz", SOURCE, round(periodic, 3))
    frequencies = np.fft.rfftfreq(FRAME, 1 / RATE)
    yield Fact("", "centroid", round(float((power @ frequencies).sum() / energy.sum()), 1), "Hz", SOURCE)


@cache
def _mel() -> np.ndarray:
    """(bands, frequencies): librosa makes it anew for every sound."""
    return np.asarray(librosa().filters.mel(sr=RATE, n_fft=FRAME))


def _onsets(power: np.ndarray) -> tuple[int, float, np.ndarray]:
    """How many beginnings, how sure: the weakest one's strength over what lies between them, re the strongest; and the
    strength of every frame after the silence of `LEAD`, (frames,). `power`: (frames, frequencies)."""
    levels = librosa().power_to_db(_mel() @ power.T)  # (bands, frames)
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


def _pitch(samples: np.ndarray, loud: np.ndarray) -> tuple[float, float]:
    """Median of the fundamental (YIN, de Cheveigné and Kawahara 2002) over frames that repeat themselves after a
    period, and the share of loud frames that do; (0, 0) where fewer than one in ten does."""
    low, high = PITCHES
    found = librosa().yin(samples, fmin=low, fmax=high, sr=RATE, frame_length=FRAME, hop_length=STRIDE)
    centred = np.pad(samples, FRAME // 2)
    frames = librosa().util.frame(centred, frame_length=FRAME, hop_length=STRIDE)[:, : len(found)]  # (FRAME, frames)
    periodic = np.zeros(len(found), dtype=bool)
    for place in np.flatnonzero(loud[: len(found)]):
        lag = round(RATE / found[place])
        one, other = frames[:-lag, place], frames[lag:, place]
        scale = float(np.sqrt((one @ one) * (other @ other)))
        periodic[place] = scale > 0 and float(one @ other) / scale > 0.9
    share = float(periodic.sum() / max(1, loud.sum()))
    inside = periodic & (found > low * 1.02) & (found < high * 0.98)  # at an end, nothing was found
    return (float(np.median(found[inside])), share) if share >= 0.1 and inside.any() else (0.0, 0.0)


def _decibels(amplitude: float) -> float:
    return 20 * float(np.log10(max(amplitude, 1e-10)))
