"""Clips to make scenes of: a labelled sound folder's or built-in sounds, their audible parts, and splits of them.

Splits are by recording (see :mod:`audio_llm.datasets.sounds`), so that no recording is on both sides.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np

from audio_llm.datasets.sounds import Clip, Library, find, fingerprint
from audio_llm.errors import AudioError, ConfigError, describe, nearest
from audio_llm.shards.splits import joined, split_of
from data_prep import procedural

__all__ = ["Clip", "Library", "audible", "builtin", "find", "load", "parse_folds", "scan", "split", "trimmed"]

SPLITS = ("train", "validation", "test")
FRAME = 0.02  # seconds, of the frames that are silent or loud
LOUD_DB = -20.0  # frames above this, re the loudest, are heard as the event itself: it starts and ends with one
FLOOR_DB = -40.0  # frames this far below the loudest one are silence (ESC-50 pads short clips with digital zeros)


def builtin(classes: list[str] | None, recordings: int, seconds: tuple[float, float], seed: int) -> Library:
    """`recordings` built-in recordings of each class, each `seconds` (shortest, longest) long by its seed."""
    names = classes or list(procedural.CLASSES)
    for name in names:
        if name not in procedural.CLASSES:
            known = ", ".join(procedural.CLASSES)
            raise ConfigError(
                f"sounds.classes: no built-in class '{name}'{nearest(name, procedural.CLASSES)}. Known: {known}."
            )
    rng = np.random.default_rng(seed)
    clips = []
    for label in sorted(names):
        for index in range(recordings):
            length = round(float(rng.uniform(*seconds)), 3)
            name = f"{label}-{seed}-{index:05d}"
            clips.append(Clip(label, name, name, seconds=length, seed=seed * 1_000_003 + index))
    return Library("builtin", clips, fingerprint(clips), licence="CC0-1.0")


# ------------------------------------------------------------------------------------------------ the audible part


def audible(samples: np.ndarray, rate: int) -> tuple[float, float, str]:
    """(start, seconds) of the part between the first and the last frame above ``FLOOR_DB`` re the loudest, and which of
    its frames are above ``LOUD_DB``.

    `samples` is (time,). Raises :class:`AudioError` when the clip is silent.
    """
    hop = max(1, round(FRAME * rate))
    frames = len(samples) // hop or 1
    power = np.square(samples[: frames * hop].astype(np.float64)).reshape(frames, -1).mean(axis=1)
    if power.max() < 1e-10:
        raise AudioError("the clip is silent")
    first, *_, last = np.flatnonzero(power > power.max() * 10 ** (FLOOR_DB / 10))[[0, 0, -1]]
    loud = power[first : last + 1] > power.max() * 10 ** (LOUD_DB / 10)
    return float(first * hop / rate), float((last + 1 - first) * hop / rate), "".join("01"[int(yes)] for yes in loud)


def trimmed(clip: Clip, skip: float, seconds: float) -> tuple[float, float]:
    """The part of a cut (`seconds` of `clip` from `skip`) between its first and its last loud frame: (skip, seconds),
    no seconds where no frame is. A clip that was never opened is loud throughout."""
    if not clip.loud:
        return skip, seconds
    frames = np.arange(len(clip.loud)) * FRAME
    inside = (frames >= skip - 1e-6) & (frames + FRAME <= skip + seconds + 1e-6)
    found = frames[inside & (np.frombuffer(clip.loud.encode(), dtype=np.uint8) == ord("1"))]
    return (float(found[0]), float(found[-1] + FRAME - found[0])) if len(found) else (skip, 0.0)


def _read(path: str) -> tuple[np.ndarray, int]:
    """First channel of a file, (time,) float32, and its rate. (SpatialSoundQA's rule: channel 0, never a mean.)"""
    from audio_llm import audio

    waveform = audio.decode(path)
    return np.ascontiguousarray(waveform.samples[0]), waveform.sample_rate


def _scan_one(path: str) -> tuple[float, float, str, bytes] | str:
    """What :func:`audible` says of a file, and a digest of what is heard of it; or why it cannot be used."""
    try:
        samples, rate = _read(path)
        content = hashlib.sha256(f"{rate}\n".encode() + samples.tobytes()).digest()
        return *audible(samples, rate), content
    except (AudioError, OSError) as error:
        return str(error)


def scan(
    library: Library, executor: Executor, *, shortest: float, progress: Callable[[Iterable[Any], int], Iterable[Any]]
) -> Library:
    """Open every file once and fill in its audible part; unreadable, silent and too short files become rejects.

    Copies of a sound count as one recording from then on, so that no split trains on one and tests on the other. Where
    they are in two classes one name at least is wrong, of which a warning tells.
    """
    files = [clip for clip in library.clips if clip.path]
    found = progress(executor.map(_scan_one, [clip.path or "" for clip in files], chunksize=8), len(files))
    clips, rejects = [clip for clip in library.clips if not clip.path], list(library.rejects)
    first_of: dict[bytes, Clip] = {}
    alike: list[tuple[str, str]] = []  # recordings
    misnamed: list[tuple[str, str]] = []
    for clip, result in zip(files, found, strict=True):
        if isinstance(result, str):
            rejects.append({"item": clip.name, "reason": result})
        elif result[1] < shortest:
            rejects.append(
                {"item": clip.name, "reason": f"audible for {result[1]:.2f} s, needed at least {shortest} s"}
            )
        else:
            start, seconds, loud, content = result
            clips.append(replace(clip, start=round(start, 4), seconds=round(seconds, 4), loud=loud))
            first = first_of.setdefault(content, clip)
            alike.append((first.recording, clip.recording))
            if clip.label != first.label:
                misnamed.append((clip.name, first.name))
    if misnamed:
        copy, first_name = misnamed[0]
        told = f"{copy} is the same sound as {first_name}, which is in another class"
        warnings.warn(f"sounds: {told}" + f" ({len(misnamed)} such files)" * (len(misnamed) > 1), stacklevel=2)
    whole = joined(alike)
    clips = [replace(clip, recording=whole.get(clip.recording, clip.recording)) for clip in clips]
    return replace(library, clips=clips, rejects=rejects)


@functools.lru_cache(maxsize=256)  # 256 five-second clips at 16 kHz are 80 MB; neighbouring scenes share recordings
def load(clip: Clip, sample_rate: int) -> np.ndarray:
    """The audible part of `clip` at `sample_rate`: (time,) float32, not level-normalised."""
    if clip.path is None:
        return procedural.synthesise(clip.label, clip.seed, clip.seconds, sample_rate)
    from audio_llm import audio

    samples, rate = _read(clip.path)
    part = samples[round(clip.start * rate) : round((clip.start + clip.seconds) * rate)]
    if len(part) < (clip.seconds - FRAME) * rate:  # its last frame may be a part of one
        expected, found = f"{clip.start + clip.seconds:g} s, as when it was scanned", f"{len(samples) / rate:g} s"
        raise AudioError(describe(clip.path, expected, found, "It was replaced since: begin anew."))
    return audio.resample(audio.Waveform(part[None], rate, "mono"), sample_rate).samples[0]


# ------------------------------------------------------------------------------------------------ splits


def parse_folds(texts: list[str]) -> dict[str, list[str]]:
    """``["train=1,2,3", "test=4"]`` → ``{"train": ["1", "2", "3"], "test": ["4"]}``."""
    folds: dict[str, list[str]] = {}
    for text in texts:
        name, sep, values = text.partition("=")
        if not sep or name not in SPLITS or not values:
            raise ConfigError(f"--folds '{text}': expected SPLIT=FOLD,FOLD with SPLIT one of {', '.join(SPLITS)}.")
        folds[name] = [value.strip() for value in values.split(",")]
    used = Counter(fold for values in folds.values() for fold in values)
    for fold, count in used.items():
        if count > 1:
            raise ConfigError(f"--folds: fold {fold} is given to {count} splits; a fold belongs to one.")
    return folds


def split(
    library: Library, fractions: dict[str, float], seed: int, folds: dict[str, list[str]] | None = None
) -> tuple[dict[str, list[Clip]], list[dict[str, str]]]:
    """Clips by split (seeded hash of the recording, or the corpus's own folds) and the classes that had to be left out.

    With `folds`, a split without folds of its own (validation) takes its fraction of the train folds' recordings.
    A class without a recording to train on or to test on is left out everywhere: both ask about the same classes.
    """
    wanted = {name: share for name, share in fractions.items() if share > 0}
    groups: dict[str, list[Clip]] = {name: [] for name in wanted}
    owners = {fold: name for name, values in (folds or {}).items() for fold in values}
    if folds:
        _check_folds(library, folds)
    inner = {name: share for name, share in wanted.items() if not folds or name == "train" or name not in folds}
    inner = {name: share for name, share in inner.items() if not folds or name != "test"}
    inner = {name: share / sum(inner.values()) for name, share in inner.items()}
    for clip in library.clips:
        side = owners.get(clip.fold or "") if folds else "train"
        if side is None:
            continue
        if side == "train":
            side = split_of(clip.recording, inner, seed)
        groups[side].append(clip)
    _keep_disjoint(groups)
    return _complete_classes(groups)


def _check_folds(library: Library, folds: dict[str, list[str]]) -> None:
    known = sorted({clip.fold for clip in library.clips if clip.fold})
    unknown = [fold for values in folds.values() for fold in values if fold not in known]
    if unknown:
        found = ", ".join(known) or "none (this layout has no folds)"
        raise ConfigError(describe("--folds", f"folds of the corpus ({found})", ", ".join(unknown)))
    if not {"train", "test"} <= set(folds):
        raise ConfigError("--folds: name at least train=… and test=….")


def _keep_disjoint(groups: dict[str, list[Clip]]) -> None:
    """A corpus's folds may still share a recording; the later split gives it up."""
    seen: set[str] = set()
    for name in ("test", "validation", "train"):
        if name in groups:
            groups[name] = [clip for clip in groups[name] if clip.recording not in seen]
            seen |= {clip.recording for clip in groups[name]}


def _complete_classes(groups: dict[str, list[Clip]]) -> tuple[dict[str, list[Clip]], list[dict[str, str]]]:
    recordings: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, clips in groups.items():
        for clip in clips:
            recordings[clip.label][name].add(clip.recording)
    rejects = []
    for label, sides in sorted(recordings.items()):
        empty = [name for name in groups if not sides[name] and name != "validation"]
        if empty:
            total = sum(len(found) for found in sides.values())
            reason = f"{total} recording{'s' if total > 1 else ''}, none of them in {', '.join(empty)}"
            rejects.append({"item": f"class {label}", "reason": reason})
    left_out = {reject["item"].removeprefix("class ") for reject in rejects}
    return {name: [clip for clip in clips if clip.label not in left_out] for name, clips in groups.items()}, rejects
