"""Rollouts by Transformers' ``generate``: always there, and always in step with the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from audio_llm.training.rollouts import FORBIDDEN_BIAS, Completion, PolicyWeights, Sampling


class TransformersRollouts:
    """Sampling by Transformers' ``generate`` on the live policy: always in step, slower than vLLM at any batch size.

    `batch_size` bounds the number of sequences that are decoded together (None: all of them).
    """

    name = "transformers"
    live = True

    def __init__(self, batch_size: int | None = None) -> None:
        self.batch_size = batch_size
        self.policy: PolicyWeights | None = None
        self.version: int | None = None

    def sync(self, policy: PolicyWeights, version: int) -> float:
        """Keep a reference to the live policy: there is nothing to copy."""
        self.policy, self.version = policy, version
        return 0.0

    def _live(self) -> PolicyWeights:
        if self.policy is None:
            raise RuntimeError("generate before the first sync")
        return self.policy

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[Any]:
        """The model in evaluation mode, gathered, without gradient checkpointing (which would drop the cache)."""
        policy = self._live()
        base = policy.base
        training, checkpointing = base.training, base.is_gradient_checkpointing
        if checkpointing:
            base.gradient_checkpointing_disable()
        base.eval()
        try:
            with torch.no_grad(), policy.gather(list(base.parameters())):
                yield base
        finally:
            base.train(training)
            if checkpointing:
                base.gradient_checkpointing_enable()

    def generate(
        self, prompt_embeddings: Sequence[Tensor], group_sizes: Sequence[int], sampling: Sampling
    ) -> list[list[Completion]]:
        """See :class:`RolloutEngine`."""
        rows = [e for e, size in zip(prompt_embeddings, group_sizes, strict=True) for _ in range(size)]
        step = self.batch_size or max(len(rows), 1)
        flat: list[Completion] = []
        with self._evaluating() as base:
            for start in range(0, len(rows), step):
                flat += _sample(base, rows[start : start + step], sampling)
        groups, done = [], 0
        for size in group_sizes:
            groups.append(flat[done : done + size])
            done += size
        return groups

    def close(self) -> None:
        """See :class:`RolloutEngine`."""
        self.policy = None


def _sample(base: Any, rows: Sequence[Tensor], sampling: Sampling) -> list[Completion]:
    """Decode `rows` (tokens, hidden) together, left-padded."""
    from transformers import GenerationConfig, LogitsProcessorList, SequenceBiasLogitsProcessor

    longest = max(len(row) for row in rows)
    embeddings = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    for i, row in enumerate(rows):
        embeddings[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    stops = list(sampling.stop_token_ids)
    config = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=sampling.temperature > 0,
        pad_token_id=stops[0] if stops else 0,
        eos_token_id=stops or None,
        return_dict_in_generate=True,
        output_scores=True,
        repetition_penalty=sampling.repetition_penalty,
        **(
            {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
            }
            if sampling.temperature > 0
            else {}
        ),
    )
    bias: list[Any] = [[[token], FORBIDDEN_BIAS] for token in sampling.forbidden_token_ids]
    processors = LogitsProcessorList([SequenceBiasLogitsProcessor(bias)] if bias else [])
    output = base.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=config,
        logits_processor=processors,
    )
    ids = output.sequences[:, -len(output.scores) :]
    logprobs = torch.stack(
        [s.float().log_softmax(-1).gather(-1, ids[:, i : i + 1])[:, 0] for i, s in enumerate(output.scores)], dim=1
    )
    return [_cut(row, values, set(stops)) for row, values in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def _cut(ids: list[int], logprobs: list[float], stops: set[int]) -> Completion:
    """Drop what follows the first stop token: padding of a row that ended before the longest of its batch."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return Completion(ids[:end], logprobs[:end])
