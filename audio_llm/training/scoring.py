"""Log-probabilities of replies: no padding is computed that every row of a pass has, and the head sees only the places
that predict a token. It is the widest layer of a small language model, and most replies are shorter than the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer import utils

from audio_llm.model.modeling import SharedPrompt
from audio_llm.training.examples import Example

TILE = utils._CHUNKED_LOGPROB_CHUNK_SIZE  # entries of the vocabulary whose logits TRL's head computes at once
CPU_TILE = 2048  # such a tile stays in a processor's cache


class Scores(NamedTuple):
    """Of each reply's tokens, (rows, width), 0 where a row has none; and a mixture of experts' loss. None is
    what the head was not set up for."""

    log_probs: Tensor
    entropy: Any
    aux_loss: Any


def size_tiles(device: torch.device) -> None:
    """Have TRL's head compute its logits in tiles that suit `device`: the sums are the same, in another order."""
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE if device.type == "cpu" else TILE


def shared_prompt(rows: list[Example], length: int, device: torch.device) -> SharedPrompt:
    """Which of `rows` have the same prompt; the prompts are padded to `length`."""
    first: dict[Example, int] = {}
    numbers = [first.setdefault(prompt, row) for row, prompt in enumerate(rows)]
    return SharedPrompt(torch.tensor(numbers, device=device), length)


def score_replies(
    forward: Callable[..., Any], ids: Tensor, mask: Tensor, width: int, prompt: SharedPrompt | None, **arguments: Any
) -> Scores:
    """Score the last `width` columns of `ids` (rows, n) where `mask` has them, by `forward`, a model with TRL's fused
    head, or of `prompt` if rows share theirs. `arguments` go to the model as they are.
    """
    said = mask[:, -width:].bool()  # (rows, width)
    longest = int(said.any(0).nonzero().max()) + 1 if said.any() else 1
    end = ids.shape[1] - width + longest
    # What predicts a reply's first token is the prompt's last; with a shared prompt the hidden states begin there.
    before = end - longest - 1 if prompt is None else 0
    output = forward(
        input_ids=ids[:, :end],
        attention_mask=mask[:, :end],
        shared_prompt=prompt,
        kept_positions=torch.nn.functional.pad(said[:, :longest], (before, 1)),
        shift_labels=ids[:, -width:][said][None],
        fused_lm_head=True,
        **arguments,
    )
    log_probs, entropy = (
        None if values is None else values.new_zeros(said.shape).masked_scatter(said, values)
        for values in (output.log_probs, output.entropy)
    )
    assert log_probs is not None
    return Scores(log_probs, entropy, output.aux_loss)
