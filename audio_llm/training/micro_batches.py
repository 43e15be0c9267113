"""How the replies of a rollout are dealt out to the passes of GRPO: whole groups of like lengths, no empty columns.

TRL pads all replies of a rollout to the longest of them and shuffles the rows. A pass then computes for every reply as
many tokens as the longest of the whole rollout has, most of them padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PER_TOKEN = (  # (rows, tokens of a reply); `importance_sampling_ratio` may also be (rows, 1)
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "sampling_per_token_logps",
    "old_per_token_logps",
    "ref_per_token_logps",
    "importance_sampling_ratio",
)


def gather_groups(batches: list[dict[str, Any]], by_length: bool = False) -> list[dict[str, Any]]:
    """The rows of shuffled `batches` (equal sizes, same keys, ``prompts`` among them) dealt out anew, the rows of a
    group together: groups in the order of their first rows, or `by_length` from short to long longest replies. That
    is for batches of one update, whose gradients are summed: of several, the first would learn from short replies.
    """
    size, width = len(batches[0]["prompts"]), len(batches)
    prompts = [prompt for batch in batches for prompt in batch["prompts"]]
    longest = dict.fromkeys(prompts, 0)
    if by_length:
        lengths = torch.cat([batch["completion_mask"].sum(1) for batch in batches]).tolist()
        for prompt, length in zip(prompts, lengths, strict=True):
            longest[prompt] = max(longest[prompt], length)
    rank = {prompt: number for number, prompt in enumerate(sorted(longest, key=longest.__getitem__))}  # a stable sort
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
