"""Every sample of a file or an error that names the cause; never a part. Headers and decoder agree."""

from __future__ import annotations

import io
import resource
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_llm import audio
from audio_llm.errors import AudioError
from tests import audio_files
from tests.audio_files import EITHER, FORMATS, MUST_HEAR, MUST_REFUSE, File


def check(file: File, folder: Path) -> str:
    """What became of a file: heard or refused; fails for a part of it, and where header and decoder differ."""
    path = folder / "sound.bin"
    path.write_bytes(file.data)
    outcomes = []
    for read in (audio.read_header, audio.decode):
        try:
            outcomes.append(read(path))
        except AudioError as error:
            assert str(error).startswith(f"{path}: expected "), file.name
            outcomes.append(str(error))
    header, found = outcomes
    if isinstance(found, str):
        if file.outcome != EITHER:  # only damage within a stream shows when it is decoded
            assert isinstance(header, str) or header.frames < audio.MIN_SAMPLES, (file.name, header, found)
        assert file.outcome != MUST_HEAR, f"{file.name}: {found}"
        return "refused"
    assert file.outcome != MUST_REFUSE, f"{file.name}: {found.samples.shape}"
    assert not isinstance(header, str), f"{file.name}: {header}"
    assert (header.channels, header.samplerate, header.frames) == (
        found.num_channels,
        found.sample_rate,
        found.num_samples,
    ), file.name
    assert found.samples.shape == (file.channels, file.samples), file.name
    if file.content is not None:
        np.testing.assert_allclose(found.samples, file.content.T, atol=1e-7, err_msg=file.name)
    return "heard"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_sample_or_an_error(kind: str, tmp_path: Path) -> None:
    files = list(audio_files.files(kind, seed=0))
    assert len(files) >= 12
    outcomes = [check(file, tmp_path) for file in files]
    assert {"heard", "refused"} <= set(outcomes)


@pytest.mark.slow
def test_every_sample_or_an_error_over_the_matrix(tmp_path: Path) -> None:
    """Thousands of files: nothing hangs, and memory stays that of one file."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count, longest = 0, 0.0
    for seed in range(1, 7):
        for kind in FORMATS:
            for file in audio_files.files(kind, seed):
                started = time.perf_counter()
                check(file, tmp_path)
                longest = max(longest, time.perf_counter() - started)
                count += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{count} files, the longest {longest:.2f} s, memory grown by {grown:.0f} MiB")
    assert count >= 2000 and longest < 5 and grown < 200


def promising() -> dict[str, bytes]:
    """Small files whose headers promise what no machine could hold."""
    tone = np.zeros((4000, 1), np.float32)
    files = {kind: audio_files.written(tone, 8000, kind) for kind in FORMATS}
    wav, au, aiff, caf, w64 = (files[kind] for kind in ("wav 16", "au 16", "aiff 16", "caf 16", "w64 16"))
    comm = aiff.index(b"COMM") + 8
    mp3 = audio_files.written(np.zeros((40000, 1), np.float32), 44100, "mp3 constant")
    info = max(mp3.find(b"Xing"), mp3.find(b"Info")) + 8
    sphere = b"NIST_1A\n   1024\nsample_count -i %d\nsample_rate -i 8000\nend_head\n" % 10**18
    return {
        "flac total": audio_files.flac_total(files["flac 16"], 2**36 - 1),
        "wav channels": wav[:22] + b"\xff\xff" + wav[24:],
        "wav size": wav[: wav.index(b"data") + 4] + struct.pack("<I", 2**30) + bytes(100),
        "wav chunk": b"RIFF\xff\xff\xff\xffWAVEJUNK" + struct.pack("<I", 2**30) + bytes(100),
        "au channels": au[:20] + struct.pack(">I", 2**31) + au[24:],
        "aiff frames": aiff[: comm + 2] + b"\x3f\xff\xff\xff" + aiff[comm + 6 :],
        "caf size": caf[: caf.index(b"data") + 4] + struct.pack(">q", 2**60) + bytes(100),
        "w64 size": w64[:56] + struct.pack("<Q", 2**60) + w64[64:],
        "mp3 frames": mp3[:info] + b"\xff" * 4 + mp3[info + 4 :],
        "id3 size": b"ID3\3\0\0\x7f\x7f\x7f\x7f" + bytes(100),
        "sphere": sphere.ljust(1024) + bytes(100),
        "ogg granule": files["ogg vorbis"][:-2000],
    }


@pytest.mark.parametrize("case", promising())
def test_no_allocation_follows_a_header(case: str, tmp_path: Path) -> None:
    data = promising()[case]
    (tmp_path / "sound").write_bytes(data)
    for read in (audio.decode, audio.read_header):
        tracemalloc.start()
        with pytest.raises(AudioError):
            read(tmp_path / "sound")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**21


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(655350, 8, 5.0), (655350, 4, 45.0)])
def test_bytes_are_bounded_as_seconds_are(rate: int, channels: int, seconds: float, tmp_path: Path) -> None:
    """A small file of a constant that is hundreds of megabytes when decoded: refused before anything is read."""
    buffer = io.BytesIO()
    block = np.zeros((2**18, channels), np.int16)
    with soundfile.SoundFile(buffer, "w", rate, channels, format="FLAC") as file:
        for _ in range(int(seconds * rate) // len(block) + 1):
            file.write(block)
    data = buffer.getvalue()
    assert len(data) < 2**21
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AudioError, match="at most 439 MiB of decoded samples|8 channels"):
        audio.decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started < 50 * 1024


def test_a_limit_of_bytes_is_the_callers() -> None:
    data = audio.encode(audio.Waveform(np.zeros((2, 16000), np.float32), 16000, "stereo"))
    assert audio.decode(data, max_bytes=128000).num_samples == 16000
    with pytest.raises(AudioError, match="decoded samples, found 0 MiB"):
        audio.decode(data, max_bytes=127999)


@pytest.mark.parametrize("coding", ["pcm", "pcm,embedded-shorten-v2.00"])
def test_sphere_files_are_read_or_named(coding: str, tmp_path: Path) -> None:
    """TIMIT's format, named .WAV there."""
    pcm = np.arange(-2000, 2000, dtype="<i2")
    fields = ("sample_count -i 4000", "sample_rate -i 16000", "channel_count -i 1", "sample_n_bytes -i 2")
    order, kind = "sample_byte_format -s2 01", f"sample_coding -s{len(coding)} {coding}"
    head = "\n".join(["NIST_1A", "   1024", *fields, order, kind, "end_head", ""]).encode().ljust(1024)
    if coding == "pcm":
        np.testing.assert_array_equal(audio.decode(head + pcm.tobytes()).samples[0] * 32768, pcm)
        with pytest.raises(AudioError, match="cut short"):
            audio.decode(head + pcm.tobytes()[:-2])
    else:
        with pytest.raises(AudioError, match="without compression"):
            audio.decode(head + pcm.tobytes())


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"\0\0\0\x20ftypM4A ", "MPEG-4"),
        (b"\x1aE\xdf\xa3", "WebM"),
        (b"\xff\xf1\x50\x80", "AAC"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\0\5\x16\7\0\2\0\0", "resource fork"),
        (b"PK\3\4", "zip"),
        (b"RIFF\x10\0\0\0AVI ", "are not"),
    ],
)
def test_what_is_no_sound_file_is_named(head: bytes, named: str) -> None:
    with pytest.raises(AudioError, match=named):
        audio.decode(head + bytes(2000), name="clip")
