"""In which order a run reads its samples: of an epoch, and of the whole run; the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from audio_llm.shards.reader import ShardDataset


class RunSampler(Sampler[int]):
    """Indices of the whole run, epoch after epoch without a seam: a step never is cut short by the end of an epoch.

    `weights` are passes over each folder of `shards` in one epoch; None: one over each.
    """

    def __init__(self, shards: ShardDataset, seed: int, samples: int, weights: Sequence[float] | None = None):
        self.shards, self.seed, self.samples = shards, seed, samples
        self.weights = weights

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        left, epoch = self.samples, 0
        while left > 0:
            order = self.epoch(epoch)[:left]
            yield from order.tolist()
            left, epoch = left - len(order), epoch + 1

    def epoch(self, number: int) -> np.ndarray:
        """The order ``(n,)`` int64 of one epoch; under weights `n` may differ by one a folder from epoch to epoch."""
        return epoch_order(self.shards, self.seed, number, weights=self.weights)

    @property
    def epoch_size(self) -> float:
        """Samples of an epoch, on average."""
        return float(sum(size * weight for size, weight in _weighted(folder_sizes(self.shards), self.weights)))

    def place(self, position: int) -> tuple[int, int]:
        """The epoch of the sample at `position` of the run, and its place there."""
        sizes, epoch = folder_sizes(self.shards), int(position // self.epoch_size)
        while _before(sizes, self.weights, epoch) > position:
            epoch -= 1
        while _before(sizes, self.weights, epoch + 1) <= position:
            epoch += 1
        return epoch, position - _before(sizes, self.weights, epoch)


def folder_sizes(dataset: ShardDataset) -> list[int]:
    """Samples of each folder."""
    return [len(index) for index in dataset.indexes]


def _weighted(sizes: Sequence[int], weights: Sequence[float] | None) -> list[tuple[int, float]]:
    return [(size, 1.0) for size in sizes] if weights is None else list(zip(sizes, weights, strict=True))


def _before(sizes: Sequence[int], weights: Sequence[float] | None, epoch: int) -> int:
    """Samples of all epochs before `epoch`."""
    return sum(int(epoch * weight * size) for size, weight in _weighted(sizes, weights))


def _drawn(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Indices ``(n,)`` of an epoch, folder by folder: each goes on in its own shuffled passes where the epoch before
    left off, so that no sample is drawn a second time before all of its folder have been drawn."""
    parts, first = [], 0
    for folder, (size, weight) in enumerate(_weighted(sizes, weights)):
        start, stop = int(epoch * weight * size), int((epoch + 1) * weight * size)
        for turn in range(start // size, -(-stop // size)) if size else ():
            order = np.random.default_rng([seed, folder, turn]).permutation(size)
            parts.append(first + order[max(start - turn * size, 0) : stop - turn * size])
        first += size
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def epoch_order(
    dataset: ShardDataset, seed: int, epoch: int, window: int = 8, weights: Sequence[float] | None = None
) -> np.ndarray:
    """A permutation ``(samples,)`` int64: shards shuffled, then samples shuffled within each `window` of shards.

    A window bounds how many files are read at a time, so a cold disk reads almost in sequence. ``window=0`` keeps the
    stored order. With `weights`, passes over each folder in an epoch, it is an order of the samples drawn.
    """
    shard_ids = dataset.shard_ids
    drawn = np.arange(len(shard_ids)) if weights is None else _drawn(folder_sizes(dataset), weights, seed, epoch)
    if window < 1:
        return drawn
    generator = np.random.default_rng([seed, epoch])
    shards = generator.permutation(int(shard_ids.max()) + 1)
    rank_of_shard = np.argsort(shards)
    by_window = generator.permutation(drawn)
    return by_window[np.argsort(rank_of_shard[shard_ids[by_window]] // window, kind="stable")]
