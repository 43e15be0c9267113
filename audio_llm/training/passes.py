"""How the samples of a step are dealt out to its passes: by length, so that little of a batch is padding.

SFT's samples are dealt one by one, for the loss of a step is a mean over all of their tokens. GRPO's replies are dealt
by whole groups: TRL pads all replies of a rollout to the longest of them and shuffles the rows, so that a pass computes
for every reply as many tokens as the longest of the whole rollout has, most of them padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from audio_llm.training.examples import Example

PER_TOKEN = (  # (rows, tokens of a reply); `importance_sampling_ratio` may also be (rows, 1)
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "sampling_per_token_logps",
    "old_per_token_logps",
    "ref_per_token_logps",
    "importance_sampling_ratio",
)


def dealt_by_length(batches: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """The examples of `batches` in as many batches of the same sizes, the longest in the first: a machine that is too
    small for a step says so at its beginning."""
    rest = iter(sorted((example for batch in batches for example in batch), key=lambda one: -len(one.ids)))
    return [list(islice(rest, len(batch))) for batch in batches]


class PassesByLength:
    """A mix-in for SFT's trainer. The samples of a step stay the same and its loss is a mean over all of their tokens,
    so what is learnt does not change. Each process deals out its own samples; a step of one pass is left as it is."""

    args: Any
    data_collator: Any

    def get_train_dataloader(self) -> Any:
        if self.args.gradient_accumulation_steps == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        collate, self.data_collator = self.data_collator, list  # rows are padded once their pass is known
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = collate

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        if self.args.gradient_accumulation_steps > 1:
            passes = dealt_by_length(list(islice(epoch_iterator, num_batches)))
            epoch_iterator = iter([self.data_collator(examples) for examples in passes])
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]


def gather_groups(
    batches: list[dict[str, Any]], by_length: bool = False, idle_first: bool = False
) -> list[dict[str, Any]]:
    """The rows of shuffled `batches` (equal sizes, same keys, ``prompts`` among them) dealt out anew, the rows of a
    group together: groups in the order of their first rows, or `by_length` from short to long longest replies, with
    `idle_first` behind the groups that have no advantage. That is for batches of one update, whose gradients are
    summed: of several, the first would learn from short replies.
    """
    size, width = len(batches[0]["prompts"]), len(batches)
    prompts = [prompt for batch in batches for prompt in batch["prompts"]]
    places = dict.fromkeys(prompts, (False, 0))  # whether it teaches, its longest reply
    if by_length:
        lengths = torch.cat([batch["completion_mask"].sum(1) for batch in batches]).tolist()
        teaches = (torch.cat([batch["advantages"] for batch in batches]) != 0).tolist()
        for prompt, length, some in zip(prompts, lengths, teaches, strict=True):
            before, longest = places[prompt]
            places[prompt] = (before or (idle_first and some), max(longest, length))
    rank = {prompt: number for number, prompt in enumerate(sorted(places, key=places.__getitem__))}  # a stable sort
    order = sorted(range(len(prompts)), key=lambda row: rank[prompts[row]])
    dealt: list[dict[str, Any]] = [dict(batch) for batch in batches]
    for name, value in batches[0].items():
        rows: Tensor | list[Any]
        if isinstance(value, Tensor) and value.ndim:
            rows = torch.cat([batch[name] for batch in batches])[order]
        elif isinstance(value, list):
            whole = [entry for batch in batches for entry in batch[name]]
            rows = [whole[row] for row in order]
        else:
            continue
        for number in range(width):
            dealt[number][name] = rows[number * size : (number + 1) * size]
    return dealt


def idle_passes(batches: Sequence[dict[str, Any]]) -> int:
    """How many of the first `batches` have no advantage in any row, and so no gradient. Never all of them: with the
    last the processes exchange theirs."""
    teaching = (number for number, batch in enumerate(batches) if batch["advantages"].any())
    return min(next(teaching, len(batches)), len(batches) - 1)


def trimmed(batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` without the columns that are padding in all of its rows: right of replies, left of prompts."""
    replies, prompts = batch["completion_mask"].bool().any(0), batch["prompt_mask"].bool().any(0)
    end = int(replies.nonzero().max()) + 1 if replies.any() else 1
    start = int(prompts.nonzero().min()) if prompts.any() else 0
    width, cut = len(replies), dict(batch)
    for name in PER_TOKEN:
        if isinstance(value := batch.get(name), Tensor) and value.shape[1] == width:
            cut[name] = value[:, :end]
    for name in ("prompt_ids", "prompt_mask"):
        cut[name] = batch[name][:, start:]
    return cut
