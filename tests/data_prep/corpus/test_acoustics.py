"""Measured facts against sounds that were made to have them: sines, clicks, noise, silence."""

from __future__ import annotations

import numpy as np
import pytest

from audio_llm.audio import Waveform
from data_prep.corpus import acoustics
from data_prep.corpus.acoustics import FRAME, HOP, RATE, measured
from data_prep.corpus.facts import Fact


def sound(samples: np.ndarray, rate: int = RATE) -> dict[str, Fact]:
    """The facts of `samples` (time,) or (channels, time), by kind."""
    layout = "mono" if samples.ndim == 1 else "stereo"
    return {fact.kind: fact for fact in measured(Waveform(np.atleast_2d(samples).astype(np.float32), rate, layout))}


def clicks(times: np.ndarray, seconds: float) -> np.ndarray:
    """Short decaying bursts at `times` (seconds)."""
    rng = np.random.default_rng(0)
    samples = np.zeros(round(seconds * RATE))
    for time in times:
        start = round(time * RATE)
        burst = rng.normal(0, 0.3, 200) * np.exp(-np.arange(200) / 40)
        samples[start : start + 200] += burst[: len(samples) - start]
    return samples


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8])
def test_as_many_clicks_are_counted_as_there_are(number: int) -> None:
    found = sound(clicks((np.arange(number) + 0.5) * 5 / number, 5.0))
    assert found["onsets"].value == number and found["duration"].value == 5.0
    assert ("tempo" in found) == (number >= 4)


@pytest.mark.parametrize("tempo", [60, 90, 150])
def test_the_tempo_of_a_metronome(tempo: int) -> None:
    found = sound(clicks(np.arange(0, 9.9, 60 / tempo), 10.0))["tempo"]
    assert found.value == pytest.approx(tempo, rel=0.02) and found.unit == "beats per minute"


@pytest.mark.parametrize(("hertz", "rate"), [(100, RATE), (440, 44_100), (1000, 8000)])
def test_pitch_level_and_centroid_of_a_sine(hertz: int, rate: int) -> None:
    found = sound(0.5 * np.sin(2 * np.pi * hertz * np.arange(3 * rate) / rate), rate)
    assert found["pitch"].value == pytest.approx(hertz, rel=0.01) and found["pitch"].confidence > 0.9
    assert found["centroid"].value == pytest.approx(hertz, rel=0.02) and found["centroid"].unit == "Hz"
    assert found["loudness"].value == pytest.approx(-9.03, abs=0.1)  # 20 log10(0.5 / √2)
    assert found["silence"].value == 0.0


def test_noise_has_no_pitch_and_its_centroid_is_in_the_middle() -> None:
    found = sound(np.random.default_rng(0).normal(0, 0.1, 3 * RATE))
    assert "pitch" not in found and found["centroid"].value == pytest.approx(RATE / 4, rel=0.02)
    assert found["loudness"].value == pytest.approx(-20, abs=0.2)


def test_the_channel_with_sound_in_it_is_measured() -> None:
    sine = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    alone, beside = sound(sine), sound(np.stack((np.zeros_like(sine), sine)))
    assert alone == beside


@pytest.mark.parametrize("samples", [np.zeros(RATE), np.zeros(1), np.full(RATE, 1e-5)])
def test_silence_is_silence_and_nothing_more(samples: np.ndarray) -> None:
    found = sound(samples)
    assert set(found) == {"duration", "silence"} and found["silence"].value == 1.0


def test_half_a_silence_is_half() -> None:
    samples = np.concatenate((np.zeros(2 * RATE), np.random.default_rng(0).normal(0, 0.1, 2 * RATE)))
    assert sound(samples)["silence"].value == pytest.approx(0.5, abs=0.03)


def test_spectra_that_are_taken_once_give_the_onsets_and_tempo_that_librosa_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """librosa gets the sound itself here: it takes its own spectra, and autocorrelations around every frame."""
    librosa = acoustics.librosa()
    rng = np.random.default_rng(1)
    samples = (clicks(np.sort(rng.uniform(0, 5.5, 11)), 6.0) + rng.normal(0, 0.01, 6 * RATE)).astype(np.float32)
    whole = np.pad(samples, (acoustics.LEAD, 0))
    strength = librosa.onset.onset_strength(y=whole, sr=RATE, hop_length=HOP, n_fft=FRAME)
    taken: list[np.ndarray] = []
    onsets = acoustics._onsets
    monkeypatch.setattr(acoustics, "_onsets", lambda power: taken.append(onsets(power)[2]) or onsets(power))
    found = sound(samples)
    np.testing.assert_allclose(taken[0], strength[acoustics.LEAD // HOP :], atol=1e-3 * strength.max())
    around = librosa.feature.tempogram(onset_envelope=taken[0], sr=RATE, hop_length=HOP, win_length=acoustics.BEATS)
    np.testing.assert_allclose(acoustics._tempogram(taken[0]).mean(1), around.mean(1), atol=0.01)
    tempo = librosa.feature.tempo(onset_envelope=taken[0], sr=RATE, hop_length=HOP)[0]
    assert found["tempo"].value == pytest.approx(tempo, abs=0.06)
    assert found["onsets"].value == len(
        librosa.onset.onset_detect(onset_envelope=strength, hop_length=HOP, sr=RATE, delta=0.1)
    )


def test_the_pitch_is_the_one_that_librosa_finds_where_something_sounds() -> None:
    """librosa gets the whole sound here, its silence as well, and is asked frame by frame what repeats itself."""
    time = np.arange(RATE) / RATE
    tones = [np.zeros(RATE // 2), *(0.3 * np.sin(2 * np.pi * hertz * time) for hertz in (220, 330, 330, 550))]
    samples = np.concatenate(tones).astype(np.float32)
    found = sound(samples)["pitch"]
    low, high = acoustics.PITCHES
    every = acoustics.librosa().yin(
        samples, fmin=low, fmax=high, sr=RATE, frame_length=FRAME, hop_length=acoustics.STRIDE
    )
    loud = every[round(0.6 * RATE / acoustics.STRIDE) :]
    assert found.value == pytest.approx(float(np.median(loud)), abs=0.5)
    assert found.value == pytest.approx(330, abs=1) and found.confidence > 0.9
