"""The order of a run whose prompts come in pairs: a scene, and the same scene with one cause changed."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from audio_llm.errors import ConfigError, describe
from audio_llm.language.clauses import check_told
from audio_llm.shards.reader import ShardDataset
from audio_llm.training.counterfactual import NAME
from audio_llm.training.order import RunSampler


class PairedOrder(RunSampler):
    """The order of a run in which every sample with counterfactuals is followed by one of them, another one from epoch
    to epoch; all other samples come two by two, so that no pair is cut by a step of an even number of prompts."""

    def __init__(self, shards: ShardDataset, seed: int, samples: int, weights: Sequence[float] | None = None):
        if weights is not None:
            cure = "Choose the share of pairs by the counts of the folders."
            raise ConfigError(describe(f"rewards: {NAME}", "folders of data.train without weights", "weights", cure))
        super().__init__(shards, seed, samples)
        if not self.others:
            cure = "Make pairs with audio-llm prep, by the key counterfactuals of a subset."
            raise ConfigError(describe(f"rewards: {NAME}", "samples with a counterfactual in data.train", "none", cure))

    @cached_property
    def others(self) -> dict[int, list[int]]:
        """The counterfactuals of each sample that has some, by places in the shards."""
        samples = [self.shards.load_sample(place) for place in range(len(self.shards))]
        folders = [str(self.shards.locate(place)[0]) for place in range(len(samples))]
        places = {(folders[place], sample.id): place for place, sample in enumerate(samples)}
        found: dict[int, list[int]] = defaultdict(list)
        lost: list[str] = []
        for place, sample in enumerate(samples):
            about = sample.meta.get(NAME)
            if about is None:
                continue
            check_told(about, sample.id)
            before = places.get((folders[place], about["of"]))
            if before is not None:
                found[before].append(place)
            else:
                lost.append(f"'{sample.id}' of '{about['of']}' in {folders[place]}")
        if lost:
            text = f"{len(lost)} counterfactuals lack the scene that they were made of and are asked alone"
            warnings.warn(f"rewards: {NAME}: {text}; the first: {lost[0]}", stacklevel=2)
        return dict(found)

    @cached_property
    def _alone(self) -> np.ndarray:
        """Which samples are no part of a pair, (n,) bool."""
        alone = np.ones(len(self.shards), dtype=bool)
        for place, others in self.others.items():
            alone[[place, *others]] = False
        return alone

    def epoch(self, number: int) -> np.ndarray:
        order: list[int] = []
        waiting: list[int] = []
        for place in super().epoch(number).tolist():
            if place in self.others:
                order += [place, self.others[place][number % len(self.others[place])]]
            elif self._alone[place]:
                waiting.append(place)
                if len(waiting) == 2:
                    order += waiting
                    waiting = []
        return np.array(order, dtype=np.int64)

    @property
    def epoch_size(self) -> float:
        return float(2 * len(self.others) + 2 * (int(self._alone.sum()) // 2))

    def place(self, position: int) -> tuple[int, int]:
        return divmod(position, int(self.epoch_size))
