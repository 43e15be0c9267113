"""Dynamic sampling in GRPO: which groups are drawn again, for which prompts, and that a resumed run does the same."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

from audio_llm.errors import ConfigError  # noqa: E402
from audio_llm.shards.reader import ShardDataset  # noqa: E402
from audio_llm.training import grpo  # noqa: E402
from audio_llm.training.order import RunSampler  # noqa: E402
from audio_llm.training.resampling import Reserve, flat_groups  # noqa: E402
from tests.training.test_grpo import (  # noqa: E402
    even_ids,
    make_recipe,
    metrics,
    prompts_seen,
    transformers_engine,
    write_recipe,
)
from tests.training.test_validation import launch, timeless  # noqa: E402

LEFT = {"tests.training.test_resampling:flat_on_the_left": 1.0}


def flat_on_the_left(prompts, completions, completion_ids, answer, **columns):
    """Nothing can be learnt from questions whose answer is left."""
    values = even_ids(prompts, completions, completion_ids)
    return [1.0 if side == "left" else value for side, value in zip(answer, values, strict=True)]


def test_groups_are_flat_up_to_rounding():
    assert flat_groups([1.2, 1.2 + 1e-12, 0.0, 1.0, 0.5, 0.5], 2) == [0, 2]


def test_prompts_that_stand_by_are_the_order_continued(shards):
    data = ShardDataset([shards()])
    order = list(RunSampler(data, 3, 200))
    reserve = Reserve(RunSampler(data, 3, 30))
    assert [reserve[position] for position in range(170)] == order[30:]
    beside = list(reserve.beside(order[30:34], 2))
    assert beside[0] == order[34] and set(order[30:34]).isdisjoint(beside)
    assert len(list(reserve.beside(range(len(data)), 0))) == 0


@pytest.fixture(scope="module")
def runs(checkpoint, shards, tmp_path_factory):
    """Six steps with and without dynamic sampling; half of the questions teach nothing."""
    folder = tmp_path_factory.mktemp("resampling")
    found = {}
    for number in (0, 3, 99):
        changes = {"rewards": LEFT, "prompts_per_step": 4, "steps": 6, "save_steps": 2, "keep_checkpoints": 9}
        recipe = make_recipe(checkpoint, shards, folder / str(number), resample_groups=number, **changes)
        grpo.run(recipe, transformers_engine)
        found[number] = recipe
    return found


def test_flat_groups_are_drawn_again_within_the_bound(runs):
    flat = {n: [log["groups/zero_variance_share"] for log in metrics(recipe.output)] for n, recipe in runs.items()}
    replaced = {n: [log.get("groups/resampled") for log in metrics(recipe.output)] for n, recipe in runs.items()}
    assert sum(flat[0]) > sum(flat[3]) > sum(flat[99]) == 0
    assert replaced[0] == [None] * 6 and max(replaced[3]) <= 3 < max(replaced[99])
    for log in metrics(runs[99].output):
        assert log["parity/max_abs_logp_difference"] < 1e-4 and log["time/update"] > 0
    # A prompt that can be learnt from stays, in its place.
    for plain, drawn in zip(prompts_seen(runs[0].output), prompts_seen(runs[99].output), strict=True):
        assert len(set(drawn["ids"])) == 4
        kept = sum(one == two for one, two in zip(plain["ids"], drawn["ids"], strict=True))
        assert kept == 4 * (1 - flat[0][plain["step"] - 1])


def test_a_resumed_run_draws_the_same_again(runs):
    recipe = runs[3]
    whole, order = metrics(recipe.output), prompts_seen(recipe.output)
    (recipe.output / "result.json").unlink()
    for step in (4, 6):
        shutil.rmtree(recipe.output / f"checkpoint-{step}")
    grpo.run(recipe, transformers_engine)
    assert prompts_seen(recipe.output) == order
    assert timeless(metrics(recipe.output)) == timeless(whole)


def test_a_run_without_flat_groups_is_that_without_resampling(checkpoint, shards, tmp_path):
    logs: list[Any] = []
    for number in (0, 2):
        recipe = make_recipe(checkpoint, shards, tmp_path / str(number), resample_groups=number)
        grpo.run(recipe, transformers_engine)
        logs.append(timeless(metrics(recipe.output)))
    assert [log.pop("groups/resampled") for log in logs[1]] == [0.0, 0.0]
    assert logs[0] == logs[1]


def test_data_that_teaches_nothing_ends_the_search(checkpoint, shards, tmp_path):
    rewards = {"tests.training.test_grpo:always": 1.0}
    recipe = make_recipe(checkpoint, shards, tmp_path / "run", rewards=rewards, resample_groups=1000, steps=1)
    grpo.run(recipe, transformers_engine)
    [log] = metrics(recipe.output)
    assert log["groups/zero_variance_share"] == 1.0 and 0 < log["groups/resampled"] <= 24


def test_a_bound_below_zero_is_refused(checkpoint, shards, tmp_path):
    with pytest.raises(ConfigError, match="resample_groups: expected a number of groups"):
        make_recipe(checkpoint, shards, tmp_path, resample_groups=-1).check()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["cpu_2", "zero3_cpu"])
def test_two_processes_that_share_a_group_draw_it_again_together(checkpoint, shards, tmp_path, layout):
    changes = {"rewards": LEFT, "prompts_per_step": 3, "steps": 3, "resample_groups": 99}
    one = make_recipe(checkpoint, shards, tmp_path / "one", **changes)
    grpo.run(one, transformers_engine)
    two = make_recipe(checkpoint, shards, tmp_path / "two", engine={"backend": "transformers"}, processes=2, **changes)
    launch(write_recipe(two, tmp_path / "two.yaml"), layout)
    assert prompts_seen(two.output) == prompts_seen(one.output)
    assert all(log["groups/zero_variance_share"] == 0 for log in metrics(two.output))
    assert all(log["parity/max_abs_logp_difference"] < 1e-4 for log in metrics(two.output))
