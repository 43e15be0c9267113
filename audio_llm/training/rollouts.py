"""Rollouts: prompt embeddings in, sampled completions with their log-probabilities out.

The trainer's encoder and projector embed the prompt, an engine runs the language model. So any encoder works with any
engine, and only the language model has to be kept in step with the policy. Engines: Transformers in
``transformers_rollouts``, vLLM in process or over HTTP in ``audio_llm.serving.rollout_engines``.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from audio_llm.model.export import LANGUAGE_MODEL, adapter_tensors, language_model_weights, split_state

# Added to the logits of tokens that must not be sampled, in every engine and in the trainer: vLLM clamps a logit bias
# to ±100, and a finite value keeps p·log p defined. exp(-100) is below float32's resolution of 1.
FORBIDDEN_BIAS = -100.0


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Log-probabilities are those of the distribution that was sampled from."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    forbidden_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """Sampled ids, the stop token included where it was reached, and one log-probability per id."""

    token_ids: list[int]
    logprobs: list[float]


def _no_gather(parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass
class PolicyWeights:
    """The policy an engine follows: the unwrapped model, and how to gather parameters that ZeRO-3 has partitioned."""

    model: nn.Module
    gather: Callable[[Sequence[nn.Parameter]], contextlib.AbstractContextManager[Any]] = field(default=_no_gather)

    @property
    def base(self) -> Any:
        """The audio language model itself, without PEFT's wrapper (its adapter layers stay inside)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]

    @contextlib.contextmanager
    def merged(self, untie: bool = False) -> Iterator[Iterable[tuple[str, Tensor]]]:
        """(name, tensor) pairs of the plain language model with the adapter folded in; valid inside the block. With
        `untie` a head that is tied to the embeddings comes by itself."""
        names = (LANGUAGE_MODEL, "lm_head.")
        with self.gather([p for n, p in self.base.named_parameters() if n.startswith(names)]):
            yield language_model_weights(self.base, untie)

    @contextlib.contextmanager
    def adapter(self) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        """PEFT's configuration and tensors of the adapter, named for the plain language model; valid inside."""
        lora = {name: parameter for name, parameter in self.model.named_parameters() if ".lora_" in name}
        with self.gather(list(lora.values())):
            yield self.model.peft_config["default"], adapter_tensors(split_state(lora), alone=True)  # type: ignore[index]


class RolloutEngine(Protocol):
    """What GRPO asks of an engine: `live` says that it runs the policy itself, `version` which update it holds."""

    name: str
    live: bool
    version: int | None

    def sync(self, policy: PolicyWeights, version: int) -> float:
        """Bring the engine to the policy and drop caches of the old one; seconds it took (0 when in step)."""
        ...

    def generate(
        self, prompt_embeddings: Sequence[Tensor], group_sizes: Sequence[int], sampling: Sampling
    ) -> list[list[Completion]]:
        """For every prompt (tokens, hidden), `group_sizes[i]` completions."""
        ...

    def close(self) -> None:
        """Free the engine's memory and processes; a second call does nothing."""
        ...


def forbid_tokens(model: Any, token_ids: Sequence[int]) -> None:
    """Give the head of `model` a constant bias that forbids `token_ids`, for sampling and scoring alike.

    An engine must not sample what marks audio: the next forward pass would miss its audio. The trainer must then
    score under the same distribution, or the two differ by log(1 - p(marks)). The bias is a buffer that is not
    saved: checkpoints and the weights sent to engines stay as they are.
    """
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0] or head.out_features, dtype=head.weight.dtype, device=head.weight.device)
    bias[list(token_ids)] = FORBIDDEN_BIAS
    head._parameters.pop("bias", None)
    head.register_buffer("bias", bias, persistent=False)


# --- prompts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prompt_embeddings(policy: PolicyWeights, prompts: Sequence[tuple[Sequence[int], Tensor | None]]) -> list[Tensor]:
    """(tokens, hidden) of every (ids, projected audio (embeddings, hidden) or None), by the policy's table."""
    base = policy.base
    table = base.get_input_embeddings()
    with policy.gather(list(table.parameters())):
        device = table.weight.device
        return [
            base.model.embed(torch.tensor([list(ids)], device=device), audio_embeddings=audio)[0]
            for ids, audio in prompts
        ]


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Give the process its own random stream back after a block that seeds the global generators or draws from them."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the block to ``seconds[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
