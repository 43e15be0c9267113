"""Clips with events for supervised training: windows of the encoder, kept in memory when small, and augmented.

They come from shard folders, or from a folder of another data set (:func:`audio_llm.datasets.open_source`).
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audio_llm import audio, machine
from audio_llm.datasets import open_source
from audio_llm.errors import AudioLLMError, TrainingError, describe
from audio_llm.language.mirroring import mirror_events
from audio_llm.model.encoder import AudioEncoder
from audio_llm.shards.schema import Event
from audio_llm.tasks.base import Augmentation

_INT16 = 32767.0


class Clip(NamedTuple):
    """One window of the encoder: samples ``(channels, length)`` float32 and the events in it, times from its start."""

    samples: np.ndarray
    events: list[Event]
    number: int = -1  # of the sample that the window was cut from


class Mix(NamedTuple):
    """Row i of the batch is `share` of itself and the rest of row `partner`, at one level."""

    partner: Tensor  # (batch,) int64
    share: Tensor  # (batch,) float32


_NO_EVENTS = "no events"


class Batch(NamedTuple):
    waveform: Tensor  # (batch, channels, window) float32
    lengths: Tensor  # (batch,) int64
    events: list[list[Event]]
    numbers: list[int]  # of the samples that the windows were cut from
    mix: Mix | None = None


class ClipStore:
    """Random access to the windows of all samples of shard folders, or of a folder of another data set.

    Samples are decoded once and kept as 16-bit integers if that takes at most `memory_gib`, else at every access.
    A clip longer than the window is cut into windows from its start; the last one is shorter, or with `whole` (labels
    hold for the whole clip) begins earlier, so that it is as long as the others. `names` replace labels. A sample that
    cannot be used is left out and listed in `rejects`; more than a share of `max_reject_share` is a
    :class:`TrainingError`, as are folders in which no sample has events.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        encoder: AudioEncoder,
        *,
        folds: Sequence[str] | None = None,
        without: Sequence[str] = (),
        use_test_fold: bool = False,
        hearing: audio.Hearing = "refuse",
        whole: bool = False,
        names: Mapping[str, str] | None = None,
        memory_gib: float = 2.0,
        max_reject_share: float = 0.02,
    ) -> None:
        self.names = names or {}
        self.dataset = open_source(folders, folds, without, use_test_fold)
        self.name = ", ".join(str(folder) for folder in folders) + (f" folds {', '.join(folds)}" if folds else "")
        self.hearing, self.whole = hearing, whole
        self.sample_rate, self.layouts = encoder.sample_rate, encoder.layouts
        self.window, self.channels = encoder.window_samples, encoder.num_channels
        self.max_reject_share = max_reject_share
        audio.audible(self.layouts, hearing)
        self.rejects: list[dict[str, str]] = []
        self._corrupt: set[int] = set()  # samples that turned out so when they were read
        self._counting = threading.Lock()
        self.left_out: list[dict[str, str]] = list(getattr(self.dataset, "left_out", ()))  # not counted as samples
        self.unusable = [index.told() for index in getattr(self.dataset, "indexes", ())]  # of shards, a line each
        self._index: list[tuple[int, int, list[Event]]] = []  # (sample, window, events)
        for number in range(len(self.dataset)):
            self._add(number)
        self._check()
        self._lengths = np.zeros(len(self._index), dtype=np.int64)
        self._scales = np.ones(len(self._index), dtype=np.float32)
        self._cache: np.ndarray | None = None
        if len(self._index) * self.channels * self.window * 2 <= memory_gib * 2**30:
            self._fill()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def cached(self) -> bool:
        return self._cache is not None

    @property
    def labels(self) -> set[str]:
        return {event.label for _, _, events in self._index for event in events}

    @property
    def placed(self) -> bool:
        """Whether any event has an azimuth and a distance."""
        return any(
            event.azimuth is not None and event.distance is not None for _, _, events in self._index for event in events
        )

    @property
    def class_names(self) -> list[str]:
        """Classes in the order of the data's own numbers, where it has them; else the sorted labels of its events."""
        known = [self._name(label) for label in getattr(self.dataset, "labels", None) or ()]
        return list(dict.fromkeys(known)) or sorted(self.labels)

    def _name(self, label: str) -> str:
        return self.names.get(label, label)

    def __getitem__(self, number: int) -> Clip:
        sample, window, events = self._index[number]
        if self._cache is not None:
            stored = self._cache[number, :, : self._lengths[number]]
            return Clip(stored.astype(np.float32) * (self._scales[number] / _INT16), events, sample)
        return Clip(self._decode(sample)[window], events, sample)

    def readable(self, numbers: Iterable[int]) -> list[Clip]:
        """The clips of these `numbers` but for those that turn out corrupt, which are counted."""
        found = []
        for number in numbers:
            try:
                found.append(self[number])
            except AudioLLMError as error:
                self.reject(number, error)
        return found

    def reject(self, number: int, error: AudioLLMError) -> None:
        """Count the sample of clip `number`, once, however often and in how many windows its turn comes."""
        sample = self._index[number][0]
        with self._counting:
            if sample not in self._corrupt:
                self._corrupt.add(sample)
                self.rejects.append({"sample": str(sample), "reason": str(error)})
                self._check()

    def _add(self, number: int) -> None:
        """Index the windows of sample `number` from its JSON alone."""
        try:
            sample = self.dataset.load_sample(number)
        except AudioLLMError as error:
            self.rejects.append({"sample": str(number), "reason": str(error)})
            return
        silence = getattr(self.dataset, "annotates_all", False)  # no events, no sound
        if not sample.audio or not (sample.events or silence):
            self.rejects.append({"sample": sample.id, "reason": _NO_EVENTS})
            return
        if len(sample.audio) > 1:  # whose events they are is not told
            self.rejects.append(
                {"sample": sample.id, "reason": describe(sample.id, "one sound", f"{len(sample.audio)}")}
            )
            return
        length = sample.audio[0].seconds
        if length > audio.MAX_SECONDS:  # it would not be decoded either
            found = f"{length:.0f} s"
            reason = describe(sample.id, f"at most {audio.MAX_SECONDS:g} s of audio", found)
            self.rejects.append({"sample": sample.id, "reason": reason})
            return
        seconds = self.window / self.sample_rate
        events = [dataclasses.replace(event, label=self._name(event.label)) for event in sample.events]
        for window in range(max(1, math.ceil(length / seconds - 1e-4))):
            self._index.append((number, window, events_between(events, window * seconds, seconds)))

    def _check(self) -> None:
        total = len(self.dataset)
        if self._index and len(self.rejects) <= self.max_reject_share * total:
            return
        found = f"{len(self.rejects)} of {total} unusable"
        if self.rejects:
            first = self.rejects[0]
            found += f", the first: {first['sample']}: {first['reason']}"
        if all(reject["reason"] == _NO_EVENTS for reject in self.rejects):
            cure = "Supervised training needs 'events' in the samples' JSON; 'audio-llm inspect' shows what is there."
            raise TrainingError(describe(self.name, "samples with events", found, cure))
        cure = "Mend them or take them out, or raise max_reject_share."
        raise TrainingError(describe(self.name, f"at most {self.max_reject_share:.0%} unusable samples", found, cure))

    def _decode(self, number: int) -> list[np.ndarray]:
        waveform = self.dataset.load_waveform(number)
        name = f"{self.name}: sample {number}"
        waveform = audio.resample(audio.hear(waveform, self.layouts, self.hearing, name=name), self.sample_rate)
        pieces = audio.windows(waveform.samples, self.window, 10**6, name=name)
        if self.whole and len(pieces) > 1:
            pieces[-1] = waveform.samples[:, -self.window :]
        return pieces

    def _fill(self) -> None:
        """Decode everything, in threads (libsndfile and soxr release the interpreter lock)."""
        from tqdm import tqdm

        cache = np.zeros((len(self._index), self.channels, self.window), dtype=np.int16)
        rows: dict[int, list[tuple[int, int]]] = {}
        for row, (sample, window, _) in enumerate(self._index):
            rows.setdefault(sample, []).append((row, window))

        def decode(sample: int) -> str | None:
            try:
                pieces = self._decode(sample)
            except AudioLLMError as error:
                return str(error)
            for row, window in rows[sample]:
                if window >= len(pieces):
                    return f"audio shorter than its JSON says (window {window})"
                piece = pieces[window]
                self._lengths[row] = piece.shape[1]
                self._scales[row] = max(1.0, float(np.abs(piece).max()))
                cache[row, :, : piece.shape[1]] = np.rint(piece * (_INT16 / self._scales[row]))
            return None

        with ThreadPoolExecutor(machine.cpus()) as pool:
            outcomes = pool.map(decode, rows)
            for sample, reason in zip(rows, tqdm(outcomes, total=len(rows), desc="decode", leave=False), strict=True):
                if reason is not None:
                    self.rejects.append({"sample": str(sample), "reason": reason})
        kept = np.flatnonzero(self._lengths)
        self._index = [self._index[row] for row in kept]
        if len(kept) < len(cache):
            cache, self._lengths, self._scales = cache[kept], self._lengths[kept], self._scales[kept]
        self._cache = cache
        self._check()


def events_between(events: Iterable[Event], start: float, seconds: float) -> list[Event]:
    """The parts of `events` within a window, with times counted from its start."""
    inside = []
    for event in events:
        onset = max((event.onset or 0.0) - start, 0.0)
        offset = min((math.inf if event.offset is None else event.offset) - start, seconds)
        if offset > onset:
            inside.append(dataclasses.replace(event, onset=onset, offset=offset))
    return inside


def mirror(samples: np.ndarray, events: list[Event]) -> tuple[np.ndarray, list[Event]]:
    """The scene seen in a mirror: left and right swapped (two channels) or Y negated (FOA); azimuths change sign."""
    if samples.shape[0] == 2:
        samples = samples[::-1]
    elif samples.shape[0] == 4:
        samples = samples * np.array([[1], [-1], [1], [1]], dtype=np.float32)
    return samples, mirror_events(events)


def shift(samples: np.ndarray, events: list[Event], offset: int, sample_rate: int) -> tuple[np.ndarray, list[Event]]:
    """Move the scene by `offset` samples within its length; what moves in is silence."""
    moved = np.zeros_like(samples)
    if offset >= 0:
        moved[:, offset:] = samples[:, : samples.shape[1] - offset]
    else:
        moved[:, :offset] = samples[:, -offset:]
    delta = offset / sample_rate
    return moved, [
        dataclasses.replace(event, onset=(event.onset or 0.0) + delta, offset=(event.offset or 0.0) + delta)
        for event in events
    ]


def augment(clip: Clip, switches: Augmentation, rng: np.random.Generator, sample_rate: int) -> Clip:
    """One clip's augmentation; the same number of draws for every clip, so that one switch does not move the others."""
    samples, events, number = clip
    flip, gain, where = rng.random(3)
    around, speed = rng.random(2) if switches.clip_level else (0.5, 0.5)
    if switches.swap and flip < 0.5 and samples.shape[0] > 1:
        samples, events = mirror(samples, events)
    if switches.gain_db:
        samples = samples * np.float32(10 ** ((2 * gain - 1) * switches.gain_db / 20))
    if switches.shift_seconds and events and all(event.offset is not None for event in events):
        end = samples.shape[1] / sample_rate
        low = max(-switches.shift_seconds, -min(event.onset or 0.0 for event in events))
        high = min(switches.shift_seconds, end - max(event.offset or end for event in events))
        if high > low:
            samples, events = shift(samples, events, round((low + where * (high - low)) * sample_rate), sample_rate)
    if switches.speed:
        samples = resampled(samples, 1.0 + (2 * speed - 1) * switches.speed)
    if switches.roll_seconds:
        samples = np.roll(samples, round((2 * around - 1) * switches.roll_seconds * sample_rate), axis=1)
    return Clip(samples, events, number)


def overlay(clips: Sequence[Clip], share: float, rng: np.random.Generator) -> list[Clip]:
    """A `share` of `clips` with another one's sound added and its events beside its own: sound pressures add up."""
    partner, drawn = rng.permutation(len(clips)), rng.random(len(clips)) < share
    mixed = []
    for row, clip in enumerate(clips):
        other = clips[partner[row]]
        if not drawn[row] or partner[row] == row:
            mixed.append(clip)
            continue
        samples = np.zeros((clip.samples.shape[0], max(clip.samples.shape[1], other.samples.shape[1])), np.float32)
        samples[:, : clip.samples.shape[1]] = clip.samples
        samples[:, : other.samples.shape[1]] += other.samples
        mixed.append(clip._replace(samples=samples, events=[*clip.events, *other.events]))
    return mixed


def resampled(samples: np.ndarray, speed: float) -> np.ndarray:
    """Played `speed` times as fast in the same length: cut at the end, or begun anew.

    Interpolation is linear: it dulls the highest octave a little, which is an augmentation too.
    """
    length = samples.shape[1]
    place = (np.arange(length) * speed) % length
    return np.stack([np.interp(place, np.arange(length), row) for row in samples]).astype(np.float32)


def mix_clips(clips: Sequence[Clip], alpha: float, rng: np.random.Generator) -> tuple[list[Clip], Mix]:
    """Between-class mixing: every clip with a partner of its batch, both at the clip's own level.

    Shares are of amplitude; a clip without any sound is left as it is.
    """
    partner = rng.permutation(len(clips))
    share = rng.beta(alpha, alpha, len(clips)).astype(np.float32)
    levels = [float(np.sqrt(np.mean(np.square(clip.samples)))) for clip in clips]
    mixed = []
    for row, clip in enumerate(clips):
        other = clips[partner[row]]
        if min(levels[row], levels[partner[row]]) == 0.0:
            share[row] = 1.0
            mixed.append(clip)
            continue
        samples = np.zeros((clip.samples.shape[0], max(clip.samples.shape[1], other.samples.shape[1])), np.float32)
        samples[:, : clip.samples.shape[1]] = share[row] * clip.samples
        ratio = levels[row] / levels[partner[row]]
        samples[:, : other.samples.shape[1]] += (1 - share[row]) * ratio * other.samples
        mixed.append(clip._replace(samples=samples))
    return mixed, Mix(torch.from_numpy(partner), torch.from_numpy(share))


def collate(clips: Sequence[Clip], channels: int, window: int, mix: Mix | None = None) -> Batch:
    """Zero-pad to the window."""
    waveform = np.zeros((len(clips), channels, window), dtype=np.float32)
    for row, clip in enumerate(clips):
        waveform[row, :, : clip.samples.shape[1]] = clip.samples
    lengths = torch.tensor([clip.samples.shape[1] for clip in clips])
    numbers = [clip.number for clip in clips]
    return Batch(torch.from_numpy(waveform), lengths, [clip.events for clip in clips], numbers, mix)


class BatchPlan:
    """Which clips are in which step: a seeded permutation per epoch, cut into global batches that may cross epochs.

    Everything is a function of (seed, step, rank), so a resumed run needs the step and nothing else.
    """

    def __init__(self, store: ClipStore, switches: Augmentation, *, batch_size: int, seed: int, rank: int, world: int):
        if batch_size % world:
            raise TrainingError(describe("batch_size", f"a multiple of {world} processes", str(batch_size)))
        self.store, self.switches = store, switches
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """This rank's clips of global batch `step`."""
        first = step * self.batch_size
        return [self._clip(position) for position in range(first + self.rank, first + self.batch_size, self.world)]

    def _clip(self, position: int) -> int:
        epoch, place = divmod(position, len(self.store))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.store))
        return int(self._order[place])

    def batches(self, step: int) -> Iterator[Batch]:
        """Batches from global batch `step` on, without end; one is made ahead, in a thread."""
        with ThreadPoolExecutor(1) as ahead:
            upcoming = ahead.submit(self.batch, step)
            while True:
                step += 1
                batch, upcoming = upcoming.result(), ahead.submit(self.batch, step)
                yield batch

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step, self.rank, 1])
        if self.store.cached:
            clips = [self._load(index) for index in self.indices(step)]
        else:
            with ThreadPoolExecutor(machine.cpus()) as pool:
                clips = list(pool.map(self._load, self.indices(step)))
        clips = [augment(clip, self.switches, rng, self.store.sample_rate) for clip in clips]
        if self.switches.overlay:
            clips = overlay(clips, self.switches.overlay, rng)
        mix = None
        if self.switches.mixup:
            clips, mix = mix_clips(clips, self.switches.mixup, rng)
        return collate(clips, self.store.channels, self.store.window, mix)

    def _load(self, number: int) -> Clip:
        """The clip, or the next one that can be read: a sample that turns out corrupt is counted and passed over."""
        for attempt in range(len(self.store)):
            try:
                return self.store[(number + attempt) % len(self.store)]
            except AudioLLMError as error:
                self.store.reject((number + attempt) % len(self.store), error)
        raise TrainingError(describe(self.store.name, "a readable sample", "none"))


def spec_augment(switches: Augmentation) -> Any:
    """SpecAugment (Park et al. 2019) on ``(batch, maps, frames, mels)``: `masks` each way per clip, filled with 0."""

    def mask(maps: Tensor) -> Tensor:
        batch, _, frames, mels = maps.shape
        keep = torch.ones(batch, 1, frames, mels, dtype=torch.bool, device=maps.device)
        for _ in range(switches.masks):
            draws = torch.rand(4, batch, 1, device=maps.device)
            for size, widest, width, start, axis in (
                (frames, switches.time_mask, draws[0], draws[1], -1),
                (mels, switches.frequency_mask, draws[2], draws[3], -2),
            ):
                length = width * widest
                first = start * (size - length)
                place = torch.arange(size, device=maps.device)
                keep &= ~((place >= first) & (place < first + length)).unsqueeze(1).unsqueeze(axis)
        return maps * keep

    return mask if switches.frequency_mask or switches.time_mask else None
