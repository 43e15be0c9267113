"""Audio in and out: a waveform that knows its channel layout, decoded, resampled, windowed, and never averaged unasked.

Formats are those of libsndfile (wav, flac, ogg, mp3, opus, aiff, ...); resampling is soxr HQ (Robin Norwood, Rob Sykes,
the SoX Resampler library). Amplitudes are float32 with full scale at ±1.
"""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from audio_llm.errors import AudioError, ConfigError, describe, nearest

LAYOUT_CHANNELS: dict[str, int] = {"mono": 1, "stereo": 2, "binaural": 2, "foa": 4}
# What a bare file means by its number of channels. Two channels are loudspeaker stereo unless somebody says binaural.
LAYOUT_OF_COUNT: dict[int, str] = {1: "mono", 2: "stereo", 4: "foa"}
CHANNEL_NAMES: dict[str, tuple[str, ...]] = {
    "mono": ("mono",),
    "stereo": ("left", "right"),
    "binaural": ("left", "right"),
    "foa": ("W", "Y", "Z", "X"),  # ACN order, SN3D
}
TWO_CHANNELS = ("stereo", "binaural")
# What a model hears of sound in another layout than its own. "duplicate": the same in both channels, directly ahead.
Hearing = Literal["refuse", "left", "right", "mean", "omni", "duplicate"]
HEARINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # the layouts it is for, and those it makes of them
    "refuse": ((), ()),
    "left": (TWO_CHANNELS, ("mono",)),
    "right": (TWO_CHANNELS, ("mono",)),
    "mean": ((*TWO_CHANNELS, "foa"), ("mono",)),  # of ambisonics W, which is what its sides have in common
    "omni": (("foa",), ("mono",)),
    "duplicate": (("mono",), ("binaural", "stereo")),
}
MIN_SAMPLES = 16  # 1 ms at 16 kHz: shorter than a period of anything audible, so a broken cut rather than a sound
INT16_SCALE = 32768.0
MAX_PEAK = 1e10  # 200 dB above full scale; the energies of far larger samples are infinite in float32
# Only these subtypes can carry NaN or Inf; integer and perceptual codecs cannot, so decoding them needs no scan.
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")
_UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile says of it
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Waveform:
    """Samples ``(channels, time)`` float32, a rate in Hz and the meaning of the channels.

    `layout` is ``mono`` (1), ``stereo`` (2: left, right), ``binaural`` (2: left ear, right ear) or ``foa`` (4: first
    order ambisonics, ACN order W Y Z X, SN3D). :class:`AudioError` when the shape and the layout disagree.
    """

    samples: np.ndarray
    sample_rate: int
    layout: str

    def __post_init__(self) -> None:
        if self.layout not in LAYOUT_CHANNELS:
            raise AudioError(
                f"layout '{self.layout}' is unknown{nearest(self.layout, LAYOUT_CHANNELS)}; "
                f"layouts: {', '.join(LAYOUT_CHANNELS)}."
            )
        expected = LAYOUT_CHANNELS[self.layout]
        if self.samples.ndim != 2 or self.samples.shape[0] != expected:
            raise AudioError(
                describe(
                    f"{self.layout} waveform", f"samples of shape ({expected}, time)", f"shape {self.samples.shape}"
                )
            )
        if self.sample_rate <= 0:
            raise AudioError(describe(f"{self.layout} waveform", "a positive sample rate", f"{self.sample_rate} Hz"))
        if self.samples.dtype != np.float32:
            object.__setattr__(self, "samples", self.samples.astype(np.float32))

    @property
    def num_channels(self) -> int:
        return int(self.samples.shape[0])

    @property
    def num_samples(self) -> int:
        return int(self.samples.shape[1])

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sample_rate


def decode(
    source: str | Path | bytes,
    *,
    layout: str | None = None,
    name: str | None = None,
    max_seconds: float = 600.0,
) -> Waveform:
    """Decode a file, or the bytes of one, at its own rate and with all of its channels.

    Without `layout` the number of channels decides: 1 mono, 2 stereo, 4 foa. `name` is what errors call the audio.
    Raises :class:`AudioError` for audio that is missing, empty, corrupt, cut short, not finite, louder than
    ``MAX_PEAK``, shorter than ``MIN_SAMPLES``, longer than `max_seconds`, or of a channel count that does not fit the
    layout.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or "audio bytes"
        data = bytes(source) if isinstance(source, (bytearray, memoryview)) else source
    else:
        name = name or str(source)
        data = _read_file(Path(source), name)
    if not data:
        raise AudioError(describe(name, "an audio file", "an empty file of 0 bytes"))
    fast = _decode_pcm16(data, name, max_seconds) if data[:4] == b"RIFF" else None
    samples, sample_rate = fast if fast is not None else _decode_libsndfile(data, name, max_seconds)
    channels, num_samples = samples.shape
    layout = layout or LAYOUT_OF_COUNT.get(channels)
    if layout is None:
        raise AudioError(
            describe(name, "1 (mono), 2 (stereo or binaural) or 4 (foa) channels", f"{channels} channels")
            + " Take two of them, for instance by `ffmpeg -i IN -af 'pan=stereo|c0=c0|c1=c1' OUT.wav`."
        )
    if LAYOUT_CHANNELS.get(layout, channels) != channels:
        raise AudioError(describe(name, f"{LAYOUT_CHANNELS[layout]} channel(s) for layout '{layout}'", f"{channels}"))
    if num_samples < MIN_SAMPLES:
        found = "no samples" if num_samples == 0 else f"{num_samples} sample(s)"
        raise AudioError(describe(name, f"at least {MIN_SAMPLES} samples per channel", found))
    return Waveform(samples, sample_rate, layout)


def _read_file(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise AudioError(describe(name, "an audio file", "no such file")) from error
    except OSError as error:
        raise AudioError(describe(name, "a readable audio file", error.strerror or str(error))) from error


def _check_length(num_samples: int, sample_rate: int, name: str, max_seconds: float) -> None:
    if num_samples > max_seconds * sample_rate:
        raise AudioError(
            describe(
                name,
                f"at most {max_seconds:g} s of audio",
                f"{num_samples / sample_rate:.1f} s",
                "Cut it into parts first; nothing is shortened silently.",
            )
        )


def _decode_pcm16(data: bytes, name: str, max_seconds: float) -> tuple[np.ndarray, int] | None:
    """16-bit PCM WAV straight from memory, several times faster than through a codec library; None for other WAVs.

    Returns ``(channels, time)`` float32 and the rate. A data chunk that promises more bytes than there are is an
    error, except for the sizes 0 and 0xFFFFFFFF (and neighbours) that encoders leave when they write to a pipe.
    """
    if len(data) < 12 or data[8:12] != b"WAVE":
        return None
    position, form = 12, None
    while position + 8 <= len(data):
        chunk, size = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        body = position + 8
        if chunk == b"fmt " and size >= 16 and body + 16 <= len(data):
            form = struct.unpack_from("<HHIIHH", data, body)
            if form[0] == 0xFFFE and size >= 26 and body + 26 <= len(data):  # WAVE_FORMAT_EXTENSIBLE
                form = struct.unpack_from("<H", data, body + 24) + form[1:]
        if chunk == b"data":
            streamed = size == 0 or size >= 0xFFFFFFFF - 4096
            present = len(data) - body
            if size > present and not streamed:
                raise AudioError(describe(name, f"{size} bytes of samples", f"{present}: the file is cut short"))
            if form is None or form[0] != 1 or form[5] != 16 or not form[1] or not form[2] or form[4] != 2 * form[1]:
                return None
            channels, sample_rate = form[1], form[2]
            count = (present if streamed else size) // (2 * channels)
            _check_length(count, sample_rate, name, max_seconds)
            frames = np.frombuffer(data, "<i2", count * channels, body).reshape(count, channels)
            return _int16_to_float(frames), sample_rate
        position = body + size + (size & 1)
    return None


class _Sequential(soundfile.SoundFile):
    """A file read once from start to end. soundfile seeks after every read of a seekable file; FLAC pays 5 % for it."""

    def seekable(self) -> bool:
        return False


class _Memory(io.BytesIO):
    """Where a damaged file makes libsndfile seek to is no place: it stays; errors in callbacks are only printed."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _decode_libsndfile(data: bytes, name: str, max_seconds: float) -> tuple[np.ndarray, int]:
    _check_container(data, name)
    try:
        with _Sequential(_Memory(data)) as file:
            promised, sample_rate, subtype = file.frames, file.samplerate, file.subtype
            if promised == _UNKNOWN_LENGTH:
                frames = _read_to_the_end(file, name, max_seconds)
                promised = len(frames)
            else:
                _check_length(promised, sample_rate, name, max_seconds)
                frames = file.read(promised, dtype="float32", always_2d=True)  # (time, channels)
    except (soundfile.LibsndfileError, RuntimeError, MemoryError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise AudioError(
            describe(name, "decodable audio (wav, flac, ogg, mp3, opus)", f"{len(data)} bytes that are not: {reason}")
        ) from error
    if len(frames) < promised:
        raise AudioError(describe(name, f"{promised} samples per channel", f"{len(frames)}: the file is cut short"))
    if subtype in _FLOAT_SUBTYPES:
        _check_finite(frames, name)
        peak = float(np.abs(frames).max(initial=0.0))
        if peak > MAX_PEAK:
            expected = f"samples with full scale at 1 (at most {MAX_PEAK:g})"
            raise AudioError(describe(name, expected, f"a peak of {peak:.3g}", "Divide them by their full scale."))
    return np.ascontiguousarray(frames.T), sample_rate


def _read_to_the_end(file: soundfile.SoundFile, name: str, max_seconds: float) -> np.ndarray:
    """``(time, channels)`` of a stream whose encoder did not know its length (FLAC written to a pipe)."""
    parts, total = [], 0
    while len(part := file.read(2**20, dtype="float32", always_2d=True)):
        parts.append(part)
        total += len(part)
        _check_length(total, file.samplerate, name, max_seconds)
    return np.concatenate(parts) if parts else np.zeros((0, file.channels), np.float32)


def _check_container(data: bytes, name: str) -> None:
    """Refuse AIFF and Ogg that are cut or damaged: of these libsndfile decodes what is left, without a word."""
    if data[:4] == b"FORM":
        promised = 8 + int.from_bytes(data[4:8], "big")
        if promised > len(data):
            raise AudioError(describe(name, f"{promised} bytes", f"{len(data)}: the file is cut short"))
    if data[:4] == b"OggS":
        _check_ogg(data, name)


def _check_ogg(data: bytes, name: str) -> None:
    """Every page of an Ogg file whole and with its checksum (RFC 3533, section 6)."""
    start = ended = 0
    while data[start : start + 4] == b"OggS":
        segments = data[start + 26] if start + 27 <= len(data) else 0
        body = start + 27 + segments
        end = body + sum(data[start + 27 : body])
        if start + 27 > len(data) or end > len(data):
            raise AudioError(describe(name, "whole Ogg pages", f"{len(data)} bytes: the file is cut short"))
        page = data[start : start + 22] + bytes(4) + data[start + 26 : end]  # the checksum's own place counts as zero
        if _ogg_checksum(page) != int.from_bytes(data[start + 22 : start + 26], "little"):
            raise AudioError(describe(name, "Ogg pages that match their checksums", f"a damaged one at byte {start}"))
        ended, start = data[start + 5] & 4, end  # flag: the last page of its stream
    if start < len(data) and not ended:
        raise AudioError(describe(name, "an Ogg page", f"something else at byte {start}"))


def _ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32 by zlib's: the same polynomial with the bits of every byte reversed, nothing inverted."""
    reversed_crc = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reversed_crc:032b}"[::-1], 2)


def _int16_to_float(frames: np.ndarray) -> np.ndarray:
    """``(time, channels)`` int16 → ``(channels, time)`` float32 in [-1, 1), exactly.

    Two channels are pulled apart as halves of 32-bit words, which numpy vectorises; a strided copy takes twice as long.
    """
    if frames.shape[1] == 2 and sys.byteorder == "little":
        samples = np.empty((2, len(frames)), np.float32)
        pairs = frames.view("<i4")[:, 0]
        samples[0] = pairs << 16
        samples[1] = pairs & np.int32(-65536)
        samples *= np.float32(1 / INT16_SCALE / 65536)
        return samples
    samples = frames.T.astype(np.float32, order="C")
    samples *= np.float32(1 / INT16_SCALE)
    return samples


def _check_finite(samples: np.ndarray, name: str) -> None:
    bad = samples.size - int(np.isfinite(samples).sum())
    if bad:
        raise AudioError(describe(name, "finite samples", f"{bad} of {samples.size} are NaN or Inf"))


def quantise(waveform: Waveform, bits: int = 16) -> np.ndarray:
    """Integers ``(channels, time)`` int32, full scale ``2**(bits - 1)``, rounded to the nearest.

    The scale is that of decoding, so decode → encode → decode is exact (libsndfile's own float scale is 2^15 - 1 one
    way and 2^15 the other, which fades a clip a little every time). Raises :class:`AudioError` above full scale.
    """
    _check_finite(waveform.samples, "waveform")
    peak = float(np.abs(waveform.samples).max(initial=0.0))
    if peak > 1.0:
        raise AudioError(
            describe(
                "waveform",
                f"peak at most 1 for {bits}-bit samples",
                f"{peak:.3f}",
                "Scale it first (audio.limit_peak), or write with subtype='FLOAT' to wav.",
            )
        )
    full = 2 ** (bits - 1)
    return np.clip(np.rint(waveform.samples.astype(np.float64) * full), -full, full - 1).astype(np.int32)


def encode(waveform: Waveform, format: str = "flac", subtype: str = "PCM_16") -> bytes:
    """Bytes of an audio file. ``PCM_16`` and ``PCM_24`` round trip exactly; clipping is an error, never silent.

    Raises :class:`AudioError` for NaN/Inf, for a peak above 1 with an integer subtype, and for a pair of format and
    subtype that libsndfile does not know. For ogg/mp3 pass their own `subtype` (``VORBIS``, ``OPUS``,
    ``MPEG_LAYER_III``).
    """
    bits = {"PCM_16": 16, "PCM_24": 24}.get(subtype)
    frames: np.ndarray
    if bits is None:
        _check_finite(waveform.samples, "waveform")
        frames = waveform.samples.T
    else:
        integers = quantise(waveform, bits).T
        frames = integers.astype(np.int16) if bits == 16 else integers << 8  # 24 bits are the top ones of an int32
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, frames, waveform.sample_rate, format=format.upper(), subtype=subtype)
    except (soundfile.LibsndfileError, ValueError, TypeError) as error:
        raise AudioError(
            describe(f"encoding {waveform.layout} audio", "a format and subtype libsndfile writes", f"{error}")
        ) from error
    return buffer.getvalue()


def encode_level(waveform: Waveform) -> bytes:
    """A WAV file that holds `waveform` at its own level: 16-bit PCM, or 32-bit float where the peak is above full
    scale, which no integers hold. Equal samples are equal bytes. Raises :class:`AudioError` for NaN/Inf."""
    if float(np.abs(waveform.samples).max(initial=0.0)) <= 1.0:
        return encode(waveform, "wav")
    _check_finite(waveform.samples, "waveform")
    # By hand, for libsndfile stamps the time of writing into its float files.
    data = np.ascontiguousarray(waveform.samples.T, dtype="<f4").tobytes()
    channels, count = waveform.samples.shape
    rate, frame = waveform.sample_rate, 4 * channels
    chunks = struct.pack("<4sIHHIIHHH", b"fmt ", 18, 3, channels, rate, rate * frame, frame, 32, 0)
    chunks += struct.pack("<4sII4sI", b"fact", 4, count, b"data", len(data)) + data
    return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks), b"WAVE") + chunks


def limit_peak(waveform: Waveform, peak: float = 1.0) -> Waveform:
    """The same waveform, scaled down where its peak exceeds `peak`, by one gain for all channels."""
    found = float(np.abs(waveform.samples).max(initial=0.0))
    if found <= peak:
        return waveform
    return replace(waveform, samples=(waveform.samples * np.float32(peak / found)).clip(-peak, peak))


def resample(waveform: Waveform, sample_rate: int) -> Waveform:
    """The waveform at another rate in Hz (soxr HQ, linear phase: interchannel time differences are kept)."""
    if sample_rate == waveform.sample_rate:
        return waveform
    if sample_rate <= 0:
        raise AudioError(describe("resampling", "a positive sample rate", f"{sample_rate} Hz"))
    import soxr

    frames = soxr.resample(np.ascontiguousarray(waveform.samples.T), waveform.sample_rate, sample_rate, quality="HQ")
    return replace(waveform, samples=np.ascontiguousarray(frames.T, dtype=np.float32), sample_rate=sample_rate)


def check(
    waveform: Waveform, *, layouts: Sequence[str] | None, sample_rate: int | None = None, name: str = "audio"
) -> None:
    """Raise :class:`AudioError`, naming both sides, unless `waveform` has one of `layouts` and the stated rate."""
    check_format(waveform.layout, waveform.sample_rate, layouts=layouts, sample_rate=sample_rate, name=name)


def hear(
    waveform: Waveform, layouts: Sequence[str] | None, hearing: str = "refuse", *, name: str = "audio"
) -> Waveform:
    """`waveform` as a model of `layouts` hears it: as it is where it fits, else what `hearing` makes of it.

    Without `layouts` (of a model behind an address) everything that `hearing` is for is converted. Raises
    :class:`AudioError` for sound that stays unfit, :class:`ConfigError` as :func:`audible`.
    """
    audible(layouts, hearing)
    taken, made = HEARINGS[hearing]
    if waveform.layout not in (layouts or ()) and waveform.layout in taken:
        layout = next(layout for layout in made if layouts is None or layout in layouts)
        rule = "omni" if waveform.layout == "foa" else hearing
        return Waveform(np.ascontiguousarray(take_channels(waveform.samples, rule)), waveform.sample_rate, layout)
    check(waveform, layouts=layouts, name=name)
    return waveform


def audible(layouts: Sequence[str] | None, hearing: str) -> tuple[str, ...] | None:
    """The layouts that :func:`hear` takes for a model of `layouts`; None where it takes all.

    Raises :class:`ConfigError` where `hearing` makes none of these: what it says would never be done.
    """
    if hearing not in HEARINGS:
        raise ConfigError(
            describe("hearing", f"one of {', '.join(HEARINGS)}", f"'{hearing}'{nearest(hearing, HEARINGS)}")
        )
    taken, made = HEARINGS[hearing]
    if layouts is None:
        return None
    if made and not set(made) & set(layouts):
        found = f"one that hears {' or '.join(layouts)}"
        raise ConfigError(describe(f"hearing {hearing}", f"a model of {' or '.join(made)}", found, "Leave it out."))
    return (*layouts, *taken)


def take_channels(samples: Any, hearing: str) -> Any:
    """What `hearing` takes of an array or a tensor ``(..., channels, time)`` of a layout that it is for."""
    if hearing == "mean":
        return samples.mean(axis=-2, keepdims=True)
    return samples[..., {"left": [0], "right": [1], "omni": [0], "duplicate": [0, 0]}[hearing], :]


def channels_cure(layouts: Sequence[str], found: int) -> str:
    """What can be done about `found` channels, for a model of `layouts`; all refusals end with it."""
    if "mono" in layouts and found > 1:
        names = "omni" if found == 4 else "left` or `--hearing mean"
        return f"Say what is heard of them: `--hearing {names}` (key `hearing` of a recipe); nothing is mixed unasked."
    if found == 1 and set(layouts) & set(TWO_CHANNELS):
        return (
            "`--hearing duplicate` (key `hearing` of a recipe) gives both channels the same sound, directly ahead: "
            "answers about direction then mean nothing."
        )
    return "There is no conversion: channels are never invented. Use audio of that layout."


def check_format(
    layout: str, found_rate: int, *, layouts: Sequence[str] | None, sample_rate: int | None, name: str
) -> None:
    """:func:`check` for a layout and a rate that are known without the samples."""
    if layouts is not None and layout not in layouts:
        cure = channels_cure(layouts, LAYOUT_CHANNELS[layout])
        raise AudioError(describe(name, f"layout {' or '.join(layouts)}", layout, cure))
    if sample_rate is not None and found_rate != sample_rate:
        cure = f"Resample it, for instance by `ffmpeg -i IN -ar {sample_rate} OUT.wav`."
        raise AudioError(describe(name, f"a sample rate of {sample_rate} Hz", f"{found_rate} Hz", cure))


def windows(samples: np.ndarray, window_samples: int, max_windows: int, *, name: str = "audio") -> list[np.ndarray]:
    """Cut ``(channels, time)`` into consecutive windows of `window_samples`; the last one keeps its shorter length.

    Together they are the whole input. Raises :class:`AudioError` beyond `max_windows` and for empty input.
    """
    if window_samples < 1:
        raise ValueError(f"window_samples must be positive, got {window_samples}")
    total = samples.shape[-1]
    if total == 0:
        raise AudioError(describe(name, f"at least {MIN_SAMPLES} samples per channel", "no samples"))
    count = -(-total // window_samples)
    if count > max_windows:
        raise AudioError(
            describe(
                name,
                f"at most {max_windows} windows of {window_samples} samples",
                f"{total} samples, {count} windows",
                "Raise max_windows in the model's configuration or cut the audio; nothing is shortened silently.",
            )
        )
    return [samples[..., start : start + window_samples] for start in range(0, total, window_samples)]


def sha256(waveform: Waveform) -> str:
    """Hex digest of the float32 samples (little endian, channel after channel), the rate and the layout."""
    digest = hashlib.sha256(f"{waveform.layout} {waveform.sample_rate} {waveform.samples.shape}\n".encode())
    digest.update(np.ascontiguousarray(waveform.samples, dtype="<f4").data)
    return digest.hexdigest()


def read_header(path: str | Path) -> Any:
    """libsndfile's info of an audio file (``channels``, ``samplerate``, ``frames``, ``duration``), nothing decoded.

    Raises :class:`AudioError` for a file that is not there or is not audio.
    """
    try:
        return soundfile.info(str(path))
    except (OSError, RuntimeError) as error:  # libsndfile's own error is a RuntimeError
        raise AudioError(describe(str(path), "an audio file", f"none that can be read ({error})")) from error


def silence(waveform: Waveform) -> Waveform:
    """Zeros of the same length, rate and layout."""
    return replace(waveform, samples=np.zeros_like(waveform.samples))


def swap_channels(waveform: Waveform) -> Waveform:
    """The scene mirrored left to right: stereo and binaural exchange their rows, FOA negates Y (azimuth → −azimuth)."""
    if waveform.layout in ("stereo", "binaural"):
        return replace(waveform, samples=np.ascontiguousarray(waveform.samples[::-1]))
    if waveform.layout == "foa":
        signs = np.array([1, -1, 1, 1], np.float32)[:, None]
        return replace(waveform, samples=waveform.samples * signs)
    raise AudioError(describe("swapping channels", "stereo, binaural or foa audio", waveform.layout))
