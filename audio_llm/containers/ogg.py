"""Ogg (RFC 3533): every page whole, with its check sum and in its order; chained streams are links of their own."""

from __future__ import annotations

import zlib

from audio_llm.containers.base import Buffer, Link, broken, cut
from audio_llm.errors import AudioError, describe

_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_FIRST, _LAST = 2, 4  # flags of a page


def links(data: Buffer, start: int, name: str) -> list[Link]:
    """One link per logical stream; of each the decoder knows the length by its last page."""
    found: list[Link] = []
    position, begun, ended, serial, number = start, start, True, b"", 0
    while data[position : position + 4] == b"OggS":
        head = data[position : position + 27]
        table = data[position + 27 : position + 27 + (head[26] if len(head) == 27 else 0)]
        end = position + 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or end > len(data):
            raise cut(name, "whole Ogg pages", f"{len(data)} bytes")
        page = head[:22] + bytes(4) + head[26:] + data[position + 27 : end]  # the check sum's own place counts as zero
        if _checksum(page) != int.from_bytes(head[22:26], "little"):
            raise AudioError(
                describe(name, "Ogg pages that match their checksums", f"a damaged one at byte {position}")
            )
        flags = head[5]
        if flags & _FIRST:
            if not ended:
                _refuse_second(data, begun, position, name)
            begun, serial, number = position, head[14:18], int.from_bytes(head[18:22], "little")
        if head[14:18] != serial or int.from_bytes(head[18:22], "little") != number:
            raise broken(name, f"page {number} of its stream", f"another one at byte {position}")
        number = (number + 1) % 2**32
        ended, position = bool(flags & _LAST), end
        if ended:
            found.append(Link(data, ((begun, position),)))
    if not ended:
        where = "something else" if position < len(data) else "the end of the file"
        raise cut(name, "a last Ogg page that is marked as the last one", f"{where} at byte {position}")
    return found


def _refuse_second(data: Buffer, begun: int, position: int, name: str) -> None:
    """Two first pages without an end between them: streams side by side, or a stream that was cut before another."""
    side_by_side = position == begun + 27 + data[begun + 26] + sum(data[begun + 27 : begun + 27 + data[begun + 26]])
    if side_by_side:
        raise broken(name, "one stream of sound", "several in one Ogg file")
    raise cut(name, "Ogg streams that end before the next begins", f"one without an end before byte {position}")


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32 by zlib's: the same polynomial with the bits of every byte reversed, nothing inverted."""
    reversed_crc = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reversed_crc:032b}"[::-1], 2)
