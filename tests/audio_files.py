"""Sound files of every format, with the defects that real ones have: for the tests of audio_llm.containers."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import soundfile

FORMATS = {
    "wav 16": ("WAV", "PCM_16"),
    "wav 24": ("WAV", "PCM_24"),
    "wav float": ("WAV", "FLOAT"),
    "wav 8": ("WAV", "PCM_U8"),
    "wav ulaw": ("WAV", "ULAW"),
    "wavex 16": ("WAVEX", "PCM_16"),
    "rf64 16": ("RF64", "PCM_16"),
    "rf64 24": ("RF64", "PCM_24"),
    "w64 16": ("W64", "PCM_16"),
    "w64 float": ("W64", "FLOAT"),
    "au 16": ("AU", "PCM_16"),
    "au float": ("AU", "FLOAT"),
    "aiff 16": ("AIFF", "PCM_16"),
    "aiff 24": ("AIFF", "PCM_24"),
    "aiff float": ("AIFF", "FLOAT"),
    "caf 16": ("CAF", "PCM_16"),
    "caf float": ("CAF", "FLOAT"),
    "flac 16": ("FLAC", "PCM_16"),
    "flac 24": ("FLAC", "PCM_24"),
    "ogg vorbis": ("OGG", "VORBIS"),
    "ogg opus": ("OGG", "OPUS"),
    "mp3 constant": ("MP3", "MPEG_LAYER_III"),
    "mp3 variable": ("MP3", "MPEG_LAYER_III"),
}
LOSSY = ("ogg", "mp3")
RATES = (8000, 16000, 22050, 24000, 44100, 48000)
UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFF00)
LIST = b"LIST" + struct.pack("<I", 40) + b"INFOICMT" + struct.pack("<I", 28) + b"Recorded at 10:00 by a box.\0"
ID3 = b"ID3\x03\0\0" + bytes([0, 0, 9, 0]) + bytes(range(256)) * 4 + bytes(128)  # artwork that looks like anything
ID3V1 = b"TAG" + bytes(125)
MUST_HEAR, MUST_REFUSE, EITHER = "heard", "refused", "either"


@dataclass(frozen=True)
class File:
    """A file and what it holds: `samples` per channel, `content` (time, channels) where that is exact."""

    name: str
    data: bytes
    samples: int
    channels: int
    outcome: str
    content: np.ndarray | None = None


def written(samples: np.ndarray, rate: int, kind: str) -> bytes:
    """A whole file of `kind`, by libsndfile."""
    buffer = io.BytesIO()
    format, subtype = FORMATS[kind]
    options = {"bitrate_mode": "VARIABLE" if "variable" in kind else "CONSTANT"} if format == "MP3" else {}
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype, **options)
    return buffer.getvalue()


def noise(rng: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Loud, then soft: an encoder of variable rate spends very different numbers of bits."""
    level = np.where(np.arange(count) < count // 3, 0.4, 1e-3)[:, None]
    return (rng.uniform(-1, 1, (count, channels)) * level).astype(np.float32)


# ------------------------------------------------------------------------------------------------ MPEG, counted apart


@cache
def _length(head: bytes) -> tuple[int, int]:
    """(bytes, samples) of a Layer III frame, by ISO 11172-3 and 13818-3."""
    first = head[1] >> 3 & 3 == 3
    table = (
        "0 32 40 48 56 64 80 96 112 128 160 192 224 256 320"
        if first
        else "0 8 16 24 32 40 48 56 64 80 96 112 128 144 160"
    )
    rate = ((11025, 12000, 8000), (), (22050, 24000, 16000), (44100, 48000, 32000))[head[1] >> 3 & 3][head[2] >> 2 & 3]
    kbits = int(table.split()[head[2] >> 4])
    return (144000 if first else 72000) * kbits // rate + (head[2] >> 1 & 1), 1152 if first else 576


def mpeg_frames(data: bytes) -> list[tuple[int, int, int]]:
    """(start, bytes, samples) of every frame of a clean MP3 file; the Info frame is the first."""
    found, position = [], 0
    while position < len(data):
        assert data[position] == 0xFF
        size, samples = _length(data[position : position + 4])
        found.append((position, size, samples))
        position += size
    return found


def has_info(data: bytes) -> bool:
    return b"Xing" in data[:64] or b"Info" in data[:64]


# ------------------------------------------------------------------------------------------------ defects


def _common(data: bytes, other: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes, str, float]]:
    """(defect, file, outcome, how many times the samples) for any format."""
    cut = int(rng.integers(1, len(data)))
    yield "whole", data, MUST_HEAR, 1
    yield "ID3 before", ID3 + data, MUST_HEAR, 1
    yield "ID3 twice before", ID3 + ID3 + data, MUST_HEAR, 1
    yield "ID3v1 behind", data + ID3V1, MUST_HEAR, 1
    yield f"cut to {cut} of {len(data)} bytes", data[:cut], MUST_REFUSE, 1
    yield "cut by one byte", data[:-1], MUST_REFUSE, 1
    yield "cut by a third", data[: len(data) * 2 // 3], MUST_REFUSE, 1
    yield "ID3 before, cut", ID3 + data[: len(data) // 2], MUST_REFUSE, 1
    yield "twice", data + data, EITHER, 2
    yield "another behind", data + other, EITHER, 1.5
    yield "bytes behind", data + rng.bytes(5000), EITHER, 1
    yield "damaged", _hole(data, rng), EITHER, 1


def _hole(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data) // 2, len(data) - 8))
    return data[:at] + data[at + 8 :]


def _chunk_defects(kind: str, data: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes, str, float]]:
    if kind.startswith("wav"):
        at = data.index(b"data") + 4
        start, size = at + 4, struct.unpack("<I", data[at : at + 4])[0]
        for unknown in UNKNOWN_SIZES:
            for behind in (b"", LIST, LIST + LIST):
                sizes = struct.pack("<I", unknown)
                yield (
                    f"size {unknown:#x}, {len(behind)} bytes behind",
                    data[:4] + b"\xff" * 4 + data[8:at] + sizes + data[start : start + size] + behind,
                    EITHER if unknown == 0 and size % 2 and behind else MUST_HEAR,
                    1,
                )
        for behind in (b"", LIST):
            yield f"empty, {len(behind)} bytes behind", data[:at] + bytes(4) + behind, MUST_REFUSE, 0
        yield "chunks behind", data[: start + size] + bytes(size & 1) + LIST, MUST_HEAR, 1
        half = struct.pack("<I", size // 2 // 12 * 12)
        yield "half the size", data[:at] + half + data[start:], EITHER, 1
        yield "size too large", data[:at] + struct.pack("<I", size + 4000) + data[start:], MUST_REFUSE, 1
    if kind.startswith("rf64"):
        at = data.index(b"ds64") + 16
        yield "size unknown", data[:at] + b"\xff" * 8 + data[at + 8 :], MUST_HEAR, 1
        yield "size too large", data[:at] + struct.pack("<Q", 2**40) + data[at + 8 :], MUST_REFUSE, 1
    if kind.startswith("w64"):
        at = data.index(b"data" + bytes.fromhex("f3acd311")) + 16
        yield "size unknown", data[:at] + b"\xff" * 8 + data[at + 8 :], MUST_HEAR, 1
        yield "size too large", data[:at] + struct.pack("<Q", 2**40) + data[at + 8 :], MUST_REFUSE, 1
    if kind.startswith("au"):
        yield "size unknown", data[:8] + b"\xff" * 4 + data[12:], MUST_HEAR, 1
        yield "size 0", data[:8] + bytes(4) + data[12:], MUST_HEAR, 1
        yield "size too large", data[:8] + struct.pack(">I", 2**30) + data[12:], MUST_REFUSE, 1
    if kind.startswith("aiff"):
        at, comm = data.index(b"SSND") + 4, data.index(b"COMM") + 10
        for count in (0, 0xFFFFFFFF):
            piped = data[:4] + b"\x7f\xff\xff\xff" + data[8:comm] + struct.pack(">I", count) + data[comm + 4 : at]
            yield f"sizes unknown, COMM {count}", piped + b"\x7f\xff\xff\xff" + data[at + 4 :], MUST_HEAR, 1
        few = data[:comm] + struct.pack(">I", 20) + data[comm + 4 :]
        yield "COMM too small", few, MUST_REFUSE, 1
        yield "COMM too large", data[:comm] + struct.pack(">I", 10**9) + data[comm + 4 :], MUST_REFUSE, 1
    if kind.startswith("caf"):
        at = data.index(b"data") + 4
        yield "size unknown", data[:at] + b"\xff" * 8 + data[at + 8 :], MUST_HEAR, 1
        yield "size too large", data[:at] + struct.pack(">q", 2**50) + data[at + 8 :], MUST_REFUSE, 1


def flac_total(data: bytes, total: int) -> bytes:
    """`data` with another number of samples in its STREAMINFO; 0 is "unknown", as it is written to a pipe."""
    return data[:21] + bytes([data[21] & 0xF0 | total >> 32]) + struct.pack(">I", total & 0xFFFFFFFF) + data[26:]


def _stream_defects(
    kind: str, data: bytes, other: bytes, samples: int, rng: np.random.Generator
) -> Iterator[tuple[str, bytes, str, float]]:
    if kind.startswith("flac"):
        for total in (0, 17, samples - 1, samples + 1, 2**36 - 1):
            outcome = MUST_REFUSE if total > samples else MUST_HEAR
            yield f"STREAMINFO says {total}", flac_total(data, total), outcome, 1
        yield "unknown, cut", flac_total(data, 0)[: len(data) * 3 // 4], MUST_REFUSE, 1
        yield "twice", data + data, MUST_HEAR, 2
        yield "unknown, twice", flac_total(data, 0) + flac_total(data, 0), MUST_HEAR, 2
        yield "another behind", data + other, MUST_HEAR, 1.5
    if kind.startswith("ogg"):
        starts = [0]
        while (at := data.find(b"OggS", starts[-1] + 4)) >= 0:
            starts.append(at)
        yield "twice", data + data, MUST_HEAR, 2
        yield "another behind", data + other, MUST_HEAR, 1.5
        yield "another behind, cut", data + other[: len(other) // 2], MUST_REFUSE, 1.5
        yield "its last page gone", data[: starts[-1]], MUST_REFUSE, 1
        if len(starts) > 3:
            yield "a page gone", data[: starts[-2]] + data[starts[-1] :], MUST_REFUSE, 1
    if kind.startswith("mp3"):
        frames = mpeg_frames(data)
        first = 1 if has_info(data) else 0
        bare = data[frames[first][0] :]
        told = sum(count for _, _, count in frames[first:]) / samples
        yield "no Info frame", bare, MUST_HEAR, told
        yield "ID3 before, no Info frame", ID3 + bare + ID3V1, MUST_HEAR, told
        yield "zeros before and behind", bytes(300) + bare + bytes(700), MUST_HEAR, told
        yield "half a frame behind", bare + data[frames[-1][0] :][: frames[-1][1] // 2], MUST_REFUSE, told
        yield "twice", data + data, MUST_HEAR, 2
        yield "twice, tags between", data + ID3V1 + ID3 + data, MUST_HEAR, 2
        yield "another behind", data + other, MUST_HEAR, 1.5
        if first:
            at = max(data.find(b"Xing"), data.find(b"Info")) + 8
            for count in (1, len(frames) + 9, 0xFFFFFFFF):
                wrong = data[:at] + struct.pack(">I", count) + data[at + 4 :]
                yield (
                    f"Info says {count} frames",
                    wrong,
                    MUST_REFUSE if count > 1 else MUST_HEAR,
                    told if count == 1 else 1,
                )


def files(kind: str, seed: int) -> Iterator[File]:
    """Every defect of one file of `kind`; rate, channels and length are drawn by `seed`."""
    rng = np.random.default_rng([seed, list(FORMATS).index(kind)])
    rate = int(rng.choice([rate for rate in RATES if kind != "ogg opus" or rate in (8000, 16000, 24000, 48000)]))
    channels = int(rng.choice([1, 2] if kind.startswith(LOSSY) else [1, 2, 4]))
    count = 2 * int(rate * rng.uniform(0.05, 0.6))
    samples = noise(rng, count, channels)
    data, other = written(samples, rate, kind), written(samples[: count // 2], rate, kind)
    told = count
    if kind.startswith("mp3") and not has_info(data):  # the encoder's padding is heard, for nobody tells its length
        told = sum(samples for _, _, samples in mpeg_frames(data))
        other = data
    content = None
    if not kind.startswith(LOSSY):
        content, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    seen = {}
    for defects in (
        _common(data, other, rng),
        _chunk_defects(kind, data, rng),
        _stream_defects(kind, data, other, told, rng),
    ):
        for defect, changed, outcome, times in defects:
            seen[defect] = (changed, outcome, times)  # what a format says itself of a common defect counts
    for defect, (changed, outcome, times) in seen.items():
        if times == 1.5 and other is data:
            times = 2
        exact = content if times == 1 else None
        name = f"{kind}, {rate} Hz, {channels} channel(s), {count} samples, {defect}"
        yield File(name, changed, round(told * times), channels, outcome, exact)
