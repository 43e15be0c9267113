"""Dynamic sampling (Yu et al. 2025, "DAPO", §3.2): groups that teach nothing are drawn again, for other prompts.

A group whose replies all earn the same has no advantage and no gradient. Its prompt is replaced by one that the run's
order would come to after its end, so that nothing has to be remembered: which prompts stand by at a step follows from
the step alone, and a resumed run draws what an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from audio_llm.training.examples import Example, Examples
from audio_llm.training.order import RunSampler
from audio_llm.training.rollouts import Completion, timed

SAME_REWARD = 1e-9  # rewards are float32 sums of a few weighted parts; below this they differ by rounding alone


def flat_groups(totals: Sequence[float], size: int) -> list[int]:
    """Numbers of the groups, `size` rewards each, whose rewards do not differ."""
    groups = [totals[start : start + size] for start in range(0, len(totals), size)]
    return [number for number, group in enumerate(groups) if max(group) - min(group) <= SAME_REWARD]


class Reserve:
    """Prompts that stand by: the `order` of a run, continued behind its end."""

    def __init__(self, order: RunSampler):
        self.order = order
        self._epoch, self._places = -1, np.zeros(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        """Index of the prompt `position` places behind the end."""
        epoch, place = self.order.place(self.order.samples + position)
        if epoch != self._epoch:
            self._epoch, self._places = epoch, self.order.epoch(epoch)
        return int(self._places[place])

    def beside(self, batch: Sequence[int], start: int) -> Iterator[int]:
        """Indices from position `start` on that are not in `batch` when their turn comes; of as many as there are."""
        for position in range(start, start + len(self.order.shards)):
            if (index := self[position]) not in batch:
                yield index


class ResamplingTrainer:
    """A mix-in for the GRPO trainer: at most `resample_groups` groups of a generation batch are drawn again."""

    args: Any
    accelerator: Any
    num_iterations: Any
    processing_class: Any
    prompts: Examples
    rejects: Any
    reward_weights: Any
    _calculate_rewards: Any
    _draw: Any
    _encode: Any
    _metrics: Any
    _seconds: dict[str, float]
    _step: int

    def __init__(self, *args: Any, order: RunSampler, resample_groups: int = 0, **kwargs: Any) -> None:
        self.order, self.resample_groups, self.reserve = order, resample_groups, Reserve(order)
        self._places: list[int] = []  # of the generation batch's prompts, where some may have been drawn again
        self._replaced: list[int] = []  # of the prompts that others were drawn for
        super().__init__(*args, **kwargs)

    def _resample(self, rows: list[Example], places: Sequence[int], size: int) -> list[Completion]:
        """Replies to this process's `rows`, whose prompts stand at `places` of the data, `size` rows a group over all
        processes. Rows of groups that were drawn again get their new prompt."""
        batch = gather_object(list(places))[::size]
        first = self.accelerator.process_index * len(rows)
        group_of = [(first + row) // size for row in range(len(rows))]
        generation = self._step // (self.args.steps_per_generation * self.num_iterations)
        reserve = self.reserve.beside(batch, generation * self.resample_groups)
        drawn, left = self._draw(rows), self.resample_groups
        self._places, self._replaced = batch, []
        while left and (flat := self._flat(rows, drawn, size)):
            fresh = dict(zip(flat[:left], reserve, strict=False))
            if not fresh:
                break  # no other prompts in the data
            left -= len(fresh)
            for group, place in fresh.items():
                self._replaced.append(batch[group])
                batch[group] = place
            with timed(self._seconds, "load"):
                examples = {group: self.prompts[fresh[group]] for group in dict.fromkeys(group_of) if group in fresh}
                self.rejects.add([reject for example in examples.values() for reject in example.rejects])
                self._encode(list(examples.values()))
            changed = [row for row, group in enumerate(group_of) if group in examples]
            for row in changed:
                rows[row] = examples[group_of[row]]
            for row, completion in zip(changed, self._draw([rows[row] for row in changed]), strict=True):
                drawn[row] = completion
        self._metrics["train"]["groups/resampled"].append(float(self.resample_groups - left))
        return drawn

    def _flat(self, rows: Sequence[Example], drawn: Sequence[Completion], size: int) -> list[int]:
        """Numbers of the groups, of all processes, that teach nothing."""
        ids = [completion.token_ids for completion in drawn]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        inputs = [dict(row.row) for row in rows]
        rewards = self._calculate_rewards(inputs, [row["prompt"] for row in inputs], completions, ids)
        weights = self.reward_weights.to(rewards.device).double()
        return flat_groups((rewards.double() * weights).nansum(1).tolist(), size)
