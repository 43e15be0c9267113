"""The sound of film files and of others that libsndfile does not read, decoded by FFmpeg's libraries through PyAV."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import numpy as np

from audio_llm.audio import LAYOUT_OF_COUNT, Waveform, other_channels
from audio_llm.containers import mpeg
from audio_llm.containers.base import after_id3
from audio_llm.errors import AudioError, PrerequisiteError, describe

# A sound stream may begin a few milliseconds off the film, by its codec's priming and by rounded times; one that begins
# later than this was delayed on purpose.
_DELAY = 0.05  # seconds
_TORN = 0.2  # seconds that may lack of what the container promises
# Formats without a length of their own: FFmpeg guesses it from the bit rate at the beginning.
_GUESSED = frozenset("aac ac3 eac3 amr dts loas mp3".split())
_IN_OGG = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC")  # how the first packet of a stream begins, at byte 28
_GAP = 0.1  # seconds between two frames by their times, beyond which some were lost: all that follows would be shifted


def installed() -> bool:
    return importlib.util.find_spec("av") is not None


def damaged(path: Path) -> bool:
    """Whether a file that :func:`audio_llm.audio.decode` refused is FLAC, Ogg or MP3, which it knows: FFmpeg would
    leave out what is damaged in it, and all that follows would be shifted."""
    data = path.read_bytes()
    start = after_id3(data, 0, path.name)
    head = data[start : start + 64]
    ogg = head.startswith(b"OggS") and head[28:].startswith(_IN_OGG)
    return ogg or head.startswith(b"fLaC") or mpeg.recognises(data, start)


def decode(path: Path, name: str, max_seconds: float, until: float | None = None) -> Waveform:
    """The first sound stream of a file at its own rate with all of its channels, from the beginning of the film to
    `until` seconds or to its end; what the codec added in front is cut off.

    It is decoded from its first packet, for a decoder that begins in the middle gives other samples. Raises
    :class:`AudioError` as :func:`audio_llm.audio.decode`, and :class:`PrerequisiteError` without PyAV.
    """
    if not installed():
        cure = "Install it in the repository: pip install -e '.[corpus]'"
        raise PrerequisiteError(f"{name}: reading this file needs the package 'av', which is not installed. {cure}")
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioError(describe(name, "a file with a sound stream", "one without"))
            stream = container.streams.audio[0]
            rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
            if not rate or not channels:
                raise AudioError(describe(name, "a sound or film file", "one that is not: no sound can be found in it"))
            if channels not in LAYOUT_OF_COUNT:
                expected, found = "1 (mono), 2 (stereo or binaural) or 4 (foa) channels", f"{channels} channels"
                raise AudioError(describe(name, expected, found, other_channels(2, channels)), "channels")
            promised = _promised(container, stream)
            if until is None and promised is not None and promised > max_seconds:
                cure = "Give stretches of it, or cut it into parts first."
                raise AudioError(describe(name, f"at most {max_seconds:g} s", f"{promised:.1f} s", cure), "long")
            last = max_seconds if until is None else min(until, max_seconds)
            samples = _samples(av, container, stream, name, round(last * rate))
    except FileNotFoundError as error:
        raise AudioError(describe(name, "a sound or film file", "no such file"), "missing") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        found = f"one that is not: {getattr(error, 'strerror', None) or error}"
        raise AudioError(describe(name, "a sound or film file", found)) from error
    seconds = samples.shape[1] / rate
    if until is None:
        _check_riff(path, name)
    expected_seconds = last if promised is None else min(last, promised)
    if promised is not None and seconds < expected_seconds - _TORN:
        found = f"{seconds:.2f} s: the file is cut short or damaged"
        raise AudioError(describe(name, f"{expected_seconds:.2f} s of sound", found), "cut")
    if not samples.size:
        raise AudioError(describe(name, "a sound", "no samples"), "short")
    return Waveform(samples, rate, LAYOUT_OF_COUNT[channels])


def _promised(container: object, stream: object) -> float | None:
    """Seconds that the file says its sound has; None where it says nothing."""
    if container.format.name in _GUESSED:  # type: ignore[attr-defined]
        return None
    duration, base = getattr(stream, "duration", None), getattr(stream, "time_base", None)
    if duration and base:
        return float(duration * base)
    told = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", getattr(stream, "metadata", {}).get("DURATION", ""))
    if told:  # Matroska has a tag for each stream
        return 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3])
    whole = getattr(container, "duration", None)
    others = getattr(container, "streams", None)
    alone = others is not None and len(others) == 1  # a film may be longer than its sound
    return whole / 1e6 if whole and alone else None


def _check_riff(path: Path, name: str) -> None:
    """Raise :class:`AudioError` for an AVI file that is shorter than it says, which FFmpeg does not."""
    with open(path, "rb") as file:
        head = file.read(12)
        there = file.seek(0, os.SEEK_END)
    told = 8 + int.from_bytes(head[4:8], "little")
    if head.startswith(b"RIFF") and head[8:] == b"AVI " and there < told < 2**32 - 2**16:  # a stream says all ones
        found = f"{there}: the file is cut short"
        raise AudioError(describe(name, f"{told} bytes", found), "cut")


def _samples(av: object, container: object, stream: object, name: str, most: int) -> np.ndarray:
    """``(channels, time)`` float32 of at most so many samples."""
    resampler = av.AudioResampler(format="fltp")  # type: ignore[attr-defined]
    blocks: list[np.ndarray] = []
    found, begun = 0, False
    form = until = None
    for frame in container.decode(stream):  # type: ignore[attr-defined]
        if not begun:
            begun = True
            delay = _delay(container, frame)
            if delay:
                blocks.append(np.zeros((frame.layout.nb_channels, delay), np.float32))
                found += delay
        if form not in (None, (frame.sample_rate, frame.layout.nb_channels)):
            told = f"{frame.sample_rate} Hz with {frame.layout.nb_channels} channel(s) in the middle"
            raise AudioError(describe(name, "one rate and number of channels", told, "Cut the file where they change."))
        form = (frame.sample_rate, frame.layout.nb_channels)
        if frame.time is not None:
            if until is not None and frame.time > until + _GAP:
                told = f"a gap of {frame.time - until:.2f} s after {found / form[0]:.2f} s: the file is damaged"
                raise AudioError(describe(name, "sound without a gap", told), "cut")
            until = frame.time + frame.samples / frame.sample_rate
        for part in resampler.resample(frame):
            blocks.append(part.to_ndarray())
            found += blocks[-1].shape[1]
        if found >= most:
            break
    if not blocks:
        return np.zeros((1, 0), np.float32)
    samples = np.concatenate(blocks, axis=1)[:, :most]
    bad = samples.size - int(np.isfinite(samples).sum())
    if bad:
        raise AudioError(describe(name, "finite samples", f"{bad} of {samples.size} are NaN or Inf"), "not finite")
    return samples


def _delay(container: object, frame: object) -> int:
    """Samples of silence before the first one, where the sound begins after the film."""
    begin = max(getattr(container, "start_time", None) or 0, 0) / 1e6
    late = (frame.time or 0.0) - begin  # type: ignore[attr-defined]
    return round(late * frame.sample_rate) if late >= _DELAY else 0  # type: ignore[attr-defined]
