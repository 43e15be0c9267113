"""MPEG audio (MP3): samples counted by its frames, whatever a Xing, Info or VBRI frame says of them.

Of a stream without such a frame a decoder can only guess the length by the size of the file. So a link is given an Info
frame with the right count where the file tells the encoder's delay and padding, and size enough where it does not
(ISO 11172-3, 13818-3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from audio_llm.containers.base import Buffer, Link, after_id3, broken, cut

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version: 1, 2, 2.5
_KBITS = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_DECODER_DELAY = 529  # samples of Layer III; decoders leave them out together with the encoder's


class _Frame(NamedTuple):
    length: int  # bytes; 0 for the free format, whose length no header tells
    samples: int
    version: int
    layer: int
    rate: int
    channels: int

    @property
    def form(self) -> tuple[int, ...]:
        """What may not change within a stream."""
        return self[2:]

    @property
    def side(self) -> int:
        """Bytes of header and side information, behind which a Xing or Info tag stands."""
        return 4 + ((17, 32) if self.version == 3 else (9, 17))[self.channels - 1]


@lru_cache(8192)
def _frame(head: bytes) -> _Frame | None:
    """The frame that four bytes begin; None for other bytes."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate_code, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or bitrate == 15 or rate_code == 3 or head[3] & 3 == 2:
        return None
    first = version == 3
    rate, bits = _RATES[version][rate_code], 1000 * _KBITS[first, layer][bitrate]
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    length = 4 * (12 * bits // rate + padding) if layer == 1 else samples // 8 * bits // rate + padding
    return _Frame(length if bits else 0, samples, version, layer, rate, 1 if head[3] >> 6 == 3 else 2)


def recognises(data: Buffer, start: int) -> bool:
    """Whether a frame begins at `start`, and another one behind it unless the file ends there."""
    frame = _frame(data[start : start + 4])
    if frame is None:
        return False
    following = data[start + frame.length : start + frame.length + 4]
    return frame.length == 0 or len(following) < 4 or _frame(following) is not None or not _is_sync(following)


def _is_sync(head: bytes) -> bool:
    return head[0] == 0xFF and head[1] & 0xE0 == 0xE0


@dataclass
class _Stream:
    """Frames that belong together; `promised` frames, `delay` and `padding` in samples as its first frame says."""

    frame: _Frame
    promised: int | None = None
    gaps: tuple[int, int] = (0, 0)
    count: int = 0
    longest: int = 0  # bytes of a frame
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int) -> None:
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1] = (self.ranges[-1][0], end)
        else:
            self.ranges.append((start, end))
        self.count, self.longest = self.count + 1, max(self.longest, end - start)


def links(data: Buffer, start: int, end: int, name: str) -> list[Link]:
    """One link; several where files with a Xing or Info frame each were put one behind the other."""
    streams: list[_Stream] = []
    position = start
    while position < end:
        frame = _frame(data[position : position + 4])
        if frame is None:
            position = _after_other(data, position, end, name)
            continue
        if frame.length == 0:
            raise broken(name, "frames of a stated bit rate", f"free-format MPEG at byte {position}")
        if position + frame.length > end:
            raise cut(name, f"{frame.length} bytes in the frame at byte {position}", f"{end - position}")
        if not streams or streams[-1].frame.form != frame.form:
            if streams and streams[-1].count:
                found = f"{frame.rate} Hz, {frame.channels} channel(s) from byte {position}"
                before = streams[-1].frame
                raise broken(name, f"one stream of {before.rate} Hz, {before.channels} channel(s)", found)
            streams.append(_Stream(frame))
        told = _told(data, position, frame)
        if told is None:
            streams[-1].add(position, position + frame.length)
        else:
            if streams[-1].count or streams[-1].promised is not None:
                streams.append(_Stream(frame))
            streams[-1].promised, streams[-1].gaps = told
        position += frame.length
    found_links = [_link(data, stream, name) for stream in streams if stream.count or stream.promised]
    if not found_links:
        raise broken(name, "MPEG frames", "none")
    return found_links


def _after_other(data: Buffer, position: int, end: int, name: str) -> int:
    """The byte behind a tag, or behind zeros, at `position`; `end` where nothing but other bytes follow."""
    head = data[position : position + 8]
    if head[:3] == b"ID3":
        return after_id3(data, position, name)
    if head[:3] == b"TAG" and position + 128 <= end:
        return position + 128
    if head == b"APETAGEX" and position + 32 <= end:
        size, flags = (int.from_bytes(data[position + at : position + at + 4], "little") for at in (12, 20))
        return min(end, position + 32 + (size if flags & 1 << 29 else 0))  # a header is followed by size bytes
    if head == b"LYRICSBE":
        found = data.find(b"LYRICS200", position, end)
        if found >= 0:
            return found + 9
    if head[:1] == b"\0":
        block = data[position : min(end, position + 2**16)]
        return position + len(block) - len(block.lstrip(b"\0"))
    following = data.find(b"\xff", position, end)
    while following >= 0:
        if recognises(data, following):
            raise broken(name, "an MPEG frame", f"something else at byte {position}, and frames from {following} on")
        following = data.find(b"\xff", following + 1, end)
    return end


def _told(data: Buffer, position: int, frame: _Frame) -> tuple[int, tuple[int, int]] | None:
    """(frames, (delay, padding)) by a frame that describes the stream; -1 where it does not count; None for sound."""
    if frame.layer != 3:
        return None
    end = position + frame.length
    if data[position + 36 : position + 40] == b"VBRI":
        return int.from_bytes(data[position + 50 : position + 54], "big"), (0, 0)
    protected = 0 if data[position + 1] & 1 else 2
    at = next(
        (at for at in (position + frame.side, position + frame.side + protected) if data[at : at + 4] in _INFO), None
    )
    if at is None:
        return None
    flags = int.from_bytes(data[at + 4 : at + 8], "big")
    count = int.from_bytes(data[at + 8 : at + 12], "big") if flags & 1 else -1
    at += 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if at + 24 > end or not data[at]:
        return count, (0, 0)
    packed = int.from_bytes(data[at + 21 : at + 24], "big")
    return count, (packed >> 12, packed & 0xFFF)


_INFO = (b"Xing", b"Info")


def _link(data: Buffer, stream: _Stream, name: str) -> Link:
    frame, promised = stream.frame, stream.promised
    if promised is not None and promised > stream.count:
        raise cut(name, f"{promised} MPEG frames", f"{stream.count}")
    total = stream.count * frame.samples
    delay, padding = stream.gaps if promised == stream.count else (0, 0)
    if not _DECODER_DELAY <= padding < total - delay:
        delay = padding = 0
    frames, ranges = total - delay - padding, tuple(stream.ranges)
    if delay or padding:
        return Link(data, ranges, _info(stream, delay, padding), frame.channels, frame.rate, frames)
    guess = (stream.count + 8) * (stream.longest + 1)
    zeros = max(0, guess - sum(end - start for start, end in ranges))
    return Link(data, ranges, b"", frame.channels, frame.rate, frames, zeros=zeros)


def _info(stream: _Stream, delay: int, padding: int) -> bytes:
    """An Info frame for `stream`."""
    like = stream.frame
    size = like.side + 4 + 8 + 36
    for code in range(1, 15):
        head = bytes(
            [
                0xFF,
                0xE0 | like.version << 3 | 1 << 1 | 1,
                code << 4 | _RATES[like.version].index(like.rate) << 2,
                0xC0 if like.channels == 1 else 0x00,
            ]
        )
        frame = _frame(head)
        if frame is not None and frame.length >= size:
            break
    else:  # no rate of either version has so short frames
        raise AssertionError(f"no MPEG frame of {size} bytes at {like.rate} Hz")
    tag = b"Info" + (1).to_bytes(4, "big") + stream.count.to_bytes(4, "big")
    tag += b"LAME3.100" + bytes(12) + (delay << 12 | padding).to_bytes(3, "big")
    return (head + bytes(like.side - 4) + tag).ljust(frame.length, b"\0")
