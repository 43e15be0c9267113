"""Sounds that stay 16-bit integers: what is said of them is what libsndfile, hashlib and NumPy say of their floats."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from audio_llm import audio, integers, pcm
from audio_llm.audio import Waveform
from audio_llm.integers import Integers


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["mono", "stereo", "foa"]), st.integers(0, 2), st.data())
def test_integers_are_measured_hashed_and_encoded_as_their_floats(layout: str, part: int, data: st.DataObject) -> None:
    """Also where they are longer than what is hashed at once, and where they lie as a file has them."""
    channels, length = audio.LAYOUT_CHANNELS[layout], part * (pcm.PART - 1) + data.draw(st.integers(16, 60))
    frames = np.resize(data.draw(hnp.arrays(np.int16, (16, channels))), (length, channels))
    floats = np.ascontiguousarray(frames.T) / np.float32(32768)
    sound = Integers(frames.T, 8000, layout)
    assert sound.peak == np.abs(floats.astype(float)).max() and sound.seconds == length / 8000
    np.testing.assert_array_equal(sound.waveform().samples, floats)
    told = f"{layout} 8000 {(channels, length)}\n".encode()
    assert sound.sha256() == hashlib.sha256(told + floats.astype("<f4").tobytes()).hexdigest()
    file = io.BytesIO()
    soundfile.write(file, frames, 8000, format="FLAC", subtype="PCM_16")
    assert sound.encode("flac") == file.getvalue() == audio.encode(sound.waveform())


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16")]
)
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_16_bit_wav_files_alone_are_read_as_integers(tmp_path: Path, form: str, subtype: str, channels: int) -> None:
    path = tmp_path / f"a.{form.lower()}"
    frames = np.random.default_rng(0).integers(-32768, 32768, (500, channels), dtype=np.int16)
    soundfile.write(path, frames, 8000, format=form, subtype=subtype)
    found, whole = integers.decode(path), audio.decode(path)
    assert isinstance(found, Integers) == (subtype == "PCM_16" and form == "WAV")
    floats = integers.floats(found)
    assert (floats.sample_rate, floats.layout) == (whole.sample_rate, whole.layout)
    np.testing.assert_array_equal(floats.samples, whole.samples)
    np.testing.assert_array_equal(floats.samples, soundfile.read(path, dtype="float32", always_2d=True)[0].T)


def test_integers_at_an_odd_byte_are_the_same(tmp_path: Path) -> None:
    """A chunk of odd size before the samples, whose pad byte was left out."""
    frames = np.random.default_rng(0).integers(-32768, 32768, (500, 2), dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, frames, 8000, format="WAV", subtype="PCM_16")
    data = file.getvalue()
    odd = data[:36] + b"LIST\x05\0\0\0INFOx" + data[36:]
    odd = odd[:4] + (len(odd) - 8).to_bytes(4, "little") + odd[8:]
    found = integers.decode(odd)
    assert isinstance(found, Integers)
    np.testing.assert_array_equal(found.samples, frames.T)
    assert found.encode("flac") == integers.decode(data).encode("flac")  # type: ignore[union-attr]
    np.testing.assert_array_equal(found.waveform().samples, frames.T / np.float32(32768))


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rounding_is_to_the_nearest_even_and_full_scale_is_the_largest(bits: int, order: str) -> None:
    full = 2 ** (bits - 1)
    samples = np.random.default_rng(1).uniform(-1, 1, (2, pcm.PART + 7)).astype(np.float32, order=order)  # type: ignore[call-overload]
    samples[:, :6] = np.array([1, -1, 0.5 / full, 1.5 / full, -2.5 / full, 1 - 0.5 / full], np.float32)
    expected = np.minimum(np.round(samples.astype(np.float64) * full), full - 1)
    found = audio.quantise(Waveform(samples, 8000, "stereo"), bits)
    np.testing.assert_array_equal(found, expected)
