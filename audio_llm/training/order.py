"""In which order a run reads its samples: of an epoch, and of the whole run; the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from audio_llm.shards.reader import ShardDataset


class RunSampler(Sampler[int]):
    """Indices of the whole run, epoch after epoch without a seam: a step never is cut short by the end of an epoch."""

    def __init__(self, shards: ShardDataset, seed: int, samples: int):
        self.shards, self.seed, self.samples = shards, seed, samples

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        left, epoch = self.samples, 0
        while left > 0:
            order = epoch_order(self.shards, self.seed, epoch)[:left]
            yield from order.tolist()
            left, epoch = left - len(order), epoch + 1


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
