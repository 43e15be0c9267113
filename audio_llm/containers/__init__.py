"""What a sound file really holds, whatever its header says: streams of samples, each counted by its own bytes.

:func:`links` is the one place that knows how many samples a file has; decoding and reading headers both ask it. A file
is whole or refused: sizes beyond its end, streams that are cut, files put one behind the other of different form and
bytes that belong to nothing raise :class:`AudioError` with the cause. No loop and no allocation follows a number in a
header; the work is bounded by the bytes that are there.
"""

from __future__ import annotations

from audio_llm.containers import chunks, flac, mpeg, ogg
from audio_llm.containers.base import Buffer, Link, after_id3
from audio_llm.errors import AudioError, describe

__all__ = ["UNGUARDED", "Buffer", "Link", "links"]

_READERS = {
    b"RIFF": chunks.riff,
    b"RIFX": chunks.riff,
    b"RF64": chunks.riff,
    b"BW64": chunks.riff,
    b"riff": chunks.wave64,
    b"FORM": chunks.aiff,
    b".snd": chunks.au,
    b"dns.": chunks.au,
    b"caff": chunks.caf,
    b"NIST": chunks.sphere,
    b"fLaC": flac.links,
    b"OggS": ogg.links,
}
# FLAC frames and Ogg pages carry checksums, which decoding compares, and MPEG is not decoded to the bit. What begins
# like this would be heard as it lies there, flipped bits and all.
UNGUARDED = (b"RIFF", b"RF64", b"RIFX", b"riff", b"FORM", b"caff", b".snd")
_SUBKINDS = {b"RIFF": b"WAVE", b"RIFX": b"WAVE", b"RF64": b"WAVE", b"BW64": b"WAVE"}

# What people take for sound files, by (offset, bytes): named, so that nobody has to guess.
_OTHERS = (
    (4, b"ftyp", "MPEG-4 (m4a, mp4)"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (0, b"\xff\xf1", "AAC (ADTS)"),
    (0, b"\xff\xf9", "AAC (ADTS)"),
    (0, b"#!AMR", "AMR"),
    (0, b"0&\xb2u", "Windows Media (asf, wma)"),
    (0, b"wvpk", "WavPack"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x00\x05\x16\x07", "the resource fork of a Mac file (._NAME)"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
)


def links(data: Buffer, name: str) -> list[Link]:
    """The streams of samples in `data`, in order; mostly one. `name` is what errors call the file.

    Raises :class:`AudioError` for files of no format in the list, and for those that do not hold what they promise.
    """
    start = after_id3(data, 0, name)
    reader = _READERS.get(data[start : start + 4])
    if reader is not None:
        kind = _SUBKINDS.get(data[start : start + 4])
        if kind is not None and data[start + 8 : start + 12] != kind:
            raise _no_audio(data, start, name)
        return reader(data, start, name)
    # MPEG has no mark at its start; zeros are what a tag was padded with.
    first = start
    if data[start : start + 1] == b"\0":
        block = data[start : start + 2**20]
        first += len(block) - len(block.lstrip(b"\0"))
    if mpeg.recognises(data, first):
        return mpeg.links(data, first, len(data), name)
    raise _no_audio(data, start, name)


def _no_audio(data: Buffer, start: int, name: str) -> AudioError:
    head = data[start : start + 64]
    what = next((text for at, mark, text in _OTHERS if head[at : at + len(mark)] == mark), None)
    cure = "Convert it, for instance by `ffmpeg -i IN OUT.flac`." if what else None
    found = what or f"{len(data)} bytes that are not"
    return AudioError(describe(name, "decodable audio (wav, flac, ogg, opus, mp3, aiff, au, caf, w64)", found, cure))
