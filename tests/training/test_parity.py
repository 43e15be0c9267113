"""The gate between rollout engine and trainer: rounding passes, an engine that the weights do not reach does not."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

from torch import Tensor  # noqa: E402

from audio_llm.errors import TrainingError  # noqa: E402
from audio_llm.training import grpo  # noqa: E402
from audio_llm.training.engine_recipe import EngineRecipe  # noqa: E402
from audio_llm.training.parity import PATIENCE, UNMOVED, ParityGate  # noqa: E402
from audio_llm.training.rollouts import PolicyWeights  # noqa: E402
from tests.training.test_grpo import make_recipe  # noqa: E402

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
STANDARD_RATE = 2e-5  # of recipes/standard/grpo.yaml


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


class Policy:
    """Logits (4, 32, 64) of a policy that each update changes a little and makes surer, as two programs round them."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(4, 32, 64, generator=self.random)

    def update(self, rate: float) -> None:
        self.logits = self.logits * 1.003 + rate * torch.randn(4, 32, 64, generator=self.random)

    def rounded(self) -> Tensor:
        """In bfloat16, after sums in another order."""
        return (self.logits + 1e-3 * torch.randn(4, 32, 64, generator=self.random)).bfloat16().float()

    def sample(self, logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=self.random).view(4, 32)


def stopped_at(seed: int, in_step: bool, rate: float, steps: int) -> int | None:
    """The step at which the gate stops an engine that is in step, or that stays what it was before the first update."""
    policy, gate, mask = Policy(seed), ParityGate(None), torch.ones(4, 32)
    held = policy.rounded()
    for step in range(steps):
        engine = policy.rounded() if in_step else held
        tokens = policy.sample(engine)
        try:
            gate.compare(step, "an engine", log_probs(policy.rounded(), tokens), log_probs(engine, tokens), mask, id_)
        except TrainingError:
            return step
        policy.update(rate)
    return None


def id_(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("seed", range(4))
def test_rounding_passes_for_300_steps_and_a_stale_engine_does_not(seed: int) -> None:
    assert stopped_at(seed, in_step=True, rate=0.02, steps=300) is None  # its logits grow to 2.5 times what they were
    assert (stopped_at(seed, in_step=False, rate=0.02, steps=20) or 0) >= PATIENCE


def test_what_is_logged_and_what_a_bound_and_nan_do() -> None:
    ours, sampled = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.0, -2.5, float("nan")]])
    mask = torch.tensor([[1, 1, 0]])
    found = ParityGate(None).compare(0, "an engine", ours, sampled, mask, id_)
    doubt = 2 - ours[0, :2].exp().sum()
    assert found == {"max_abs_logp_difference": 0.5, "logit_error": pytest.approx(float(0.5 / doubt))}
    with pytest.raises(TrainingError, match=r"step 7, engine 'an engine'.*within 0.1 of the trainer's.*0.5"):
        ParityGate(0.1).compare(7, "an engine", ours, sampled, mask, id_)
    assert ParityGate(0.1, closed=False).compare(7, "an engine", ours, sampled, mask, id_) == found
    with pytest.raises(TrainingError, match="logits within 0.5 .* at first.*the server of another model"):
        ParityGate(None).compare(0, "an engine", ours, sampled - 0.5, mask, id_)
    for bound in (None, 0.1):
        with pytest.raises(TrainingError, match="nan"):
            ParityGate(bound).compare(0, "an engine", ours, sampled, torch.ones(1, 3), id_)


def compared(gate: ParityGate, step: int, error: float, doubtful: int, last: bool = True) -> dict[str, float]:
    """A pass of 96 tokens of which `doubtful` have p = 1/2, each `error` · (1 − p) away, and the others p = 1."""
    ours = torch.zeros(4, 24)
    ours.view(-1)[:doubtful] = -math.log(2)
    away = torch.where(ours < 0, error / 2, 0.0)
    return gate.compare(step, "an engine", ours, ours - away, torch.ones(4, 24), id_, last)


def test_a_mean_over_few_doubtful_tokens_stops_nothing_and_one_over_many_does() -> None:
    gate = ParityGate(None)
    errors = [0.03, 0.13, 0.14, 0.12]  # of the passes of one step, by 4 doubtful tokens each
    assert [compared(gate, 0, error, 4, last=False) for error in errors[:3]] == [{}] * 3
    found = compared(gate, 0, errors[3], 4)
    assert found == pytest.approx({"max_abs_logp_difference": 0.07, "logit_error": sum(errors) / 4}, rel=1e-5)
    for step in range(1, 60):  # a step alone is beyond four times the first every eighth time, a mean over more never
        compared(gate, step, 0.6 if step % 8 == 0 else 0.1, 4)
    with pytest.raises(TrainingError, match=r"step 1\d\d, .*logits within 4 × 0.103.*mean error of 0.6"):
        for step in range(100, 120):
            compared(gate, step, 0.6, 4)
    sure = torch.full((4, 24), -1e-7)  # of every token: what float32 leaves of log p is as large as 1 − p
    assert ParityGate(None).compare(0, "an engine", sure, sure - 1e-7, torch.ones(4, 24), id_)["logit_error"] > 0.5
    for error in (float("nan"), float("inf")):
        gate = ParityGate(None)
        compared(gate, 0, 0.1, 64)
        compared(gate, 1, error, 1, last=False)
        with pytest.raises(TrainingError, match=f"step 1.*{error}"):
            compared(gate, 1, 0.1, 4)


def losing(says_so: bool) -> Any:
    """Builds the recipe's engine, filled once; later weights are lost, and its version moves on unless it says so."""
    from audio_llm.serving.rollout_engines import build_engine

    def build(recipe: EngineRecipe, policy: PolicyWeights, tokenizer: Any, seed: int) -> Any:
        engine: Any = build_engine(recipe, policy, tokenizer, seed)
        fill = engine.sync

        def sync(policy: PolicyWeights, version: int) -> float:
            if engine.version is None:
                return fill(policy, version)
            engine.version = engine.version if says_so else version
            return 0.0

        engine.sync = sync
        return engine

    return build


def recipe_for(checkpoint, shards, output: Path, **changes: Any) -> grpo.GRPORecipe:
    engine = {"backend": "vllm", "max_model_len": 128, "max_num_seqs": 16, "sync": changes.pop("sync", "auto")}
    usual = {"engine": engine, "learning_rate": STANDARD_RATE, "schedule": "constant", "steps": 10}
    return make_recipe(checkpoint, shards, output, **(usual | changes))


@needs_vllm
@pytest.mark.vllm
def test_an_engine_in_bfloat16_that_loses_its_weights_is_stopped_at_the_standard_rate(checkpoint, shards, tmp_path):
    """Differences are those of rounding all the time, so only the probe can tell."""
    recipe = recipe_for(checkpoint, shards, tmp_path / "run", precision="bf16")
    with pytest.raises(TrainingError, match=rf"step (\d), engine 'vllm'.*the same to the last digit, {UNMOVED} times"):
        grpo.run(recipe, losing(says_so=False))
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    errors = [log["parity/logit_error"] for log in logs]
    assert UNMOVED <= len(errors) < 10 and max(errors) < 2 * errors[0]


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("train, sync", [("lora", "merged"), ("lora", "adapter"), ("full", "merged")])
@pytest.mark.parametrize("fault", ["left out", "lost", None])
def test_a_sync_that_fails_is_seen_within_10_steps_and_one_that_works_is_not(
    checkpoint, shards, tmp_path, precision: str, train: str, sync: str, fault: str | None
) -> None:
    from audio_llm.serving.rollout_engines import build_engine

    changes: dict[str, Any] = {"precision": precision, "train": {"language_model": train}, "sync": sync}
    if fault is None:
        recipe = recipe_for(checkpoint, shards, tmp_path / "run", steps=300, **changes)
        assert grpo.run(recipe, build_engine)["steps"] == 300
        return
    recipe = recipe_for(checkpoint, shards, tmp_path / "run", **changes)
    expected = "the weights of update 1, found those of 0" if fault == "left out" else "the same to the last digit"
    if fault == "lost" and precision == "fp32":  # whichever comes first
        expected += "|log-probabilities within 0.001 of the trainer's"
    with pytest.raises(TrainingError, match=expected):
        grpo.run(recipe, losing(says_so=fault == "left out"))
