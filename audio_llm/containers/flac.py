"""FLAC: samples counted by the headers of its frames, whatever STREAMINFO says of them (RFC 9639)."""

from __future__ import annotations

from typing import NamedTuple

from audio_llm.containers.base import Buffer, Link, broken, cut

_SIZES = (0, 192, 576, 1152, 2304, 4608, 0, 0, *(256 << i for i in range(8)))
_STREAMINFO = 34  # bytes
_STARTS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")  # the marker, and STREAMINFO behind it


def _crc_table() -> bytes:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value << 1) ^ (0x107 if value & 0x80 else 0)
        table.append(value)
    return bytes(table)


_CRC8 = _crc_table()


class _Frame(NamedTuple):
    number: int  # of the frame; of its first sample where block sizes vary
    samples: int
    variable: bool
    channels: int
    length: int  # of the header, in bytes


def _frame(data: Buffer, position: int) -> _Frame | None:
    """The frame header at `position`; None where there is none with the right check sum."""
    head = data[position : position + 16]
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    size_code, rate_code, assignment = head[2] >> 4, head[2] & 15, head[3] >> 4
    if size_code == 0 or rate_code == 15 or assignment > 10:
        return None
    first = head[4]
    more = 0
    while more < 7 and first & (0x80 >> more):
        more += 1
    if more == 1 or first == 0xFF:
        return None
    more = max(0, more - 1)
    number = first if more == 0 else first & (0x3F >> more)
    for byte in head[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    at = 5 + more
    samples = _SIZES[size_code]
    if size_code in (6, 7):
        width = size_code - 5
        samples = int.from_bytes(head[at : at + width], "big") + 1
        at += width
    at += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(head):
        return None
    crc = 0
    for byte in head[:at]:
        crc = _CRC8[crc ^ byte]
    if crc != head[at]:
        return None
    return _Frame(number, samples, bool(head[1] & 1), min(assignment + 1, 2) if assignment > 7 else assignment + 1, at)


def links(data: Buffer, start: int, name: str) -> list[Link]:
    """One link, or several where files were put one behind the other."""
    found = []
    position = start
    while position < len(data):
        audio = _first_frame(data, position, name)
        another = data.find(_STARTS[0][:4], audio)  # `find` is ten times as fast as an expression
        while another >= 0 and data[another : another + 8] not in _STARTS:
            another = data.find(_STARTS[0][:4], another + 4)
        following = another if another >= 0 else len(data)
        found.append(_link(data, position, audio, following, name))
        position = following
    return found


def _first_frame(data: Buffer, start: int, name: str) -> int:
    """The byte behind the metadata blocks."""
    position, last = start + 4, False
    while not last:
        head = data[position : position + 4]
        if len(head) < 4:
            raise cut(name, "whole metadata blocks", f"{len(data)} bytes")
        last, size = bool(head[0] & 0x80), int.from_bytes(head[1:], "big")
        if position == start + 4 and (head[0] & 0x7F or size < _STREAMINFO):
            raise broken(name, "a FLAC file that begins with STREAMINFO", "another block")
        position += 4 + size
    if position > len(data):
        raise cut(name, f"metadata of {position - start} bytes", f"{len(data) - start} bytes")
    return position


def _link(data: Buffer, start: int, audio: int, end: int, name: str) -> Link:
    info = bytearray(data[start + 8 : start + 8 + _STREAMINFO])
    packed = int.from_bytes(info[10:18], "big")
    rate, channels, total = packed >> 44, (packed >> 41 & 7) + 1, packed & (2**36 - 1)
    block = int.from_bytes(info[2:4], "big")
    last = _by_the_last(data, audio, end, block, total, channels)
    counted = total
    if last is None:
        counted, last = _walk(data, audio, end, channels)
        if counted < total:
            raise cut(name, f"{total} samples per channel", f"frames that hold {counted}")
    if counted == 0 and audio < end:
        raise broken(name, "FLAC frames", f"{end - audio} bytes that are none")
    if rate == 0:
        raise broken(name, "a sample rate", "0 Hz")
    tail = None
    if counted:
        frame = _frame(data, last)
        assert frame is not None
        tail = (_head(info, frame.samples) + data[last:end], frame.samples)
    return Link(data, ((audio, end),), _head(info, counted), channels, rate, counted, last=tail)


def _head(info: bytearray, samples: int) -> bytes:
    """The marker and one block: STREAMINFO with so many samples, and nothing said of frame sizes and MD5."""
    packed = int.from_bytes(info[10:18], "big") >> 36 << 36 | min(samples, 2**36 - 1)
    return b"fLaC\x80\x00\x00\x22" + bytes(info[:4]) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)


def _by_the_last(data: Buffer, audio: int, end: int, block: int, total: int, channels: int) -> int | None:
    """Where the last frame begins, if its number says that the frames hold `total` samples; None if it does not."""
    sync, position = data[audio : audio + 2], end
    for _ in range(32):
        position = data.rfind(sync, audio, position)
        if position < 0:
            return None
        frame = _frame(data, position)
        if frame and frame.channels == channels:
            first = frame.number if frame.variable else frame.number * block
            if first + frame.samples == total:
                return position
    return None


def _walk(data: Buffer, audio: int, end: int, channels: int) -> tuple[int, int]:
    """Samples in the frames that follow one another, and where the last of them begins."""
    sync, position = data[audio : audio + 2], audio
    counted, last, expected = 0, audio, None
    while position >= 0:
        frame = _frame(data, position)
        if frame and frame.channels == channels and frame.number == (expected or frame.number):
            counted, last = counted + frame.samples, position
            expected = frame.number + (frame.samples if frame.variable else 1)
        elif counted == 0:
            break
        position = data.find(sync, position + 1, end)
    return counted, last
