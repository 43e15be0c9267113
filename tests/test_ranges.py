"""Numbers that no run can be meant with are refused by their key, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from audio_llm import config
from audio_llm.errors import ConfigError
from audio_llm.ranges import RANGES
from audio_llm.tasks.base import load_recipe
from audio_llm.training.recipes import GRPORecipe, SFTRecipe

POLICY = ["model.path=m", "output=o", "data.train=[d]", "steps=1"]
CLIPS = ["task=spatial", "output=o", "train=[d]", "steps=1"]


def loaded(kind: Any, overrides: list[str]) -> None:
    if kind is load_recipe:
        load_recipe(None, [*CLIPS, *overrides])
    else:
        config.load(kind, None, [*POLICY, *overrides]).check()


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (
            SFTRecipe,
            "steps=0 steps=-1 epochs=0 epochs=.inf seconds=-1 batch_size=0 gradient_accumulation=0 log_steps=0",
        ),
        (SFTRecipe, "learning_rate=-1 learning_rate=.inf warmup_steps=-1 weight_decay=-1 max_grad_norm=-1 seed=-1"),
        (SFTRecipe, "seed=4294967296 save_steps=-1 keep_checkpoints=0 processes=0 eval_steps=0 encoder_cache_gib=0"),
        (
            SFTRecipe,
            "lora.rank=0 lora.alpha=-1 lora.dropout=1 data.max_length=0 data.workers=-1 data.max_reject_share=2",
        ),
        (SFTRecipe, "contribution_steps=0 data.validation_samples=0"),
        (
            GRPORecipe,
            "steps=0 prompts_per_step=0 group_size=1 micro_batch_size=0 max_completion_length=0 temperature=0",
        ),
        (GRPORecipe, "completions_per_step=-1 engine.max_model_len=0 engine.max_num_seqs=0 engine.block_size=0"),
        (GRPORecipe, "engine.gpu_memory_utilization=1.5 engine.batch_size=0 parity_bound=-1"),
        (load_recipe, "steps=0 batch_size=-1 eval_batch_size=0 learning_rate=0 warmup_share=1 ema=1 layer_decay=0"),
        (load_recipe, "minimum_rate=2 memory_gib=-1 seed=-1 augment.gain_db=-1 augment.overlay=1.5 unfreeze=-1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_meant_is_refused_by_its_key(kind: Any, bad: str) -> None:
    loaded(kind, [])
    for override in bad.split():
        key, _, value = override.partition("=")
        with pytest.raises(ConfigError, match=rf"^{key}: expected") as caught:
            loaded(kind, [override])
        assert float(str(caught.value).removesuffix(".").split()[-1]) == float(value.lstrip("."))


def test_stages_are_held_to_the_same(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="steps: expected a number of 1 or more, found -1"):
        loaded(SFTRecipe, ["stages=[{steps: -1}]", "steps="])


def test_replies_that_cannot_be_dealt_out_are_refused_with_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(GRPORecipe, ["prompts_per_step=3", "group_size=4", "micro_batch_size=4"])
    with pytest.raises(ConfigError, match="micro_batch_size: expected a divisor of 12 sequences per process, found 5"):
        loaded(GRPORecipe, ["prompts_per_step=3", "group_size=4", "micro_batch_size=5"])
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ConfigError, match="group_size: expected a multiple of 5 processes, found 12"):
        loaded(GRPORecipe, ["prompts_per_step=3", "group_size=4"])


def test_a_run_is_paid_for_something() -> None:
    for rewards in ("{}", "{format: 0}"):
        with pytest.raises(ConfigError, match="rewards: expected at least one of a weight other than 0, found none"):
            loaded(GRPORecipe, [f"rewards={rewards}"])


def test_every_range_is_of_a_key_and_holds_its_default() -> None:
    """A key that is renamed takes its range with it; the defaults of all recipes are in them."""
    seen: set[str] = set()

    def look(tree: Any) -> None:
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name)
            seen.add(field.name)
            if dataclasses.is_dataclass(value):
                look(value)
            elif isinstance(value, (int, float)) and field.name in RANGES:
                assert value in RANGES[field.name] and math.nan not in RANGES[field.name], field.name

    from audio_llm.tasks.base import TASKS
    from data_prep.manifest.recipe import ManifestConfig

    look(config.load(SFTRecipe, None, POLICY))
    look(config.load(GRPORecipe, None, POLICY))
    for task in TASKS.values():
        source = {"text": "t"} if task.name == "language_model" else {"train": ["d"]}
        look(config.build(task.recipe, {"output": "o", "task": task.name, **source}))
    seen |= {field.name for field in dataclasses.fields(ManifestConfig)}
    assert set(RANGES) <= seen
