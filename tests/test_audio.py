"""Audio in and out, against soundfile, scipy and librosa."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from hypothesis import given, settings
from scipy.io import wavfile

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.datasets import dcase_seld, reverberation, sounds
from audio_llm.errors import AudioError, ConfigError
from audio_llm.model.encoder import build_encoder
from tests.paths import SHARED

LAYOUTS = list(audio.LAYOUT_CHANNELS)


def noise(layout: str = "binaural", samples: int = 4000, rate: int = 16000, seed: int = 0) -> Waveform:
    shape = (audio.LAYOUT_CHANNELS[layout], samples)
    return Waveform(np.random.default_rng(seed).uniform(-0.9, 0.9, shape).astype(np.float32), rate, layout)


def written(data: np.ndarray, rate: int = 16000, **options: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, data, rate, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "PCM_U8"),
        ("WAV", "FLOAT"),
        ("WAVEX", "PCM_16"),
        ("FLAC", "PCM_16"),
    ],
)
def test_decode_equals_soundfile(layout: str, format: str, subtype: str) -> None:
    data = written(noise(layout).samples.T, format=format, subtype=subtype)
    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    found = audio.decode(data, layout=layout)
    np.testing.assert_array_equal(found.samples, expected.T)
    assert (found.sample_rate, found.layout) == (rate, layout)
    assert found.samples.flags.c_contiguous


@pytest.mark.parametrize(
    ("format", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")]
)
def test_perceptual_codecs_equal_soundfile(format: str, subtype: str, tmp_path: Path) -> None:
    path = tmp_path / "tone.bin"
    time = np.arange(16000) / 16000
    path.write_bytes(written(0.4 * np.sin(2 * np.pi * 440 * time), format=format, subtype=subtype))
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    found = audio.decode(path)
    np.testing.assert_allclose(found.samples, expected.T, atol=2e-7)  # mpg123 rounds by block position
    spectrum = np.abs(np.fft.rfft(found.samples[0, 2000:14000]))
    assert abs(np.argmax(spectrum) * found.sample_rate / 12000 - 440) < 2


@pytest.mark.shared("data")
def test_decode_real_recordings() -> None:
    paths = [*sorted((SHARED / "data").rglob("*.wav"))[:3], *sorted((SHARED / "data").rglob("*.ogg"))[:2]]
    assert paths
    for path in paths:
        expected, rate = soundfile.read(path, dtype="float32", always_2d=True)
        found = audio.decode(path)
        np.testing.assert_array_equal(found.samples, expected.T)
        assert found.sample_rate == rate


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from([("flac", "PCM_16"), ("wav", "PCM_16"), ("flac", "PCM_24"), ("wav", "PCM_24")]),
    st.data(),
)
def test_encode_decode_is_exact_on_the_integer_grid(layout: str, kind: tuple[str, str], data: st.DataObject) -> None:
    full = 2 ** (int(kind[1][-2:]) - 1)
    shape = (audio.LAYOUT_CHANNELS[layout], data.draw(st.integers(16, 300)))
    integers = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(-full, full - 1)))
    waveform = Waveform((integers / full).astype(np.float32), 22050, layout)
    found = audio.decode(audio.encode(waveform, *kind), layout=layout)
    np.testing.assert_array_equal(found.samples, waveform.samples)
    assert audio.sha256(found) == audio.sha256(waveform)


def test_encode_is_within_half_a_step() -> None:
    waveform = noise("foa")
    found = audio.decode(audio.encode(waveform))
    assert np.abs(found.samples - waveform.samples).max() <= 0.5 / 32768 + 1e-9


def test_encode_refuses_to_clip_and_limit_peak_mends_it() -> None:
    loud = Waveform(noise().samples * 2, 16000, "binaural")
    with pytest.raises(AudioError, match=r"peak at most 1.*limit_peak"):
        audio.encode(loud)
    limited = audio.limit_peak(loud, 0.99)
    audio.encode(limited)
    np.testing.assert_allclose(limited.samples / loud.samples, limited.samples[0, 0] / loud.samples[0, 0], rtol=1e-5)
    assert audio.decode(audio.encode(loud, "wav", "FLOAT")).samples.max() > 1


@pytest.mark.parametrize("layout", ["mono", "binaural", "foa"])
@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0, 1e4])
def test_a_level_above_full_scale_is_kept(layout: str, gain: float) -> None:
    """16 bits as far as they go, else float: our decoder and SciPy's read the samples back as they were."""
    samples = noise(layout).samples
    loud = Waveform(samples / np.abs(samples).max() * np.float32(gain), 16000, layout)
    data = audio.encode_level(loud)
    assert data == audio.encode_level(loud)
    found = audio.decode(data, layout=layout)
    rate, read = wavfile.read(io.BytesIO(data))
    if gain <= 1:
        assert data == audio.encode(loud, "wav") and read.dtype == np.int16
    else:
        assert data == audio.encode(loud, "wav", "FLOAT") and b"PEAK" not in data  # which has the time of writing
        np.testing.assert_array_equal(found.samples, loud.samples)
        np.testing.assert_array_equal(read.reshape(len(read), -1).T, loud.samples)
    assert (rate, found.layout) == (16000, layout)


def wav_header(data_size: int, channels: int = 1, rate: int = 16000) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    return b"RIFF\xff\xff\xff\xffWAVE" + form + struct.pack("<4sI", b"data", data_size)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0])
def test_wav_written_to_a_pipe_is_read_to_its_end(size: int) -> None:
    pcm = np.arange(100, dtype="<i2")
    found = audio.decode(wav_header(size) + pcm.tobytes())
    np.testing.assert_array_equal(found.samples[0] * 32768, pcm)


def endless(flac: bytes) -> bytes:
    """As it is written to a pipe: the header's number of samples, 36 bits, is zero for unknown."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def test_flac_written_to_a_pipe_is_read_to_its_end() -> None:
    flac = audio.encode(noise(samples=40000))
    assert endless(flac) != flac and soundfile.info(io.BytesIO(endless(flac))).frames > 2**62
    np.testing.assert_array_equal(audio.decode(endless(flac)).samples, audio.decode(flac).samples)


def test_what_follows_the_last_ogg_page_is_nothing() -> None:
    ogg = written(noise(samples=16000).samples[0], format="OGG", subtype="VORBIS")
    np.testing.assert_array_equal(audio.decode(ogg + b"TAG" + bytes(125)).samples, audio.decode(ogg).samples)


def bad_audio() -> dict[str, tuple[bytes, str]]:
    flac = audio.encode(noise(samples=16000))
    wav = audio.encode(noise(samples=16000), "wav")
    tone = np.zeros(400, np.float32)
    sound = noise(samples=16000).samples[0]
    aiff, ogg = written(sound, format="AIFF"), written(sound, format="OGG", subtype="VORBIS")
    opus = written(sound, format="OGG", subtype="OPUS")
    holes = {"nan": np.nan, "inf": -np.inf}
    floats = {
        name: written(np.where(np.arange(400) == 7, value, tone), format="WAV", subtype="FLOAT")
        for name, value in holes.items()
    }
    return {
        "no bytes": (b"", "empty file"),
        "text": (b"this is not audio at all, whatever its name", "decodable"),
        "header only": (b"RIFF\x00\x00\x00\x00WAVE", "decodable"),
        "flac cut": (flac[: len(flac) // 2], "decodable|cut short"),
        "wav cut": (wav[: len(wav) // 2], "cut short"),
        "flac damaged": (flac[:4000] + bytes(9000) + flac[13000:], "decodable|cut short"),
        "nan": (floats["nan"], "1 of 400 are NaN"),
        "inf": (floats["inf"], "1 of 400 are NaN or Inf"),
        "far too loud": (written(1e30 + tone, format="WAV", subtype="FLOAT"), r"full scale at 1.*peak of 1e\+30"),
        "aiff cut": (aiff[: len(aiff) // 2], "cut short"),
        **{f"ogg cut at {share}": (ogg[: int(share * len(ogg))], "cut short") for share in (0.02, 0.3, 0.97, 0.999)},
        "opus cut": (opus[: len(opus) * 97 // 100], "cut short"),
        "ogg damaged": (ogg[:5000] + bytes(9) + ogg[5009:], "a damaged one at byte"),
        "ogg with a hole": (ogg[:200] + b"something" + ogg[200:], "a damaged one at byte|something else at byte"),
        "endless flac cut": (endless(flac)[: len(flac) // 2], "decodable"),
        "endless flac too long": (endless(written(np.zeros(16000 * 3), format="FLAC")), r"at most 2 s.*3\.0 s"),
        "no samples": (written(tone[:0], format="WAV"), "no samples"),
        "one sample": (written(tone[:1], format="WAV"), r"at least 16 samples.*1 sample"),
        "one sample flac": (written(tone[:1], format="FLAC"), r"at least 16 samples.*1 sample"),
        "three channels": (written(np.zeros((400, 3)), format="WAV"), "3 channels"),
        "three channels flac": (written(np.zeros((400, 3)), format="FLAC"), "3 channels"),
        "too long": (written(np.zeros(16000 * 3), format="WAV"), r"at most 2 s.*3\.0 s"),
        "too long flac": (written(np.zeros(16000 * 3), format="FLAC"), r"at most 2 s.*3\.0 s"),
    }


@pytest.mark.parametrize("case", bad_audio())
def test_bad_audio_is_one_clear_message(case: str) -> None:
    data, message = bad_audio()[case]
    with pytest.raises(AudioError, match=message) as caught:
        audio.decode(data, name="clip 7", max_seconds=2)
    assert str(caught.value).startswith("clip 7: expected ")
    assert "\n" not in str(caught.value)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="no such file"):
        audio.decode(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="readable"):
        audio.decode(tmp_path)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["wav", "flac", "aiff", "ogg"]), st.integers(0, 400))
def test_garbage_never_escapes_as_another_error(junk: bytes, format: str, position: int) -> None:
    data = bytearray(audio.encode(noise(samples=64), format, "VORBIS" if format == "ogg" else "PCM_16"))
    data[position : position + len(junk)] = junk
    try:
        found = audio.decode(bytes(data))
    except AudioError:
        return
    assert np.isfinite(found.samples).all()


def test_layout_rules() -> None:
    two, four = audio.encode(noise("stereo")), audio.encode(noise("foa"))
    assert audio.decode(two).layout == "stereo"
    assert audio.decode(two, layout="binaural").layout == "binaural"
    assert audio.decode(four).layout == "foa"
    with pytest.raises(AudioError, match=r"4 channel\(s\) for layout 'foa', found 2"):
        audio.decode(two, layout="foa")
    with pytest.raises(AudioError, match="did you mean 'binaural'"):
        audio.decode(two, layout="binarual")
    with pytest.raises(AudioError, match=r"shape \(2, time\), found shape \(1, 5\)"):
        Waveform(np.zeros((1, 5), np.float32), 16000, "stereo")
    with pytest.raises(AudioError, match="layout mono or foa, found binaural"):
        audio.check(noise(), layouts=("mono", "foa"))
    with pytest.raises(AudioError, match="32000 Hz, found 16000 Hz"):
        audio.check(noise(), layouts=("binaural",), sample_rate=32000, name="clip")
    audio.check(noise(), layouts=("binaural",), sample_rate=16000)


@pytest.mark.parametrize(("source", "target"), [(44100, 16000), (16000, 32000), (48000, 24000), (22050, 16000)])
def test_resampling_against_an_ideal_tone(source: int, target: int) -> None:
    def tone(rate: int) -> np.ndarray:
        time = np.arange(rate) / rate
        return np.stack([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 440 * (time - 0.0004))]).astype(np.float32)

    found = audio.resample(Waveform(tone(source), source, "binaural"), target)
    assert found.sample_rate == target and abs(found.num_samples - target) <= 1
    inner = slice(target // 8, -target // 8)  # the edges ring, as those of every linear phase filter do
    expected = tone(target)[:, : found.num_samples]
    np.testing.assert_allclose(found.samples[:, inner], expected[:, inner], atol=2e-4)


def test_resampling_against_scipy_and_librosa_in_the_band() -> None:
    sos = scipy.signal.butter(8, 5000, fs=44100, output="sos")
    signal = scipy.signal.sosfilt(sos, noise("mono", 44100, 44100).samples).astype(np.float32)
    found = audio.resample(Waveform(signal, 44100, "mono"), 16000).samples[0]
    oracles = {
        5e-3: scipy.signal.resample_poly(signal[0], 160, 441),  # its default filter ripples by this much
        1e-5: librosa.resample(signal[0], orig_sr=44100, target_sr=16000, res_type="soxr_hq"),
    }
    for tolerance, expected in oracles.items():
        size = min(len(found), len(expected))
        error = found[500 : size - 500] - expected[500 : size - 500]
        assert np.sqrt(np.mean(error**2)) < tolerance * np.sqrt(np.mean(found**2))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.integers(1, 60), st.sampled_from([1, 2, 4]))
def test_windows_are_the_whole_input(length: int, window: int, channels: int) -> None:
    samples = np.arange(channels * length, dtype=np.float32).reshape(channels, length)
    parts = audio.windows(samples, window, 500)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), samples)
    assert all(part.shape[1] == window for part in parts[:-1]) and 1 <= parts[-1].shape[1] <= window


def test_windows_never_cut() -> None:
    samples = np.zeros((2, 101), np.float32)
    assert len(audio.windows(samples, 50, 3)) == 3
    with pytest.raises(
        AudioError, match="clip: expected at most 2 windows of 50 samples, found 101 samples, 3 windows"
    ):
        audio.windows(samples, 50, 2, name="clip")
    with pytest.raises(AudioError, match="no samples"):
        audio.windows(samples[:, :0], 50, 2)


def test_sha256_tells_samples_rate_and_layout_apart() -> None:
    base = noise("stereo")
    others = [
        base,
        Waveform(base.samples, 16001, "stereo"),
        Waveform(base.samples, 16000, "binaural"),
        Waveform(np.nextafter(base.samples, 2), 16000, "stereo"),
    ]
    assert len({audio.sha256(waveform) for waveform in others}) == 4
    assert audio.sha256(base) == audio.sha256(Waveform(np.asfortranarray(base.samples), 16000, "stereo"))


def encode_foa(signal: np.ndarray, azimuth: float, elevation: float) -> np.ndarray:
    """A plane wave in first order ambisonics, ACN/SN3D (angles in radians)."""
    gains = [1, np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    return (np.array(gains)[:, None] * signal).astype(np.float32)


def test_swapping_mirrors_the_scene() -> None:
    signal = noise("mono").samples[0] / 2
    found = audio.swap_channels(Waveform(encode_foa(signal, 0.7, 0.3), 16000, "foa"))
    np.testing.assert_allclose(found.samples, encode_foa(signal, -0.7, 0.3), atol=1e-7)
    pair = noise("binaural")
    np.testing.assert_array_equal(audio.swap_channels(pair).samples, pair.samples[[1, 0]])
    for waveform in (pair, noise("foa")):
        np.testing.assert_array_equal(audio.swap_channels(audio.swap_channels(waveform)).samples, waveform.samples)
    with pytest.raises(AudioError, match="found mono"):
        audio.swap_channels(noise("mono"))


def test_channels_are_mixed_only_by_name() -> None:
    pair, foa, one = noise("stereo"), noise("foa"), noise("mono")
    samples = {"left": pair.samples[:1], "right": pair.samples[1:], "mean": (pair.samples[:1] + pair.samples[1:]) / 2}
    for hearing, expected in samples.items():
        found = audio.hear(pair, ("mono",), hearing)
        assert found.layout == "mono"
        np.testing.assert_allclose(found.samples, expected, atol=1e-7)
    for hearing in ("mean", "omni"):
        np.testing.assert_array_equal(audio.hear(foa, ("mono",), hearing).samples, foa.samples[:1])
    for layouts in (("binaural",), ("stereo",), ("stereo", "binaural"), None):
        twice = audio.hear(one, layouts, "duplicate")
        assert twice.layout in (layouts or audio.TWO_CHANNELS)
        np.testing.assert_array_equal(twice.samples, one.samples[[0, 0]])
    for waveform, layouts, hearing in (
        (one, ("mono",), "left"),
        (pair, ("stereo",), "duplicate"),
        (pair, None, "refuse"),
    ):
        assert audio.hear(waveform, layouts, hearing) is waveform  # it fits, or everything does


@pytest.mark.parametrize(
    ("layout", "layouts", "hearing", "words"),
    [
        ("stereo", ("mono",), "refuse", "found stereo. .*`--hearing left` or `--hearing mean`"),
        ("binaural", ("mono",), "omni", "found binaural. .*`--hearing left` or `--hearing mean`"),
        ("foa", ("mono",), "left", "found foa. .*`--hearing omni`"),
        ("mono", ("binaural",), "refuse", "found mono. `--hearing duplicate`.*direction then mean nothing"),
        ("stereo", ("binaural",), "duplicate", "found stereo. `audio-llm inspect SHARDS`"),
        ("mono", ("foa",), "refuse", "found mono. Channels are not invented: `audio-llm prep .* audio.layout=foa`"),
        ("stereo", ("foa",), "refuse", "found stereo. Channels are not invented: `audio-llm prep"),
        (
            "foa",
            ("stereo", "binaural"),
            "refuse",
            r"found foa. Make 2 of them, .*`ffmpeg -i IN -af 'pan=stereo\|c0=0.5",
        ),
    ],
)
def test_a_refusal_of_channels_names_the_flag_in_the_right_direction(
    layout: str, layouts: tuple[str, ...], hearing: str, words: str
) -> None:
    with pytest.raises(AudioError, match=words) as caught:
        audio.hear(noise(layout), layouts, hearing)
    assert "audio." not in str(caught.value).replace("audio.layout=", "")


@pytest.mark.parametrize("wanted", [1, 2, 4])
@pytest.mark.parametrize("found", [1, 2, 3, 4, 6])
def test_every_refusal_of_channels_names_a_command(wanted: int, found: int, tmp_path: Path) -> None:
    """In a file, a folder of classes, a folder of SELD, a response, the processor and an encoder."""
    if wanted == found:
        return
    layout = {1: "mono", 2: "stereo", 4: "foa"}[wanted]
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (found, 8000)).astype(np.float32)
    soundfile.write(tmp_path / "fold3_room1_mix001.wav", samples.T, 16000)
    np.save(tmp_path / "1.npy", samples.astype(np.float64))
    path = tmp_path / "fold3_room1_mix001.wav"
    clip = sounds.Clip("dog", "a", "a", path=str(path))
    seld = dcase_seld.SELDFolder([dcase_seld.Clip("a", path)], ["dog"])
    network = build_encoder({"name": "cnn14", "preset": "tiny", "layout": layout, "window_seconds": 0.5})
    reads: list[Callable[[], object]] = [
        lambda: audio.decode(path, layout=layout),
        lambda: network(torch.from_numpy(samples)[None], torch.tensor([samples.shape[1]])),
        lambda: reverberation.load_response(
            reverberation.Response("a/1.npy", str(tmp_path / "1.npy"), 0, 0, 1), layout
        ),
    ]
    if found not in audio.LAYOUT_OF_COUNT:
        reads += [lambda: audio.decode(path), lambda: sounds.SoundFolder([clip], "x").load_sample(0)]
    if wanted == 2:
        reads.append(lambda: seld.load_sample(0))
    for read in reads:
        with pytest.raises(AudioError, match="`(audio-llm|ffmpeg|--hearing) ") as caught:
            read()
        assert "audio." not in str(caught.value).replace("audio.layout", "")


@pytest.mark.parametrize(
    ("layouts", "hearing", "words"),
    [
        (("binaural",), "left", "a model of mono, found one that hears binaural. Leave it out"),
        (("foa",), "duplicate", "a model of binaural or stereo, found one that hears foa"),
        (("mono",), "rigth", "did you mean 'right'"),
        (None, "each", "one of refuse, left, right, mean, omni, duplicate, found 'each'"),
    ],
)
def test_a_hearing_that_would_never_be_done_is_refused(
    layouts: tuple[str, ...] | None, hearing: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        audio.hear(noise("mono"), layouts, hearing)
