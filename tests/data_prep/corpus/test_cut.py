"""Stretches of recordings and films: exact to the sample, whatever the file; what is wrong with one is its reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_llm import audio
from audio_llm.files import glance
from data_prep.corpus.stage import Item, Reject
from data_prep.corpus.stages.cut import NO_DECODER, Cut
from tests.audio_files import written

RATE, SECONDS = 24000, 4.0


def sound(channels: int = 2, rate: int = RATE, seconds: float = SECONDS) -> np.ndarray:
    """(time, channels) int16 of a chirp with a click each half second, other in each channel."""
    time = np.arange(int(seconds * rate)) / rate
    chirp = 0.3 * np.sin(2 * np.pi * (200 * time + 300 * time**2))
    clicks = np.zeros(len(time))
    clicks[:: rate // 2] = 0.3
    found = np.stack([np.roll(chirp, 700 * channel) + clicks for channel in range(channels)], 1)
    return np.round(32767 * found).astype(np.int16)


def film(
    path: Path, samples: np.ndarray, codec: str, rate: int = RATE, picture: bool = True, late: float = 0.0
) -> Path:
    """A film (with a picture stream) whose sound is `samples`, (time, channels) int16; it begins `late` seconds."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        layout = "stereo" if samples.shape[1] == 2 else "mono"
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if picture:
            video = container.add_stream("mpeg4", rate=10)
            video.width = video.height = 32
            for number in range(int(len(samples) / rate * 10)):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), number % 255, np.uint8), "rgb24")
                frame.pts = number
                container.mux(video.encode(frame))
            container.mux(video.encode())
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, stream.codec_context.frame_size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.reshape(1, -1)), "s16", layout)
        frame.sample_rate, frame.pts = rate, round(late * rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path


def decoded(path: Path) -> np.ndarray:
    """(time, channels) float32 of the whole sound of a film, frame by frame."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.concatenate(frames, 1).T


def result(folder: Path, path: Path, cut: Cut | None = None, **fields: Any) -> Item | Reject:
    stage = cut or Cut(min_seconds=0.01)
    stage.open(folder)
    return stage.run([Item("a", {"audio": str(path), "mark": glance(path), "name": path.name, **fields})])[0]


def clip(folder: Path, item: Item | Reject) -> np.ndarray:
    """(time, channels) integers of the clip of an item."""
    assert isinstance(item, Item), item
    return soundfile.read(folder / item.fields["audio"], dtype="int16", always_2d=True)[0]


@pytest.mark.parametrize("kind", ["wav 16", "flac 16", "mp3 variable", "ogg opus", "mp4 aac", "mkv opus", "m4a aac"])
def test_a_stretch_is_the_whole_sliced(tmp_path: Path, kind: str) -> None:
    samples = sound()
    form, codec = kind.split()
    path = tmp_path / f"x.{form}"
    if form in ("mp4", "mkv", "m4a"):
        film(path, samples, {"aac": "aac", "opus": "libopus"}[codec], picture=form != "m4a")
        whole = decoded(path)
    else:
        path.write_bytes(written(samples.astype(np.float64) / 32768, RATE, kind))
        whole = audio.decode(path).samples.T
        other = soundfile.read(path, dtype="float32", always_2d=True)[0]  # MP3's last bit hangs on how it is read
        assert whole.shape == other.shape and np.abs(whole - other).max() < 1e-6
    rate = 48000 if codec == "opus" and form == "mkv" else soundfile.info(path).samplerate if form == "ogg" else RATE
    expected = np.rint(np.clip(whole, -1, 1) * 32768).clip(-32768, 32767)
    if form in ("wav", "flac"):
        assert np.array_equal(expected, samples)
    else:  # a lossy codec, but nothing is shifted: the best match of the first second is at its own place
        assert abs(len(whole) / rate - SECONDS) < 0.1
        original = samples[:, 0].astype(float)
        if rate == RATE:
            mono = whole[: RATE // 2, 0]
            scores = [float(mono[400:-400] @ original[400 + lag : RATE // 2 - 400 + lag]) for lag in range(-300, 301)]
            assert abs(int(np.argmax(scores)) - 300) <= 1
    draw = np.random.default_rng(1)
    stage = Cut(min_seconds=0.01)
    for _ in range(20):
        start = round(float(draw.uniform(0, SECONDS - 0.5)), 3)
        end = round(start + float(draw.uniform(0.05, 0.45)), 3)
        item = result(tmp_path, path, stage, start=start, end=end)
        first, last = round(start * rate), round(end * rate)
        assert np.array_equal(clip(tmp_path, item), expected[first:last]), (start, end)
        assert isinstance(item, Item)
        assert (item.fields["start"], item.fields["end"]) == (first / rate, last / rate)
        assert item.fields["sample_rate"] == rate and item.fields["layout"] == "stereo"
    assert isinstance(whole_item := result(tmp_path, path), Item)
    assert np.array_equal(clip(tmp_path, whole_item), expected)


def test_sound_that_begins_after_its_film_is_where_the_film_has_it(tmp_path: Path) -> None:
    path = film(tmp_path / "x.mkv", sound(), "flac", late=0.75)
    item = result(tmp_path, path, start=1.0, end=1.5)
    assert np.array_equal(clip(tmp_path, item), sound()[RATE // 4 : 3 * RATE // 4])


@pytest.mark.parametrize("lost", ["packets in the middle", "the end"])
def test_a_film_of_which_sound_was_lost_is_torn_and_not_shorter(lost: str, tmp_path: Path) -> None:
    """All that follows a gap would be shifted, and a film's own length says nothing about its sound's."""
    av = pytest.importorskip("av")
    whole, path = film(tmp_path / "whole.mkv", sound(), "flac"), tmp_path / "x.mkv"
    if lost == "the end":
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    else:
        with av.open(str(whole)) as source, av.open(str(path), "w") as container:
            streams = {stream.index: container.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                sounds = packet.stream.type == "audio" and packet.pts is not None
                if packet.dts is not None and not (sounds and 0.5 < packet.pts * packet.time_base < 1.0):
                    packet.stream = streams[packet.stream.index]
                    container.mux(packet)
    reject = result(tmp_path, path)
    assert isinstance(reject, Reject) and reject.reason == "torn", reject
    assert ("a gap of" if lost != "the end" else "cut short") in reject.detail
    assert isinstance(result(tmp_path, whole), Item)


def test_equal_sounds_are_one_file_and_levels_are_kept(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sound(1)[:2000], RATE)
    soundfile.write(tmp_path / "b.flac", sound(1)[:2000], RATE)
    first, second = result(tmp_path, tmp_path / "a.wav"), result(tmp_path, tmp_path / "b.flac")
    assert isinstance(first, Item) and isinstance(second, Item)
    assert first.fields["content"] == second.fields["content"] and len(list(tmp_path.glob("clips/*/*"))) == 1
    stored = audio.decode(tmp_path / first.fields["audio"])
    assert audio.sha256(stored) == first.fields["content"]
    deep = np.round(sound(1)[:2000] / 32768 * 2**23 + 77).astype(np.int32) << 8
    soundfile.write(tmp_path / "deep.wav", deep, RATE, subtype="PCM_24")
    item = result(tmp_path, tmp_path / "deep.wav", Cut(min_seconds=0.01, subtype="PCM_24"))
    assert isinstance(item, Item)
    assert np.array_equal(soundfile.read(tmp_path / item.fields["audio"], dtype="int32", always_2d=True)[0], deep)
    as_wav = result(tmp_path, tmp_path / "deep.wav", Cut(min_seconds=0.01, subtype="PCM_24", format="wav"))
    assert isinstance(as_wav, Item) and as_wav.fields["audio"].endswith(".wav")
    assert as_wav.fields["content"] == item.fields["content"]  # so that nothing behind it is computed again
    assert np.array_equal(soundfile.read(tmp_path / as_wav.fields["audio"], dtype="int32", always_2d=True)[0], deep)


def test_a_margin_goes_as_far_as_the_recording(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sound(1), RATE)
    stage = Cut(margin=0.5)
    for start, end, first, last in ((1.0, 2.0, 0.5, 2.5), (0.2, 1.0, 0.0, 1.5), (3.0, 4.0, 2.5, 4.0)):
        item = result(tmp_path, tmp_path / "a.wav", stage, start=start, end=end)
        assert np.array_equal(clip(tmp_path, item), sound(1)[int(first * RATE) : int(last * RATE)])


def test_what_cannot_be_cut_has_its_reason(tmp_path: Path, monkeypatch) -> None:
    good = tmp_path / "good.wav"
    soundfile.write(good, sound(1), RATE)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("words and more words\n" * 50)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "loud.wav", 8.0 * sound(1) / 32768, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "five.wav", sound(5), RATE)
    whole = (tmp_path / "whole.flac").with_suffix(".flac")
    soundfile.write(whole, sound(1), RATE)
    (tmp_path / "torn.flac").write_bytes(whole.read_bytes()[:20000])
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("gone.wav", {}, "no_such_file"),
        ("empty.wav", {}, "empty_file"),
        ("text.wav", {}, "not_audio"),
        ("torn.flac", {}, "torn"),
        ("silent.wav", {}, "silent"),
        ("loud.wav", {}, "loud"),
        ("five.wav", {}, "channels"),
        ("good.wav", {"start": 1.0, "end": 1.0}, "end_before_start"),
        ("good.wav", {"start": 1.0, "end": 1.001}, "short"),
        ("good.wav", {"start": 1.0, "end": 40.0}, "long"),
        ("good.wav", {"start": 3.0, "end": 5.0}, "beyond_the_sound"),
        ("good.wav", {"start": 9.0}, "beyond_the_sound"),
        ("good.wav", {"start": -1.0, "end": 1.0}, "beyond_the_sound"),
    ]
    for name, fields, reason in cases:
        found = result(tmp_path, tmp_path / name, **fields)
        assert isinstance(found, Reject) and found.reason == reason, (name, found)
        assert found.reason in Cut.reasons and found.detail.count(":") >= 1 or reason == "end_before_start"
    long = result(tmp_path, good, Cut(max_seconds=2.0))
    assert isinstance(long, Reject) and long.reason == "long"
    monkeypatch.setattr("data_prep.corpus.films.installed", lambda: False)
    shutil.copy(good, tmp_path / "x.mp4")
    found = result(tmp_path, tmp_path / "x.mp4")
    assert isinstance(found, Reject) and found.reason == NO_DECODER and "[corpus]" in found.detail


def test_films_that_cannot_be_cut_have_their_reason(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    whole = film(tmp_path / "whole.mp4", sound(), "aac")
    (tmp_path / "torn.mp4").write_bytes(whole.read_bytes()[:-3000])  # without its table of contents
    mkv = film(tmp_path / "whole.mkv", sound(), "libopus")
    (tmp_path / "torn.mkv").write_bytes(mkv.read_bytes()[: mkv.stat().st_size // 2])
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width = video.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
        container.mux([*video.encode(frame), *video.encode()])
    (tmp_path / "empty.mp4").touch()
    for name, reasons in {
        "torn.mp4": ("not_audio",),
        "torn.mkv": ("torn", "beyond_the_sound"),
        "mute.mp4": ("not_audio",),
        "empty.mp4": ("not_audio", "empty_file"),
        "gone.mp4": ("no_such_file",),
    }.items():
        found = result(tmp_path, tmp_path / name, start=3.0, end=3.9)
        assert isinstance(found, Reject) and found.reason in reasons, (name, found)
    shutil.copy(whole, tmp_path / "misnamed.wav")
    assert isinstance(result(tmp_path, tmp_path / "misnamed.wav", start=1.0, end=2.0), Item)


def test_a_length_that_is_guessed_is_no_promise(tmp_path: Path) -> None:
    """ADTS says no length: FFmpeg takes the first frames, here of silence, for all of them, and guesses a minute."""
    samples = sound(seconds=6.0)
    samples[: 5 * RATE] = 0
    path = film(tmp_path / "x.aac", samples, "aac", picture=False)
    item = result(tmp_path, path)
    assert isinstance(item, Item) and abs(item.fields["seconds"] - 6.0) < 0.1


def test_a_damaged_sound_is_not_read_around(tmp_path: Path) -> None:
    """FFmpeg leaves out what it cannot read, and takes the length of an AVI file for what is left of it."""
    pytest.importorskip("av")
    for kind in ("flac 16", "ogg vorbis", "ogg opus", "mp3 variable"):
        data = bytearray(written(sound() / 32768, RATE, kind))
        data[len(data) // 3 : len(data) // 3 + 900] = bytes(900)
        path = tmp_path / f"x.{kind.split()[0]}"
        path.write_bytes(data)
        assert isinstance(result(tmp_path, path), Reject), kind
    whole = film(tmp_path / "whole.avi", sound(), "mp3")
    assert isinstance(result(tmp_path, whole), Item)
    (tmp_path / "torn.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    torn = result(tmp_path, tmp_path / "torn.avi")
    assert isinstance(torn, Reject) and torn.reason == "torn"
    assert isinstance(result(tmp_path, tmp_path / "torn.avi", start=0.5, end=1.0), Item)  # what is there is there
    for ending in ("flac", "ogg", "mp3", "mp4"):
        (tmp_path / f"text.{ending}").write_text("words and more words\n" * 50)
        found = result(tmp_path, tmp_path / f"text.{ending}")
        assert isinstance(found, Reject) and found.reason == "not_audio", found
        assert str(tmp_path) not in found.detail and "Errno" not in found.detail
