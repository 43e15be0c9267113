"""What every container reader gives: links, each with the number of samples that it really holds."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from audio_llm.errors import AudioError, describe

Buffer = bytes | mmap.mmap
# Sizes that programs write when they do not know them (a pipe): 0, -1, and what SoX, ALSA and others put near 2^31.
_UNKNOWN = ((0, 0), (0x7FFFE000, 0x80001000), (0xFFFFE000, 0xFFFFFFFF), (2**63 - 2**16, 2**64 - 1))


@dataclass(frozen=True)
class Link:
    """One stream of samples in a file. A decoder is given :meth:`content` and must give `frames` samples back.

    `frames` counts samples per channel; it, `channels` and `sample_rate` (Hz) are None where only the decoder knows.
    `pcm16` says that the content after `head` is plain little-endian 16-bit PCM. `last` is a small stream of its own
    that decodes to so many samples if the end of this one is whole. `zeros` bytes behind the ranges let a decoder that
    guesses a length by the file's size guess enough.
    """

    data: Buffer
    ranges: tuple[tuple[int, int], ...]
    head: bytes = b""
    channels: int | None = None
    sample_rate: int | None = None
    frames: int | None = None
    pcm16: bool = False
    last: tuple[bytes, int] | None = None
    zeros: int = 0

    def content(self) -> bytes:
        """A file that holds this link alone, its sizes put right and tags left out."""
        if not self.head and not self.zeros and self.ranges == ((0, len(self.data)),) and isinstance(self.data, bytes):
            return self.data
        return b"".join([self.head, *(self.data[start:end] for start, end in self.ranges), bytes(self.zeros)])

    def frames16(self, count: int) -> np.ndarray:
        """The first `count` samples ``(time, channels)`` int16 of a link that is ``pcm16``, where they lie."""
        channels = self.channels or 1
        return np.frombuffer(self.data, "<i2", count * channels, self.ranges[0][0]).reshape(count, channels)


def unknown(size: int) -> bool:
    """Whether a size in a header is one that means "unknown"."""
    return any(low <= size <= high for low, high in _UNKNOWN)


def cut(name: str, expected: str, found: str) -> AudioError:
    return AudioError(describe(name, expected, f"{found}: the file is cut short"), "cut")


def broken(name: str, expected: str, found: str) -> AudioError:
    return AudioError(describe(name, expected, found, "Write it again, for instance by `ffmpeg -i IN OUT.wav`."))


def after_id3(data: Buffer, position: int, name: str) -> int:
    """The first byte behind the ID3v2 tags at `position`. Raises :class:`AudioError` where one is cut."""
    while data[position : position + 3] == b"ID3":
        head = data[position : position + 10]
        if len(head) < 10:
            raise cut(name, "a whole ID3 tag", f"{len(head)} bytes of one")
        size = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + (10 if head[5] & 0x10 else 0)
        if position + size > len(data):
            raise cut(name, f"an ID3 tag of {size} bytes", f"{len(data) - position} bytes")
        position += size
    return position
