"""Reading shards: map style by byte ranges, and an endless stream whose order is a function of its coordinates.

The stream is a pure function of (seed, epoch, step): neither the number of workers nor the number of ranks changes
which samples meet in a global batch, so a run that was killed resumes in mid-epoch with the same batches, also on
another number of workers. Every batch carries its coordinates.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from audio_llm.audio import Waveform, check_format, decode
from audio_llm.errors import AudioError, AudioLLMError, ShardError, describe
from audio_llm.files import glance
from audio_llm.shards.index import Row, ShardIndex, read_sizes
from audio_llm.shards.schema import Sample

MAX_OPEN_SHARDS = 64  # far below the usual limit of 1024 descriptors per process
MAX_SECONDS = 600.0  # of a clip whose JSON does not state its length


class ShardDataset(Dataset[dict[str, Any]]):
    """Map-style samples of one or several shard folders, read by ``os.pread`` of their byte ranges.

    ``dataset[i]`` is ``{"sample": Sample, "waveform": Waveform, "coordinates": {"index", "shard", "key"}}``;
    without `decode` there is no waveform. `layouts` and `sample_rate` are an encoder's: a sample that does not fit is
    an :class:`AudioError` naming both sides when the dataset is made, not in the middle of a run. Pickles into workers
    (fork and spawn); open files stay behind.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        *,
        decode: bool = True,
        layouts: Sequence[str] | None = None,
        sample_rate: int | None = None,
        verify: bool = False,
        max_reject_share: float = 0.01,
    ) -> None:
        listed = [folders] if isinstance(folders, (str, Path)) else list(folders)
        if not listed:
            raise ShardError(describe("shard dataset", "at least one folder", "none"))
        self.decode = decode
        self.layouts = tuple(layouts) if layouts is not None else None
        self.sample_rate = sample_rate
        self.indexes = [ShardIndex.load(folder, verify, max_reject_share) for folder in listed]
        self._starts = np.cumsum([0] + [len(index) for index in self.indexes])
        # Columns over all folders: reading a sample must cost less than decoding it, so it builds no index rows.
        firsts = np.cumsum([0] + [len(index.shards) for index in self.indexes])
        self._paths = [str(index.folder / shard) for index in self.indexes for shard in index.shards]
        self.shard_ids = np.concatenate(
            [index.shard_of.astype(np.int64) + first for index, first in zip(self.indexes, firsts, strict=False)]
        )  # (samples,) the shard of every sample, counted over all folders
        self._ranges = np.concatenate([index.ranges for index in self.indexes])
        self._descriptors: dict[int, int] = {}
        self._check_formats()

    def __len__(self) -> int:
        return len(self.shard_ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = self._position(i)
        sample = self.load_sample(i)
        path = self._paths[self.shard_ids[i]]
        coordinates = {"index": i, "shard": path, "key": sample.id}
        if not self.decode:
            return {"sample": sample, "coordinates": coordinates}
        return {"sample": sample, "waveform": self._waveform(i, sample), "coordinates": coordinates}

    def load_sample(self, i: int) -> Sample:
        """The JSON of sample `i`; the audio is not touched."""
        i = self._position(i)
        shard = int(self.shard_ids[i])
        offset, size = self._ranges[i, :2].tolist()
        return Sample.from_trusted_json(self._read(shard, offset, size), self._paths[shard])

    def load_waveform(self, i: int) -> Waveform:
        """The decoded audio of sample `i`, checked against what its JSON says of rate, layout and length."""
        return self._waveform(self._position(i), self.load_sample(i))

    def load_audio_bytes(self, i: int) -> bytes:
        """The audio member of sample `i` as it is stored."""
        i = self._position(i)
        offset, size = self._ranges[i, 2:].tolist()
        return self._read(int(self.shard_ids[i]), offset, size)

    def locate(self, i: int) -> tuple[Path, Row]:
        """The folder and the index row of sample `i`."""
        i = self._position(i)
        which = int(np.searchsorted(self._starts, i, side="right")) - 1
        index = self.indexes[which]
        return index.folder, index.row(i - int(self._starts[which]))

    def row(self, i: int) -> Row:
        """The index row of sample `i`."""
        return self.locate(i)[1]

    @property
    def fingerprint(self) -> str:
        """Of the checksums in ``sizes.json``, and of what :func:`audio_llm.files.glance` sees of the shards."""
        facts = [[read_sizes(index.folder), [glance(index.folder / s) for s in index.shards]] for index in self.indexes]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def find(self, key: str) -> int:
        """The position of the sample with this id; :class:`ShardError` if there is none."""
        for start, index in zip(self._starts, self.indexes, strict=False):
            hits = np.flatnonzero(index.keys == key.encode())
            if len(hits):
                return int(start + hits[0])
        folders = ", ".join(str(index.folder) for index in self.indexes)
        raise ShardError(describe(folders, f"a sample '{key}'", f"{len(self)} samples, none with that id"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def close(self) -> None:
        """Close the open shards; they open again when needed."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def __del__(self) -> None:
        if getattr(self, "_descriptors", None):
            self.close()

    def _position(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(i) % len(self)

    def _waveform(self, i: int, sample: Sample) -> Waveform:
        name = f"{self._paths[self.shard_ids[i]]}: {sample.id}"
        data = self.load_audio_bytes(i)
        info = sample.audio
        if info is None:
            waveform = decode(data, name=name, max_seconds=MAX_SECONDS)
            check_format(
                waveform.layout, waveform.sample_rate, layouts=self.layouts, sample_rate=self.sample_rate, name=name
            )
            return waveform
        waveform = decode(data, layout=info.layout, name=name, max_seconds=info.seconds + 1)
        if waveform.sample_rate != info.sample_rate or abs(waveform.seconds - info.seconds) * info.sample_rate > 1:
            expected = f"{info.seconds} s at {info.sample_rate} Hz, as its JSON says"
            raise AudioError(describe(name, expected, f"{waveform.seconds:.6f} s at {waveform.sample_rate} Hz"))
        return waveform

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            descriptor = self._descriptors.get(shard)
            if descriptor is None:
                if len(self._descriptors) >= MAX_OPEN_SHARDS:
                    os.close(self._descriptors.pop(next(iter(self._descriptors))))
                descriptor = self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY)
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise ShardError(describe(self._paths[shard], "a readable shard", error.strerror or str(error))) from error
        if len(data) != size:
            found = f"{len(data)}: the shard became shorter"
            raise ShardError(describe(self._paths[shard], f"{size} bytes at {offset}", found))
        return data

    def _check_formats(self) -> None:
        if self.layouts is None and self.sample_rate is None:
            return
        for index in self.indexes:
            pairs, first = np.unique(np.stack([index.layouts, index.sample_rates]), axis=1, return_index=True)
            for position in first[pairs[0] >= 0]:
                row = index.row(int(position))
                name = f"{index.folder / row.shard}: {row.key}"
                check_format(
                    str(row.layout), row.sample_rate, layouts=self.layouts, sample_rate=self.sample_rate, name=name
                )


def epoch_order(dataset: ShardDataset, seed: int, epoch: int, window: int = 8) -> np.ndarray:
    """A permutation ``(samples,)`` int64: shards shuffled, then samples shuffled within each `window` of shards.

    A window bounds how many files are read at a time, so a cold disk reads almost in sequence. ``window=0`` keeps the
    stored order.
    """
    shard_ids = dataset.shard_ids
    if window < 1:
        return np.arange(len(shard_ids))
    generator = np.random.default_rng([seed, epoch])
    shards = generator.permutation(int(shard_ids.max()) + 1)
    rank_of_shard = np.argsort(shards)
    by_window = generator.permutation(len(shard_ids))
    return by_window[np.argsort(rank_of_shard[shard_ids[by_window]] // window, kind="stable")]


class ShardStream(IterableDataset[dict[str, Any]]):
    """Batches of a :class:`ShardDataset` for one rank: ``{"items": [...], "coordinates": {...}, "rejects": [...]}``.

    Step `s` of rank `r` is slice ``[r·b, (r+1)·b)`` of the global batch `s`, whose size is ``batch_size × world``; so
    one rank with a batch of 4 and two ranks with 2 see the same global batches. All ranks have equally many steps: the
    rest of an epoch that fills no global batch is left out (``last="drop"``) or filled up from the epoch's beginning
    (``last="pad"``). Worker `w` of `n` makes batches `w, w + n, ...`, which a DataLoader with ``batch_size=None`` puts
    back in order (use :class:`StreamLoader`).

    Without `epochs` it never ends. A sample whose audio cannot be decoded is replaced by the next one of the epoch,
    and listed in ``rejects``; above `max_reject_share` (of at least 100 samples) the stream stops with
    :class:`ShardError`.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        window: int = 8,
        last: str = "drop",
        epochs: int | None = None,
        state: dict[str, Any] | None = None,
        max_reject_share: float = 0.01,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world or last not in ("drop", "pad"):
            raise ValueError(
                f"batch_size={batch_size}, rank={rank} of world={world}, last={last!r} do not fit together"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.window = window
        self.last = last
        self.epochs = epochs
        self.max_reject_share = max_reject_share
        self.epoch = 0
        self.step = 0
        whole, rest = divmod(len(dataset), batch_size * world)
        self.steps_per_epoch = whole + (1 if rest and last == "pad" else 0)
        if self.steps_per_epoch == 0:
            raise ShardError(
                describe(
                    "shard stream",
                    f"at least one global batch of {batch_size} × {world} ranks",
                    f"{len(dataset)} samples",
                    "Use a smaller batch, more data, or last='pad'.",
                )
            )
        if state is not None:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Coordinates of the next batch, plus what must be the same for them to mean the same."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; :class:`ShardError` if the stream would be another one."""
        for name, value in self._identity().items():
            if state.get(name, value) != value:
                raise ShardError(describe(f"resume of the shard stream: {name}", str(state[name]), str(value)))
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "window": self.window,
            "last": self.last,
            "samples": len(self.dataset),
            "global_batch": self.batch_size * self.world,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)  # one decoding thread per worker; more only fight over the cores
        first, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        start = self.epoch * self.steps_per_epoch + self.step
        served = rejected = 0
        order_epoch, order = -1, np.empty(0, np.int64)
        position = start + first
        while self.epochs is None or position < self.epochs * self.steps_per_epoch:
            epoch, step = divmod(position, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self.dataset, self.seed, epoch, self.window)
            batch = self._batch(order, epoch, step)
            served += len(batch["items"])
            rejected += len(batch["rejects"])
            self._check_rejects(served, rejected, batch["rejects"])
            if worker is None:
                self.epoch, self.step = divmod(position + 1, self.steps_per_epoch)
            yield batch
            position += stride

    def _batch(self, order: np.ndarray, epoch: int, step: int) -> dict[str, Any]:
        begin = (step * self.world + self.rank) * self.batch_size
        items: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        for slot in range(begin, begin + self.batch_size):
            for attempt in range(len(order)):
                index = int(order[(slot + attempt) % len(order)])
                try:
                    items.append(self.dataset[index])
                    break
                except (AudioError, ShardError) as error:
                    rejects.append({"index": index, "reason": str(error)})
        if len(items) < self.batch_size:
            raise ShardError(f"no sample of {len(order)} can be read. Last one: {rejects[-1]['reason']}")
        coordinates = {
            "epoch": epoch,
            "step": step,
            "rank": self.rank,
            "world": self.world,
            "indices": [item["coordinates"]["index"] for item in items],
        }
        return {"items": items, "coordinates": coordinates, "rejects": rejects}

    def _check_rejects(self, served: int, rejected: int, rejects: list[dict[str, Any]]) -> None:
        if rejects and served + rejected >= 100 and rejected > self.max_reject_share * (served + rejected):
            raise ShardError(
                describe(
                    "shard stream",
                    f"at most {self.max_reject_share:.1%} unreadable samples",
                    f"{rejected} of {served + rejected}",
                    f"Last one: {rejects[-1]['reason']}",
                )
            )


class StreamLoader:
    """A :class:`ShardStream` behind worker processes, which knows the coordinates of the last batch it gave out.

    Yields ``{"batch": collate(items), "coordinates": ..., "rejects": ...}``. ``state_dict()`` is taken in the main
    process and counts only batches that were handed out, not those that workers prepared ahead.
    """

    def __init__(
        self,
        stream: ShardStream,
        *,
        num_workers: int = 0,
        collate: Callable[[list[dict[str, Any]]], Any] | None = None,
        prefetch_factor: int = 2,
        context: str | None = None,
    ) -> None:
        self.stream = stream
        self.num_workers = num_workers
        self.collate = _Collate(collate)
        self.prefetch_factor = prefetch_factor
        self.context = context
        self.rejects: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream = self.stream
        options: dict[str, Any] = {"batch_size": None, "collate_fn": self.collate, "num_workers": self.num_workers}
        if self.num_workers:
            options |= {"prefetch_factor": self.prefetch_factor, "multiprocessing_context": self.context}
        loader: DataLoader[Any] = DataLoader(_Guarded(stream), **options)
        for batch in loader:
            if "error" in batch:
                raise batch["error"]
            place = batch["coordinates"]
            position = place["epoch"] * stream.steps_per_epoch + place["step"] + 1
            stream.epoch, stream.step = divmod(position, stream.steps_per_epoch)
            self.rejects += batch["rejects"]
            yield batch


class _Guarded(IterableDataset[dict[str, Any]]):
    """Carries an error out of a worker as a value: a DataLoader would wrap its message into a traceback."""

    def __init__(self, stream: ShardStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.stream
        except AudioLLMError as error:
            yield {"error": error}


class _Collate:
    """Applies the caller's collate function to the items and keeps the coordinates beside the result."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any] | None) -> None:
        self.collate = collate

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "error" in batch:
            return batch
        items = batch.pop("items")
        return {"batch": self.collate(items) if self.collate else items, **batch}
