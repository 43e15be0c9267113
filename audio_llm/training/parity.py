"""Whether the rollout engine samples from the policy that learns: what GRPO asks of it at every step.

An engine that misses updates trains the wrong policy, and its rewards look fine. Three things are checked, for none of
them sees every fault:

- the *version* that the engine says it holds is the policy's;
- a *probe*, the same short reply drawn anew with the same seed, must not come out to the last digit as before when the
  policy's weights have changed. It needs no bound, and so works at any rate and in any precision;
- the *log-probabilities* of the sampled tokens are compared with the trainer's: the largest difference with a bound
  where both compute in float32, else its mean with that of the first steps, before which the engine was filled.

In bfloat16 both sides round a logit z to 8 bits, which moves the log-probability of a token of probability p by about
(1 − p) |Δz|. So what is compared is Σ |Δ log p| / Σ (1 − p), the error of a logit, which does not change as a policy
grows surer or less sure. A mean over few doubtful tokens is a matter of chance: the passes of a step are taken
together, and steps until Σ (1 − p) is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from audio_llm.errors import ConfigError, TrainingError, describe
from audio_llm.model.export import LANGUAGE_MODEL
from audio_llm.training.rollouts import (
    Completion,
    PolicyWeights,
    RolloutEngine,
    Sampling,
    prompt_embeddings,
    random_state_kept,
)

FIRST_ERROR = 0.5  # of a logit: rounding was at 0.02 to 0.08 with small models, another model's weights are beyond
NOISE_FACTOR = 4.0  # times the first mean: what no step of an engine in step came near
PATIENCE = 2  # means in a row above it
DOUBT = 16.0  # Σ (1 − p) of a mean, chosen: in step, 32 short replies had errors of 0.03 to 0.13, 128 of 0.06 to 0.18
UNMOVED = 3  # probes in a row without a change, while the policy's weights changed
PROBE_TOKENS, PROBE_TEMPERATURE = 8, 2.0  # hot, so that many logits have a say in every log-probability

# Other distributions than softmax(logits / temperature): the trainer scores under that one, so parity cannot hold.
RESTRICTIONS = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


@dataclass
class ParityGate:
    """The checks of one run in one process. `bound` is the largest |Δ log p| that is let pass (None: the mean is
    compared with the first one instead). A gate that is not `closed` measures, and stops nothing."""

    bound: float | None
    closed: bool = True
    _step: Tensor | None = None  # largest |Δ log p|, Σ |Δ log p| and Σ (1 − p) of the step's passes so far: (3,)
    _error: float = 0.0  # the two sums since the last mean
    _doubt: float = 0.0
    _first: float | None = None  # the first mean
    _above: int = 0
    _prompt: Tensor | None = None  # what the probe answers
    _reply: Completion | None = None
    _weights: Tensor | None = None
    _unmoved: int = 0

    def probe(self, engine: RolloutEngine, policy: PolicyWeights, version: int, sampling: Sampling) -> None:
        """Look at `engine` after its sync to update `version` of `policy`.

        Raises :class:`TrainingError` where it holds another version, or answers as it did with other weights.
        """
        if engine.live or not self.closed:
            return
        item = f"step {version}, engine '{engine.name}'"
        if engine.version != version:
            cure = "Its sync was left out or ended early."
            raise TrainingError(describe(item, f"the weights of update {version}", f"those of {engine.version}", cure))
        if self._prompt is None:  # of its own, so that no prompt of a batch is found in a cache
            size = policy.base.config.get_text_config().vocab_size
            ids = [token for token in range(0, size, max(1, size // 16)) if token not in sampling.forbidden_token_ids]
            self._prompt = prompt_embeddings(policy, [(ids[:16], None)])[0].detach().clone()
        tokens = min(PROBE_TOKENS, sampling.max_tokens)
        hot = replace(sampling, max_tokens=tokens, temperature=PROBE_TEMPERATURE, stop_token_ids=())
        with random_state_kept():
            torch.manual_seed(0)
            reply = engine.generate([self._prompt], [1], hot)[0][0]
        weights = sums(policy)
        if self._weights is not None and not torch.equal(weights, self._weights):
            self._unmoved = self._unmoved + 1 if reply == self._reply else 0
        self._weights, self._reply = weights, reply
        if self._unmoved >= UNMOVED:
            raise TrainingError(
                describe(
                    item,
                    "other log-probabilities than before, for the policy's weights have changed",
                    f"the same to the last digit, {self._unmoved} times in a row",
                    "The weights do not reach the engine, or the updates are smaller than what its precision resolves "
                    "(raise learning_rate, or use precision: fp32). parity_bound: off goes on all the same.",
                )
            )

    def compare(
        self,
        step: int,
        engine: str,
        ours: Tensor,
        sampled: Tensor,
        mask: Tensor,
        gather: Callable[[Tensor], Tensor],
        last: bool = True,
    ) -> dict[str, float]:
        """Log-probabilities (rows, tokens) of the trainer and of the engine at the places of `mask`, of all processes.
        A step may come in several passes, of which one is the `last`.

        Returns ``max_abs_logp_difference`` and ``logit_error`` of the step, after its last pass; raises
        :class:`TrainingError` where the gate is closed and they are too far apart.
        """
        chosen = mask.bool()
        difference = (ours - sampled).abs()[chosen].double()
        doubt = -torch.expm1(ours[chosen].double())  # 1 − p
        largest = difference.max() if difference.numel() else difference.new_zeros(())
        found = torch.stack([largest, difference.sum(), doubt.sum()])
        if self._step is not None:
            found = torch.stack([torch.maximum(found[0], self._step[0]), *(found + self._step)[1:]])  # keeps NaN
        self._step = None if last else found
        if not last:
            return {}
        parts = gather(found.float().reshape(1, 3))
        largest_of_all, error, doubts = float(parts[:, 0].max()), float(parts[:, 1].sum()), float(parts[:, 2].sum())
        self._judge(f"step {step}, engine '{engine}'", largest_of_all, error, doubts)
        return {"max_abs_logp_difference": largest_of_all, "logit_error": error / max(doubts, 1e-6)}

    def _judge(self, item: str, largest: float, error: float, doubt: float) -> None:
        if not self.closed:
            return
        cure = "The engine is out of step with the policy, or computes in another precision."
        if self.bound is not None:
            if not largest <= self.bound:  # NaN too
                expected = f"log-probabilities within {self.bound:g} of the trainer's (parity_bound)"
                raise TrainingError(describe(item, expected, f"a difference of {largest:.3g}", cure))
            return
        self._error, self._doubt = self._error + error, self._doubt + doubt
        mean = self._error / max(self._doubt, 1e-6)
        found = f"a mean error of {mean:.3g}"
        least = max(self._doubt, 1.0)  # where nothing is in doubt, rounding is all there is
        if self._first is None and not self._error <= FIRST_ERROR * least:
            expected = f"logits within {FIRST_ERROR:g} of the trainer's at first"
            cure = "The engine was filled with other weights, or is the server of another model."
            raise TrainingError(describe(item, expected, found, cure))
        if self._doubt < DOUBT and mean < math.inf:
            return
        self._error = self._doubt = 0.0
        self._first = mean if self._first is None else self._first
        self._above = 0 if mean <= NOISE_FACTOR * self._first else self._above + 1
        if self._above >= PATIENCE or not mean < math.inf:
            expected = f"logits within {NOISE_FACTOR:g} × {self._first:.3g}, the error at first, of the trainer's"
            raise TrainingError(describe(item, expected, found, cure + " parity_bound: off goes on all the same."))


def sums(policy: PolicyWeights) -> Tensor:
    """The sums of the language model's trained tensors, of this process's parts where they are partitioned: not equal
    where an update has changed them. (tensors,) float64 on the CPU."""
    parts = [
        getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's part; the parameter itself is empty between uses
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad and (LANGUAGE_MODEL in name or "lm_head." in name)
    ]
    local = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
    if not local:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([part.detach().sum(dtype=torch.float64).cpu() for part in local])


def check_distribution(settings: Mapping[str, Any]) -> None:
    """Refuse settings under ``grpo:`` by which engine and trainer could not agree."""
    for name, usual in RESTRICTIONS.items():
        if settings.get(name, usual) != usual:
            raise ConfigError(
                f"grpo: {name}: {settings[name]} samples from another distribution than the one that is trained, so "
                "engine and trainer cannot agree. Leave it out, or set parity_bound: off."
            )
