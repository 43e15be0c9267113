"""Files of chunks: WAV (RIFF, RIFX, RF64, BW64), Wave64, AIFF, AU, CAF and SPHERE. Samples counted by what is there.

A size that means "unknown" is read to the end of the file, but for the chunks that stand there. A size beyond the end
is a file cut short. Bytes behind the samples that are no chunks are no guess of ours: they are refused.
"""

from __future__ import annotations

import struct
from typing import Any

from audio_llm.containers.base import Buffer, Link, broken, cut, unknown
from audio_llm.containers.mpeg import links as mpeg_links
from audio_llm.errors import AudioError, describe

# What programs put behind samples.
_BEHIND = (
    *(b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"fact", b"JUNK", b"junk", b"smpl", b"inst", b"iXML", b"_PMX"),
    *(b"PEAK", b"PAD ", b"FLLR", b"acid", b"afsp", b"DISP", b"plst", b"axml", b"chna", b"levl", b"AFAn", b"umid"),
    *(b"NAME", b"AUTH", b"ANNO", b"(c) ", b"MARK", b"COMT", b"INST", b"APPL", b"MIDI", b"AESD", b"COMM", b"FVER"),
)
_PADDING = 4096  # zeros at the end of a file, up to a disk's block, are no sound
_WIDTHS = {1: 0, 3: 0, 6: 1, 7: 1}  # WAV codecs of a fixed width: PCM, float (any), A-law, µ-law
_MP3 = 0x55
_GUID = {
    b"riff": bytes.fromhex("2e91cf11a5d628db04c10000"),
    b"wave": bytes.fromhex("f3acd3118cd100c04f8edb8a"),
}
_AU_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}
_AIFC_WIDTHS = {
    **dict.fromkeys((b"NONE", b"sowt", b"twos", b"raw ", b"in24", b"in32", b"42ni", b"23ni"), 0),
    **dict.fromkeys((b"fl32", b"FL32", b"fl64", b"FL64"), 0),
    **dict.fromkeys((b"ulaw", b"ULAW", b"alaw", b"ALAW"), 1),
}


def _plausible(kind: bytes) -> bool:
    return len(kind) == 4 and all(32 <= byte < 127 for byte in kind)


def _after(data: Buffer, end: int, size: int) -> int:
    """Behind a chunk's pad byte, which writers forget at times: then the next chunk's name begins at once."""
    if not size & 1:
        return end
    forgotten = _plausible(data[end : end + 4]) and not _plausible(data[end + 1 : end + 5])
    return end if forgotten else end + 1


def _nothing(data: Buffer, start: int, end: int) -> bool:
    """No bytes, a tag, or zeros up to a disk's block."""
    rest = end - start
    if rest == 128 and data[start : start + 3] == b"TAG":
        return True
    return rest <= 0 or (rest <= _PADDING and not data[start:end].strip(b"\0"))


def _are_chunks(data: Buffer, start: int, end: int, order: str) -> bool:
    """Whether what follows the samples is chunks to the end of the file (the last one may be cut), or nothing."""
    while not _nothing(data, start, end):
        kind, size = data[start : start + 4], data[start + 4 : start + 8]
        if not _plausible(kind) or kind in (b"RIFF", b"RIFX", b"data", b"FORM", b"SSND") or len(size) < 4:
            return False
        body = start + 8 + int.from_bytes(size, "little" if order == "<" else "big")
        if body > end:
            return kind in _BEHIND
        start = _after(data, body, body - start)
    return True


def _before_chunks(data: Buffer, start: int, end: int, order: str) -> int:
    """Where samples of unknown number end: before the known chunks that reach exactly to the end of the file."""
    while True:
        for kind in _BEHIND:
            at = data.rfind(kind, start, end)
            while at >= 0 and not _reaches(data, at, end, order):
                at = data.rfind(kind, start, at)
            if at >= 0:
                end = at
                break
        else:
            return end


def _reaches(data: Buffer, at: int, end: int, order: str) -> bool:
    if at + 8 > end:
        return False
    size = struct.unpack(f"{order}I", data[at + 4 : at + 8])[0]
    exact = at + 8 + size in (end, end - (size & 1))
    listed = data[at : at + 4] == b"LIST" and data[at + 8 : at + 12] in (b"INFO", b"adtl")
    return exact or (listed and at + 8 + size > end)  # a list that is cut: no sample is missing


def _extent(data: Buffer, body: int, size: int, end: int, order: str, name: str) -> tuple[int, bool]:
    """(where the samples end, whether their size was unknown) of a chunk of samples that says `size`."""
    present = end - body
    if unknown(size) and (size == 0 or size > present):
        if size == 0 and _are_chunks(data, body, end, order):
            return body, False
        return _before_chunks(data, body, end, order), True
    if size > present:
        raise cut(name, f"{size} bytes of samples", f"{present}")
    behind = body + size
    if _are_chunks(data, behind, end, order) or (size & 1 and _are_chunks(data, behind + 1, end, order)):
        return behind, False
    what = data[behind + (size & 1) : behind + (size & 1) + 4]
    if what in (b"RIFF", b"RIFX", b"FORM"):
        found = f"another file behind them, at byte {behind}"
    elif what in (b"data", b"SSND"):
        found = f"a second chunk of them at byte {behind}"
    else:
        found = f"{end - behind} more that are no chunks"
    raise broken(name, f"{size} bytes of samples", found)


def _counted(size: int, frame: int, open_end: bool, name: str) -> int:
    """Samples per channel in `size` bytes. With an unknown size half a sample at the end is a stream cut short."""
    left = size % frame
    if open_end and left > (size & 1 and left == 1):  # one byte may be the padding of an odd size
        raise cut(name, f"whole samples of {frame} bytes", f"{left} bytes of the last one")
    return size // frame


# ------------------------------------------------------------------------------------------------ WAV


def riff(data: Buffer, start: int, name: str) -> list[Link]:
    """WAV of 32-bit sizes, or of 64-bit ones (RF64, BW64)."""
    order = ">" if data[start : start + 4] == b"RIFX" else "<"
    position, end = start + 12, len(data)
    form, large = None, None
    while position + 8 <= end:
        kind = data[position : position + 4]
        size = struct.unpack(f"{order}I", data[position + 4 : position + 8])[0]
        body = position + 8
        if kind == b"data":
            if large is not None and size == 0xFFFFFFFF:
                size = large
            stop, open_end = _extent(data, body, size, end, order, name)
            as_it_is = start == 0 and not open_end and data[:4] in (b"RIFF", b"RIFX")
            return _wave(data, form, (body, stop), order, open_end, as_it_is, name)
        if not _plausible(kind):
            raise broken(name, f"a chunk at byte {position}", "none")
        if body + size > end:
            raise cut(name, f"a chunk of {size} bytes", f"{end - body}")
        if kind == b"ds64" and size >= 16:
            large = struct.unpack("<Q", data[body + 8 : body + 16])[0]
        if kind == b"fmt ":
            form = data[body : body + min(size, 64)]
        position = _after(data, body + size, size)
    raise cut(name, "decodable audio: a WAV file with a chunk of samples", "none")


def wave64(data: Buffer, start: int, name: str) -> list[Link]:
    """Sony Wave64: names of 16 bytes, sizes of 64 bits that count the names in, everything on multiples of 8."""
    position, end, form = start + 40, len(data), None
    while position + 24 <= end:
        kind, guid = data[position : position + 4], data[position + 4 : position + 16]
        size = struct.unpack("<Q", data[position + 16 : position + 24])[0]
        if guid != _GUID[b"wave"]:
            raise broken(name, f"a Wave64 chunk at byte {position}", "none")
        if kind == b"data":
            body, open_end = position + 24, unknown(size)
            stop = end if open_end else position + size
            if stop > end or (size < 24 and not open_end):
                raise cut(name, f"{size} bytes of samples", f"{end - position}")
            behind = start + (stop - start + 7) // 8 * 8
            if data[behind + 4 : behind + 16] != _GUID[b"wave"] and not _nothing(data, stop, end):
                raise broken(name, f"{size - 24} bytes of samples", f"{end - stop} more that are no chunk")
            return _wave(data, form, (body, stop), "<", open_end, False, name)
        if size < 24 or position + size > end:
            raise cut(name, f"a chunk of {size} bytes", f"{end - position}")
        if kind == b"fmt ":
            form = data[position + 24 : position + min(size, 88)]
        position += (size + 7) // 8 * 8
    raise cut(name, "a Wave64 file with a chunk of samples", "none")


def _wave(
    data: Buffer, form: bytes | None, where: tuple[int, int], order: str, open_end: bool, as_it_is: bool, name: str
) -> list[Link]:
    """The link of the samples at `where`, in the form of a ``fmt`` chunk."""
    if form is None or len(form) < 16:
        raise broken(name, "a WAV file with a fmt chunk before its samples", "none")
    tag, channels, rate, _, frame, bits = struct.unpack(f"{order}HHIIHH", form[:16])
    if tag == 0xFFFE and len(form) >= 26:  # WAVE_FORMAT_EXTENSIBLE
        tag = struct.unpack(f"{order}H", form[24:26])[0]
    if not channels or not rate or not frame:
        raise broken(name, "a WAV file with channels and a rate", f"{channels} channels at {rate} Hz")
    size = where[1] - where[0]
    if tag == _MP3:
        return mpeg_links(data, *where, name)
    frames = None
    if tag in _WIDTHS:
        width = frame // channels
        if frame % channels or 8 * width < bits or (_WIDTHS[tag] or width) != width:
            found = f"{channels} channel(s) of {bits} bits in {frame} bytes"
            raise broken(name, "a fmt chunk that agrees with itself", found)
        frames = _counted(size, frame, open_end, name)
    elif open_end and size % frame:
        raise cut(name, f"whole blocks of {frame} bytes", f"{size % frame} bytes of the last one")
    pcm16 = tag == 1 and bits == 16 and frame == 2 * channels and order == "<"
    if as_it_is and frames is None:
        return [Link(data, ((0, len(data)),), b"", channels, rate, frames)]
    head = b""
    if not pcm16:
        sizes = (min(length, 0xFFFFFFFF) for length in (20 + len(form) + size, len(form), size))
        total, form_size, data_size = (struct.pack(f"{order}I", length) for length in sizes)
        head = b"".join([b"RIFX" if order == ">" else b"RIFF", total, b"WAVEfmt ", form_size, form, b"data", data_size])
    return [Link(data, (where,), head, channels, rate, frames, pcm16)]


# ------------------------------------------------------------------------------------------------ the others


def au(data: Buffer, start: int, name: str) -> list[Link]:
    """Sun and NeXT AU, of either byte order."""
    order = ">" if data[start : start + 4] == b".snd" else "<"
    if start + 24 > len(data):
        raise cut(name, "an AU header of 24 bytes", f"{len(data) - start}")
    offset, size, code, rate, channels = struct.unpack(f"{order}5I", data[start + 4 : start + 24])
    body, end = start + offset, len(data)
    if offset < 24 or body > end:
        raise cut(name, f"samples from byte {body} on", f"{end} bytes")
    if not channels or not rate:
        raise broken(name, "an AU file with channels and a rate", f"{channels} channels at {rate} Hz")
    open_end = unknown(size) and (size == 0 or size > end - body)
    stop = end if open_end else body + size
    if stop > end:
        raise cut(name, f"{size} bytes of samples", f"{end - body}")
    if not _nothing(data, stop, end):
        raise broken(name, f"{size} bytes of samples", f"{end - stop} more")
    frames = None
    if code in _AU_WIDTHS:
        frames = _counted(stop - body, _AU_WIDTHS[code] * channels, open_end, name)
    head = data[start : start + 4] + struct.pack(f"{order}5I", 24, min(stop - body, 0xFFFFFFFE), code, rate, channels)
    return [Link(data, ((body, stop),), head, channels, rate, frames)]


def aiff(data: Buffer, start: int, name: str) -> list[Link]:
    """AIFF and AIFF-C: the number in COMM and the size of SSND have to agree."""
    promised, end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "big"), len(data)
    if data[start + 8 : start + 12] not in (b"AIFF", b"AIFC"):
        raise AudioError(describe(name, "AIFF or AIFF-C", f"an IFF file of kind {data[start + 8 : start + 12]!r}"))
    if promised > end and not unknown(promised - start - 8):
        raise cut(name, f"{promised} bytes", f"{end}")
    common, where, open_end = None, None, False
    position = start + 12
    while position + 8 <= end and not _nothing(data, position, end):
        kind, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "big")
        body = position + 8
        if kind == b"SSND":
            stop, open_end = _extent(data, body, size, end, ">", name)
            size, where = stop - body, (body + 8 + int.from_bytes(data[body : body + 4], "big"), stop)
        elif not _plausible(kind):
            raise broken(name, f"a chunk at byte {position}", "none")
        if body + size > end:
            if kind in _BEHIND and common is not None and where is not None:
                break
            raise cut(name, f"a chunk of {size} bytes", f"{end - body}")
        if kind == b"COMM":
            common = data[body : body + size]
        position = _after(data, body + size, size)
    if common is None or len(common) < 18 or where is None or where[0] > where[1]:
        raise cut(name, "an AIFF file with the chunks COMM and SSND", "none")
    channels, frames, bits = struct.unpack(">HIH", common[:8])
    if not channels:
        raise broken(name, "an AIFF file with channels", "0 channels")
    codec = common[18:22] if data[start + 8 : start + 12] == b"AIFC" else b"NONE"
    size = where[1] - where[0]
    if codec in _AIFC_WIDTHS:
        held = _counted(size, (_AIFC_WIDTHS[codec] or -(-bits // 8) or 1) * channels, open_end, name)
        if not (open_end and (unknown(frames) or frames == 0)) and frames != held:
            if frames > held:
                raise cut(name, f"{frames} samples per channel", f"{held}")
            raise broken(name, f"{frames} samples per channel, as COMM says", f"{held} in SSND")
        return [_aiff_link(data, data[start + 8 : start + 12], common, where, held)]
    if start or open_end:
        raise broken(name, "an AIFF-C file of known sizes", f"codec {codec!r} behind a tag or written to a pipe")
    return [Link(data, ((0, end),))]


def _aiff_link(data: Buffer, kind: bytes, common: bytes, where: tuple[int, int], frames: int) -> Link:
    channels, size = int.from_bytes(common[:2], "big"), where[1] - where[0]
    common = common[:2] + min(frames, 0xFFFFFFFF).to_bytes(4, "big") + common[6:]
    common_chunk = b"COMM" + len(common).to_bytes(4, "big") + common + bytes(len(common) & 1)
    version = b"FVER\0\0\0\4\xa2\x80\x51\x40" if kind == b"AIFC" else b""
    samples = b"SSND" + min(size + 8, 0xFFFFFFFF).to_bytes(4, "big") + bytes(8)
    body = kind + version + common_chunk + samples
    head = b"FORM" + min(len(body) + size, 0xFFFFFFFF).to_bytes(4, "big") + body
    return Link(data, (where,), head, channels, _extended(common[8:18]), frames)


def _extended(number: bytes) -> int:
    """The whole part of an 80-bit float of AIFF; 0 for what is no sample rate."""
    exponent, mantissa = int.from_bytes(number[:2], "big") - 16383, int.from_bytes(number[2:], "big")
    return mantissa >> (63 - exponent) if 0 <= exponent < 31 else 0


def caf(data: Buffer, start: int, name: str) -> list[Link]:
    """Apple's Core Audio Format. Packets of varying size are counted by the decoder."""
    position, end, form = start + 8, len(data), b""
    while position + 12 <= end:
        kind, size = data[position : position + 4], struct.unpack(">q", data[position + 4 : position + 12])[0]
        body = position + 12
        if kind == b"data":
            open_end = size < 0 or (size == 0 and body + 4 < end)
            stop = end if open_end else body + size
            if stop > end or stop < body + 4:
                raise cut(name, f"{size} bytes of samples", f"{end - body}")
            return [_caf_link(data, form, start, (body, stop), open_end, name)]
        if not _plausible(kind):
            raise broken(name, f"a chunk at byte {position}", "none")
        if size < 0 or body + size > end:
            raise cut(name, f"a chunk of {size} bytes", f"{end - body}")
        if kind == b"desc":
            form = data[body : body + min(size, 32)]
        position = body + size
    raise cut(name, "a CAF file with a chunk of samples", "none")


def _caf_link(data: Buffer, form: bytes, start: int, where: tuple[int, int], open_end: bool, name: str) -> Link:
    body, stop = where
    if len(form) < 32:
        raise broken(name, "a CAF file with a desc chunk before its samples", "none")
    rate, codec, _, packet, per_packet, channels, _ = struct.unpack(">d4s5I", form)
    frames = None
    if codec in (b"lpcm", b"ulaw", b"alaw") and packet and per_packet == 1 and 0 < rate < 2**31 and channels:
        frames = _counted(stop - body - 4, packet, open_end, name)
        if not _caf_chunks(data, stop):
            raise broken(name, f"{stop - body - 4} bytes of samples", f"{len(data) - stop} more that are no chunk")
        head = data[start : body - 12] + b"data" + (stop - body).to_bytes(8, "big")
        return Link(data, (where,), head, channels, int(rate), frames)
    if open_end or not _caf_chunks(data, stop):
        raise broken(name, "a CAF file of known sizes", f"codec {codec!r} with an unknown one")
    return Link(data, ((start, len(data)),))


def _caf_chunks(data: Buffer, start: int) -> bool:
    while not _nothing(data, start, len(data)):
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 12], "big", signed=True)
        if not _plausible(kind) or kind in (b"caff", b"data") or size < 0 or start + 12 + size > len(data):
            return False
        start += 12 + size
    return True


def sphere(data: Buffer, start: int, name: str) -> list[Link]:
    """NIST SPHERE (TIMIT, Switchboard): a header in text, then PCM or µ-law without a chunk."""
    head = data[start : start + 1024].decode("latin-1")
    fields: dict[str, Any] = {}
    for line in head.split("end_head")[0].splitlines()[2:]:
        key, _, value = line.strip().partition(" -")
        fields[key] = value.partition(" ")[2].strip()
    try:
        length = int(head.split("\n")[1])
        channels, width = int(fields.get("channel_count", 1)), int(fields.get("sample_n_bytes", 2))
        promised, rate = int(fields["sample_count"]), int(fields["sample_rate"])
        if min(length, channels, width, rate) < 1 or promised < 0:
            raise ValueError("a number below 1")
    except (ValueError, KeyError, IndexError) as error:
        raise broken(name, "a SPHERE header with sample_count and sample_rate", str(error)) from error
    if fields.get("sample_coding", "pcm") not in ("pcm", "ulaw", "mu-law", "alaw"):
        raise broken(name, "SPHERE without compression", fields["sample_coding"])
    present = len(data) - start - length
    if present < promised * channels * width:
        raise cut(name, f"{promised} samples per channel", f"{max(0, present) // (channels * width)}")
    if not _nothing(data, start + length + promised * channels * width, len(data)):
        raise broken(name, f"{promised} samples per channel", f"{present // (channels * width)}")
    return [Link(data, ((start, len(data)),), b"", channels, rate, promised)]
