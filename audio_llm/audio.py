"""Audio in and out: a waveform that knows its channel layout, decoded, resampled, windowed, and never averaged unasked.

Formats are those of libsndfile (wav, flac, ogg, mp3, opus, aiff, ...); resampling is soxr HQ (Robin Norwood, Rob Sykes,
the SoX Resampler library). Amplitudes are float32 with full scale at ±1.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from audio_llm import containers, files, pcm
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
MAX_PEAK = 1e10  # 200 dB above full scale; the energies of far larger samples are infinite in float32
# Only these subtypes can carry NaN or Inf; integer and perceptual codecs cannot, so decoding them needs no scan.
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")
MAX_SECONDS = 600.0  # of a file that is decoded, unless the caller says otherwise
BYTES_PER_SECOND = 4 * 4 * 48000  # decoded, at most: four channels at 48 kHz, or as much of others
_MAX_CHANNELS = 1024  # libsndfile's limit
_BLOCK = 2**18  # samples per channel that are decoded at once


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

    @property
    def peak(self) -> float:
        """The largest amplitude, NaN where there is one; 0 without samples."""
        return max(float(self.samples.max(initial=0.0)), -float(self.samples.min(initial=0.0)))


def decode(
    source: str | Path | bytes,
    *,
    layout: str | None = None,
    name: str | None = None,
    max_seconds: float = MAX_SECONDS,
    max_bytes: float | None = None,
) -> Waveform:
    """Decode a file, or the bytes of one, at its own rate and with all of its channels.

    Without `layout` the number of channels decides: 1 mono, 2 stereo, 4 foa. `name` is what errors call the audio.
    Raises :class:`AudioError` for audio that is missing, empty, corrupt, cut short, not finite, louder than
    ``MAX_PEAK``, shorter than ``MIN_SAMPLES``, or of a channel count that does not fit the layout; before anything is
    decoded, for more than `max_seconds`, and for more than `max_bytes` of float32 samples (without it, as many as
    `max_seconds` of ``BYTES_PER_SECOND``).
    """
    links, header, layout, name = counted(source, layout, name, max_seconds, max_bytes)
    return Waveform(read(links, header, name), header.samplerate, layout)


def counted(
    source: str | Path | bytes, layout: str | None, name: str | None, max_seconds: float, max_bytes: float | None
) -> tuple[list[containers.Link], Header, str, str]:
    """What :func:`decode` decodes, with its layout and name: nothing of it is decoded yet. Raises as it does."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or "audio bytes"
        data = bytes(source) if isinstance(source, (bytearray, memoryview)) else source
    else:
        name = name or str(source)
        data = _read_file(Path(source), name)
    if not data:
        raise AudioError(describe(name, "an audio file", "an empty file of 0 bytes"), "empty")
    links = containers.links(data, name)
    header = _measure(links, name)
    if layout is None and header.channels not in LAYOUT_OF_COUNT:
        expected, found = "1 (mono), 2 (stereo or binaural) or 4 (foa) channels", f"{header.channels} channels"
        raise AudioError(describe(name, expected, found, other_channels(2, header.channels)), "channels")
    layout = layout or LAYOUT_OF_COUNT[header.channels]
    if LAYOUT_CHANNELS.get(layout, header.channels) != header.channels:
        wanted = LAYOUT_CHANNELS[layout]
        expected, cure = f"{wanted} channel(s) for layout '{layout}'", other_channels(wanted, header.channels)
        raise AudioError(describe(name, expected, f"{header.channels}", cure), "channels")
    if header.frames < MIN_SAMPLES:
        found = "no samples" if header.frames == 0 else f"{header.frames} sample(s)"
        raise AudioError(describe(name, f"at least {MIN_SAMPLES} samples per channel", found), "short")
    _check_size(header, name, max_seconds, max_bytes)
    return links, header, layout, name


def _read_file(path: Path, name: str) -> bytes:
    try:
        return files.read_plain(path)
    except FileNotFoundError as error:
        raise AudioError(describe(name, "an audio file", "no such file"), "missing") from error
    except OSError as error:
        raise AudioError(describe(name, "a readable audio file", error.strerror or str(error)), "missing") from error


@dataclass(frozen=True)
class Header:
    """What a file holds: channels, rate in Hz, samples per channel (`frames`), length in seconds."""

    channels: int
    samplerate: int
    frames: int

    @property
    def duration(self) -> float:
        return self.frames / self.samplerate


def read_header(path: str | Path) -> Header:
    """The :class:`Header` of an audio file, nothing decoded: what :func:`decode` will find in it.

    Raises :class:`AudioError` for a file that is not there, is not audio, or does not hold what it promises.
    """
    name = str(path)
    try:
        with files.open_plain(path) as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise AudioError(describe(name, "an audio file", "an empty file of 0 bytes"))
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                links = containers.links(data, name)
                for content, frames in (link.last for link in links if link.last):
                    if len(_samples(content, frames, name)) < frames:
                        raise AudioError(describe(name, "a whole last frame", "a part: the file is cut short"))
                return _measure(links, name)
    except FileNotFoundError as error:
        raise AudioError(describe(name, "an audio file", "no such file")) from error
    except OSError as error:
        raise AudioError(describe(name, "a readable audio file", error.strerror or str(error))) from error


def _measure(links: Sequence[containers.Link], name: str) -> Header:
    """Of all links together. Raises :class:`AudioError` where they differ in channels or rate."""
    found: list[Header] = []
    for link in links:
        if link.channels and link.sample_rate and link.frames is not None:
            found.append(Header(link.channels, link.sample_rate, link.frames))
            continue
        with _opened(link.content(), name) as file:
            found.append(Header(file.channels, file.samplerate, file.frames))
    if any(header.channels > _MAX_CHANNELS for header in found):
        most = max(header.channels for header in found)
        raise AudioError(describe(name, f"at most {_MAX_CHANNELS} channels", f"{most}"))
    forms = list(dict.fromkeys((header.channels, header.samplerate) for header in found))
    if len(forms) != 1:
        told = ", then ".join(f"{rate} Hz with {channels} channel(s)" for channels, rate in forms) or "none"
        raise AudioError(describe(name, "one rate and number of channels", told, "Cut the file where they change."))
    return replace(found[0], frames=sum(header.frames for header in found))


def _check_size(header: Header, name: str, max_seconds: float, max_bytes: float | None) -> None:
    """Raise :class:`AudioError` for more samples than the caller takes, before any of them is read."""
    if header.frames > max_seconds * header.samplerate:
        cure = "Cut it into parts first; nothing is shortened silently."
        expected, found = f"at most {max_seconds:g} s of audio", f"{header.duration:.1f} s"
        raise AudioError(describe(name, expected, found, cure), "long")
    limit = max_seconds * BYTES_PER_SECOND if max_bytes is None else max_bytes
    size = 4 * header.channels * header.frames
    if size > limit:
        what = f"{size / 2**20:.0f} MiB ({header.channels} channel(s) at {header.samplerate} Hz)"
        cure = "Cut it, or resample it, for instance by `ffmpeg -i IN -ar 48000 OUT.flac`."
        raise AudioError(describe(name, f"at most {limit / 2**20:.0f} MiB of decoded samples", what, cure), "long")


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


@contextlib.contextmanager
def _opened(content: bytes, name: str) -> Iterator[soundfile.SoundFile]:
    """A file in memory; what libsndfile says against it, then or while it is read, as :class:`AudioError`."""
    try:
        with _Sequential(_Memory(content)) as file:
            yield file
    except (soundfile.LibsndfileError, RuntimeError, MemoryError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        found = f"{len(content)} bytes that are not: {reason}"
        raise AudioError(describe(name, "decodable audio (wav, flac, ogg, mp3, opus)", found)) from error


def _samples(content: bytes, frames: int, name: str) -> np.ndarray:
    with _opened(content, name) as file:
        return file.read(frames, dtype="float32", always_2d=True)  # (time, channels)


def read(links: Sequence[containers.Link], header: Header, name: str) -> np.ndarray:
    """``(channels, time)`` of all links, exactly as many samples as were counted."""
    if len(links) == 1 and links[0].pcm16:
        return pcm.to_float(links[0].frames16(header.frames))
    samples = np.empty((header.channels, header.frames), np.float32)
    done, floats = 0, False
    for link in links:
        with _opened(link.content(), name) as file:
            if (file.channels, file.samplerate) != (header.channels, header.samplerate):
                found = f"{file.samplerate} Hz with {file.channels} channel(s) in the samples"
                expected = f"{header.samplerate} Hz with {header.channels} channel(s)"
                raise AudioError(describe(name, expected, found))
            ending = done + (file.frames if link.frames is None else link.frames)
            while done < ending:
                block = samples[:, done : min(ending, done + _BLOCK)]
                count = _fill(file, block)
                done += count
                if count < block.shape[1]:
                    found_samples = f"{done}: the file is cut short or damaged"
                    raise AudioError(describe(name, f"{ending} samples per channel", found_samples), "cut")
            floats = file.subtype in _FLOAT_SUBTYPES
    if floats:
        _check_finite(samples, name)
        peak = float(np.abs(samples).max(initial=0.0))
        if peak > MAX_PEAK:
            expected = f"samples with full scale at 1 (at most {MAX_PEAK:g})"
            cure = "Divide them by their full scale."
            raise AudioError(describe(name, expected, f"a peak of {peak:.3g}", cure), "loud")
    return samples


def _fill(file: soundfile.SoundFile, block: np.ndarray) -> int:
    """Decode into ``(channels, time)``; how many samples per channel there were."""
    if len(block) == 1:
        return len(file.read(out=block[0]))
    frames = file.read(block.shape[1], dtype="float32", always_2d=True)  # (time, channels)
    block[:, : len(frames)] = frames.T
    return len(frames)


def _check_finite(samples: np.ndarray, name: str) -> None:
    bad = samples.size - int(np.isfinite(samples).sum())
    if bad:
        raise AudioError(describe(name, "finite samples", f"{bad} of {samples.size} are NaN or Inf"), "not finite")


def quantise(waveform: Waveform, bits: int = 16) -> np.ndarray:
    """Integers ``(channels, time)``, int16 for 16 `bits`, else int32; full scale ``2**(bits - 1)``, to the nearest.

    The scale is that of decoding, so decode → encode → decode is exact (libsndfile's own float scale is 2^15 - 1 one
    way and 2^15 the other, which fades a clip a little every time). Raises :class:`AudioError` above full scale.
    """
    peak = waveform.peak
    if not peak <= 1.0:  # NaN is not either
        _check_finite(waveform.samples, "waveform")
        cure = "Scale it first (audio.limit_peak), or write with subtype='FLOAT' to wav."
        raise AudioError(describe("waveform", f"peak at most 1 for {bits}-bit samples", f"{peak:.3f}", cure))
    return pcm.rounded(waveform.samples, bits)


def encode(
    waveform: Waveform, format: str = "flac", subtype: str = "PCM_16", integers: np.ndarray | None = None
) -> bytes:
    """Bytes of an audio file. ``PCM_16`` and ``PCM_24`` round trip exactly; clipping is an error, never silent.

    Raises :class:`AudioError` for NaN/Inf, for a peak above 1 with an integer subtype, and for a pair of format and
    subtype that libsndfile does not know. For ogg/mp3 pass their own `subtype` (``VORBIS``, ``OPUS``,
    ``MPEG_LAYER_III``). `integers`: what :func:`quantise` made of the waveform, where the caller has it.
    """
    bits = {"PCM_16": 16, "PCM_24": 24}.get(subtype)
    frames: np.ndarray
    if bits is None:
        _check_finite(waveform.samples, "waveform")
        if (format.lower(), subtype) == ("wav", "FLOAT"):
            return _float_wav(waveform)
        frames = waveform.samples.T
    else:
        integers = (quantise(waveform, bits) if integers is None else integers).T
        frames = integers if bits == 16 else integers << 8  # 24 bits are the top ones of an int32
    return write(frames, waveform.sample_rate, format, subtype, f"encoding {waveform.layout} audio")


def write(frames: np.ndarray, sample_rate: int, format: str, subtype: str, item: str) -> bytes:
    """Bytes of a file of `frames` ``(time, channels)``, of which :class:`AudioError` speaks as `item`."""
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, frames, sample_rate, format=format.upper(), subtype=subtype)
    except (soundfile.LibsndfileError, ValueError, TypeError) as error:
        raise AudioError(describe(item, "a format and subtype libsndfile writes", f"{error}")) from error
    return buffer.getvalue()


def encode_level(waveform: Waveform) -> bytes:
    """A WAV file that holds `waveform` at its own level: 16-bit PCM, or 32-bit float where the peak is above full
    scale, which no integers hold. Equal samples are equal bytes. Raises :class:`AudioError` for NaN/Inf."""
    return encode(waveform, "wav", "PCM_16" if waveform.peak <= 1.0 else "FLOAT")


def _float_wav(waveform: Waveform) -> bytes:
    """By hand, for libsndfile stamps the time of writing into its float files: equal samples are equal bytes."""
    data = np.ascontiguousarray(waveform.samples.T, dtype="<f4").tobytes()
    channels, count = waveform.samples.shape
    rate, frame = waveform.sample_rate, 4 * channels
    chunks = struct.pack("<4sIHHIIHHH", b"fmt ", 18, 3, channels, rate, rate * frame, frame, 32, 0)
    chunks += struct.pack("<4sII4sI", b"fact", 4, count, b"data", len(data)) + data
    return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks), b"WAVE") + chunks


def limit_peak(waveform: Waveform, peak: float = 1.0) -> Waveform:
    """The same waveform, scaled down where its peak exceeds `peak`, by one gain for all channels."""
    found = waveform.peak
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
    if "mono" in layouts and found in (2, 4):
        names = "omni" if found == 4 else "left` or `--hearing mean"
        return f"Say what is heard of them: `--hearing {names}` (key `hearing` of a recipe); nothing is mixed unasked."
    if found == 1 and set(layouts) & set(TWO_CHANNELS):
        return (
            "`--hearing duplicate` (key `hearing` of a recipe) gives both channels the same sound, directly ahead: "
            "answers about direction then mean nothing."
        )
    return other_channels(min(LAYOUT_CHANNELS[layout] for layout in layouts), found)


def other_channels(wanted: int, found: int) -> str:
    """The command that makes `wanted` channels of a file's `found` ones, or such sound anew where there is no way."""
    if found == wanted:
        return "`audio-llm inspect SHARDS` shows the layout of a sample; its JSON says which one its channels have."
    if wanted < found:  # of ambisonics W and Y, as two cardioids to the sides
        two = "stereo|c0=0.5*c0+0.5*c1|c1=0.5*c0-0.5*c1" if found == 4 else "stereo|c0=c0|c1=c1"
        mix = {1: "mono|c0=c0", 2: two, 4: "4.0|c0=c0|c1=c1|c2=c2|c3=c3"}[wanted]
        return f"Make {wanted} of them, for instance by `ffmpeg -i IN -af 'pan={mix}' OUT.wav`."
    return f"Channels are not invented: `audio-llm prep RECIPE OUT audio.layout={LAYOUT_OF_COUNT[wanted]}` makes some."


def check_format(
    layout: str, found_rate: int, *, layouts: Sequence[str] | None, sample_rate: int | None, name: str
) -> None:
    """:func:`check` for a layout and a rate that are known without the samples."""
    if layouts is not None and layout not in layouts:
        cure = channels_cure(layouts, LAYOUT_CHANNELS[layout])
        raise AudioError(describe(name, f"layout {' or '.join(layouts)}", layout, cure))
    if sample_rate is not None and found_rate != sample_rate:
        cure = f"Make the shards anew, at that rate: `audio-llm prep RECIPE OUT audio.sample_rate={sample_rate}`."
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
        found = f"{total} samples, {count} windows"
        cure = "Raise max_windows in the model's configuration or cut the audio; nothing is shortened silently."
        expected = f"at most {max_windows} windows of {window_samples} samples"
        raise AudioError(describe(name, expected, found, cure))
    return [samples[..., start : start + window_samples] for start in range(0, total, window_samples)]


def sha256(waveform: Waveform) -> str:
    """Hex digest of the float32 samples (little endian, channel after channel), the rate and the layout."""
    return hashed(waveform.layout, waveform.sample_rate, waveform.samples.shape, [waveform.samples])


def hashed(layout: str, sample_rate: int, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> str:
    """:func:`sha256` of float32 samples that come in `parts`, channel after channel."""
    digest = hashlib.sha256(f"{layout} {sample_rate} {shape}\n".encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype="<f4").data)
    return digest.hexdigest()


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
