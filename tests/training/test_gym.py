"""Prompts drawn while a run trains: which kinds are drawn, that a resumed run draws the same, what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets", "pyroomacoustics"):
    pytest.importorskip(package)

from audio_llm import config, files  # noqa: E402
from audio_llm.audio import Waveform  # noqa: E402
from audio_llm.errors import ConfigError, TrainingError  # noqa: E402
from audio_llm.shards.reader import ShardDataset  # noqa: E402
from audio_llm.shards.schema import Sample, Source  # noqa: E402
from audio_llm.shards.writer import ShardWriter  # noqa: E402
from audio_llm.training import grpo, gym  # noqa: E402
from tests.data_prep.test_gym import RECIPE, write  # noqa: E402
from tests.paths import ROOT  # noqa: E402
from tests.training.test_grpo import (  # noqa: E402
    environment,
    even_ids,
    make_recipe,
    metrics,
    prompts_seen,
    transformers_engine,
    write_recipe,
)
from tests.training.test_validation import timeless  # noqa: E402

SIDES = {"questions": {"choice": {"side": 1, "direction": 1}}}
LEFT = {"tests.training.test_gym:teaches_directions": 1.0}


def teaches_directions(prompts, completions, completion_ids, question_type, **columns):
    """Nothing can be learnt from questions about sides."""
    values = even_ids(prompts, completions, completion_ids)
    return [1.0 if kind == "side" else value for kind, value in zip(question_type, values, strict=True)]


def gym_recipe(checkpoint, scenes: Path, output: Path, **changes: Any) -> grpo.GRPORecipe:
    data = {"gym": {"recipe": str(scenes), "workers": 0, "span": 4} | changes.pop("gym", {})}
    return make_recipe(checkpoint, Path, output, **{"data": data, "rewards": LEFT} | changes)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("scenes") / "scenes.yaml", **SIDES)


@pytest.fixture(scope="module")
def whole(checkpoint, scenes, tmp_path_factory) -> grpo.GRPORecipe:
    """Ten steps of four prompts, of which two may be drawn again."""
    changes = {"prompts_per_step": 4, "steps": 10, "save_steps": 2, "keep_checkpoints": 9, "resample_groups": 2}
    recipe = gym_recipe(checkpoint, scenes, tmp_path_factory.mktemp("gym") / "run", **changes)
    grpo.run(recipe, transformers_engine)
    return recipe


# ---------------------------------------------------------------------------------------------------- the mixture

MIX = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.05, 1), min_size=1)


@given(MIX, st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=60), st.integers(1, 64), st.integers(0, 9))
def test_a_batch_has_of_each_kind_what_its_weight_says_up_to_one(mix, told, count, seed):
    mixture = gym.Mixture(mix, floor=0.1, span=8, seed=seed)
    for number, taught in told:
        mixture.tell(list(mix)[number % len(mix)], taught)
    weights, numbers = mixture.weights(), {kind: [] for kind in mix}
    for kind, number in mixture.draw(3, count):
        numbers[kind].append(number)
    for kind, found in numbers.items():
        assert abs(len(found) - weights[kind] * count) < 1 + 1e-6
        assert sorted(found) == list(range(len(found)))
    assert sum(weights.values()) == pytest.approx(1)
    least = min(0.1 * part / sum(mix.values()) for part in mix.values())
    assert min(weights.values()) >= least * (1 - 1e-9)  # no kind dies


def test_a_kind_that_teaches_nothing_makes_room_and_comes_back():
    mixture = gym.Mixture({"a": 0.5, "b": 0.5}, floor=0.1, span=4, seed=0)
    for _ in range(100):
        mixture.tell("a", True)
        mixture.tell("b", False)
    assert mixture.weights()["b"] == pytest.approx(0.1 / 1.1)
    for _ in range(100):
        mixture.tell("b", True)
    assert mixture.weights()["b"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------ whole runs


def test_kinds_whose_groups_teach_are_drawn_more_often(whole):
    logs = metrics(whole.output)
    directions = [log["gym/prompts/direction-easy"] + log["gym/prompts/direction-hard"] for log in logs]
    assert directions[0] <= 0.75 and min(directions[-3:]) == 1  # what was replaced counts where it stands
    assert logs[-1]["gym/share/side-easy"] < 0.5 < logs[-1]["gym/share/direction-easy"]
    for log in logs:
        assert log["parity/max_abs_logp_difference"] < 1e-4
        assert sum(share for name, share in log.items() if name.startswith("gym/prompts/")) == pytest.approx(1)


def test_no_prompt_comes_twice(whole):
    ids = [name for step in prompts_seen(whole.output) for name in step["ids"]]
    assert len(set(ids)) == len(ids) == 40


def test_a_resumed_run_draws_the_same_to_the_digit(checkpoint, scenes, whole, tmp_path):
    """Whatever drew before: here a worker process goes on."""
    output = tmp_path / "run"
    shutil.copytree(whole.output, output)
    (output / "result.json").unlink()
    for step in (6, 8, 10):
        shutil.rmtree(output / f"checkpoint-{step}")
    recipe = config.build(grpo.GRPORecipe, config.plain_of(whole) | {"output": str(output)})
    recipe.data.gym.workers = 1
    grpo.run(recipe, transformers_engine)
    assert prompts_seen(output) == prompts_seen(whole.output)
    assert timeless(metrics(output)) == timeless(metrics(whole.output))
    state = [json.loads((folder / "checkpoint-10" / gym.FILE).read_text()) for folder in (output, whole.output)]
    assert state[0] == state[1] and sum(state[0]["drawn"].values()) == 10 * (4 + 2)


def test_another_seed_or_recipe_is_another_run(checkpoint, scenes, whole, tmp_path):
    changed = write(tmp_path / "scenes.yaml", **SIDES, seed=4)
    tree = config.plain_of(whole)
    tree["data"]["gym"]["recipe"] = str(changed)
    with pytest.raises(ConfigError, match=r"data\.gym \(its recipe\)"):
        grpo.run(config.build(grpo.GRPORecipe, tree), transformers_engine)


class Counting:
    """A source that knows how many of its draws wait."""

    def __init__(self, source: Any) -> None:
        self.source, self.most, self.gym = source, 0, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def submit(self, kind: str, number: int) -> Any:
        self.most = max(self.most, len(self.gym._ahead))
        return self.source.submit(kind, number)


def test_two_batches_wait_at_most(checkpoint, scenes, tmp_path, monkeypatch):
    made = []
    opened = gym.open_source

    def watched(*args: Any) -> Any:
        made.append(Counting(opened(*args)))
        return made[-1]

    class Watched(gym.Gym):
        def __init__(self, source, *args):
            super().__init__(source, *args)
            source.gym = self

    monkeypatch.setattr(gym, "open_source", watched)
    monkeypatch.setattr(gym, "Gym", Watched)
    recipe = gym_recipe(checkpoint, scenes, tmp_path / "run", steps=6, prompts_per_step=3, resample_groups=1)
    grpo.run(recipe, transformers_engine)
    [source] = made
    assert 4 <= source.most < 8 and not source.gym._ahead  # two batches of 3 + 1; none is drawn behind the last


def test_draws_that_cannot_be_used_are_replaced_and_named(checkpoint, scenes, tmp_path, monkeypatch):
    """With the encoder's layouts and rate: a recording that turns out silent is another draw of its kind."""
    from audio_llm.errors import AudioError
    from data_prep.scenes.gym import Drawer

    drawn = Drawer.draw

    def silent(self: Any, job: tuple[str, int]) -> Any:
        if job[1] == 1:
            raise AudioError("the clip is silent")
        return drawn(self, job)

    monkeypatch.setattr(Drawer, "draw", silent)
    recipe = gym_recipe(checkpoint, scenes, tmp_path / "run", steps=3, prompts_per_step=8)
    recipe.data.max_reject_share = 0.5
    grpo.run(recipe, transformers_engine)
    ids = [name for step in prompts_seen(recipe.output) for name in step["ids"]]
    assert "side-easy-1000000001" in ids and len(set(ids)) == 24
    assert "side-easy 1" in (recipe.output / "rejects.jsonl").read_text()
    monkeypatch.setattr(Drawer, "draw", lambda self, job: silent(self, (job[0], 1)))
    with pytest.raises(TrainingError, match="64 draws in a row cannot be used; the first: the clip is silent"):
        grpo.run(gym_recipe(checkpoint, scenes, tmp_path / "none", steps=1), transformers_engine)


def test_recordings_that_are_validated_on_are_not_drawn(checkpoint, scenes, tmp_path):
    from data_prep.scenes import simulate

    recipe = config.load(simulate.SceneConfig, scenes, ["seed=3"])
    simulate.prepare(recipe, tmp_path / "data", workers=1, quiet=True)
    data: dict[str, Any] = {"gym": {"recipe": str(tmp_path / "data"), "workers": 0}}
    for subset, fits in (("test", True), ("rl", False)):
        data["validation"] = [str(tmp_path / "data" / subset)]
        tree = make_recipe(checkpoint, Path, tmp_path / subset, data=data, steps=1)
        if fits:
            grpo.run(tree, transformers_engine)
        else:
            with pytest.raises(ConfigError, match="recordings that are not validated on, found .* data.validation has"):
                grpo.run(tree, transformers_engine)


def test_recordings_of_shards_made_of_single_clips_are_known_as_well(tmp_path):
    """``kind: manifest`` names a file where scenes name it without its ending."""
    folder, heard = tmp_path / "shards", Waveform(np.full((1, 4000), 0.1, np.float32), 16_000, "mono")
    with ShardWriter(folder) as writer:
        writer.write(Sample("a", "open", question="What?", answer="a dog", source=Source("b", clip="dog/1.wav")), heard)
    for recordings, fits in (({"dog/2"}, True), ({"dog/1"}, False), ({"dog/1.wav"}, False)):
        source: Any = SimpleNamespace(recordings=frozenset(recordings))
        with nullcontext() if fits else pytest.raises(ConfigError, match=r"found 'dog/1\.wav', which .* has in 'a'"):
            gym.check_apart(source, ShardDataset(folder), "data.gym")


def test_draws_whatever_is_wrong_with_them_are_replaced(checkpoint, scenes, tmp_path, monkeypatch):
    """A question that no room has a scene for would stop the run, at the same draw whenever it is taken up again."""
    from data_prep.scenes.gym import Drawer

    drawn = Drawer.scene

    def without_room(self: Any, ask: Any, questions: Any, kind: str) -> Any:
        if ask.index == 1:
            raise ConfigError("no scene in 200 rooms")
        return drawn(self, ask, questions, kind)

    monkeypatch.setattr(Drawer, "scene", without_room)
    recipe = gym_recipe(checkpoint, scenes, tmp_path / "run", steps=1, prompts_per_step=8)
    recipe.data.max_reject_share = 0.5
    grpo.run(recipe, transformers_engine)
    assert "no scene in 200 rooms" in (recipe.output / "rejects.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "data: expected train, folders of shards, or gym, a recipe of scenes, found neither"),
        ({"train": ["a"]}, "data: expected train or gym, whose scenes are all new, found both"),
        ({"weights": []}, "data.weights: expected none beside data.gym"),
        ({"gym": {"floor": 0}}, "data.gym.floor: expected a share above 0"),
        ({"gym": {"workers": -1}}, "data.gym.workers: expected a number of 0 or more, found -1"),
        ({"gym": {"span": 0}}, "data.gym.span: expected at least 1"),
        ({"gym": {"shape": 0}}, "data: gym: unknown key 'shape'"),
        ({"epochs": 1.0}, "data.gym, which has no end: expected steps, and no epochs, found epochs: 1"),
        ({"steps": None, "seconds": 9.0}, "data.gym, which has no end: expected steps, and no epochs, found none"),
        ({"encoder_cache": "cache"}, "encoder_cache: expected none beside data.gym, found cache"),
        ({"rewards": {"counterfactual": 1.0}}, "rewards: counterfactual: expected data.train, which has pairs"),
        ({"recipe": "none.yaml"}, "data.gym: expected a recipe of scenes or a data set's folder, found none.yaml"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_refused_by_name(changes, message, checkpoint, scenes, tmp_path):
    tree: dict[str, Any] = {"gym": {"recipe": changes.pop("recipe", str(scenes))} | changes.pop("gym", {})}
    tree |= {key: changes.pop(key) for key in ("train", "weights") if key in changes}
    with pytest.raises(ConfigError) as caught:
        recipe = make_recipe(checkpoint, Path, tmp_path, **({"data": tree} | changes))
        recipe.check()
        recipe.check_paths()
    assert message in str(caught.value)


def test_a_recipe_of_another_layout_is_refused_before_training(checkpoint, tmp_path):
    for name, (layout, rate) in {"a": ("foa", 16000), "b": ("binaural", 32000)}.items():
        path = write(tmp_path / f"{name}.yaml", audio={"layout": layout, "sample_rate": rate, "seconds": 1.5})
        message = f"scenes in binaural or stereo, 16000 Hz, found {layout}, {rate} Hz"
        with pytest.raises(ConfigError, match=message):
            grpo.run(gym_recipe(checkpoint, path, tmp_path / "run"), transformers_engine)


def test_what_nobody_draws_from_is_refused(checkpoint, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("verb: sft\n")
    with pytest.raises(ConfigError, match="a recipe of scenes, or a folder made of one, .*: scenes"):
        grpo.run(gym_recipe(checkpoint, path, tmp_path / "run"), transformers_engine)


@pytest.mark.slow
def test_sigkill_and_resume(checkpoint, scenes, tmp_path):
    """A run killed at any moment and started again is an unbroken one to the digit; its worker dies with it."""
    command = [sys.executable, "-m", "audio_llm", "grpo"]
    recipes = {}
    for name in ("whole", "killed"):
        changes = {"steps": 12, "save_steps": 3, "resample_groups": 1, "engine": {"backend": "transformers"}}
        recipes[name] = gym_recipe(checkpoint, scenes, tmp_path / name, gym={"workers": 1}, **changes)
        write_recipe(recipes[name], tmp_path / f"{name}.yaml")
    subprocess.run([*command, tmp_path / "whole.yaml"], env=environment(), check=True, timeout=600)
    victim = subprocess.Popen([*command, tmp_path / "killed.yaml"], env=environment())
    deadline, log = time.monotonic() + 600, recipes["killed"].output / "metrics.jsonl"
    while time.monotonic() < deadline and len(files.read_lines(log)) < 5:
        time.sleep(0.02)
    children = subprocess.run(["ps", "--ppid", str(victim.pid), "-o", "pid="], capture_output=True, text=True).stdout
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 5 <= len(files.read_lines(log)) < 12
    time.sleep(2)
    assert children.split() and not [pid for pid in children.split() if Path(f"/proc/{pid}").exists()]
    subprocess.run([*command, tmp_path / "killed.yaml"], env=environment(), check=True, timeout=600)
    assert prompts_seen(recipes["whole"].output) == prompts_seen(recipes["killed"].output)
    logs = [timeless(metrics(recipe.output)) for recipe in recipes.values()]
    assert logs[0] == logs[1]


def test_the_recipe_of_the_quickstart_is_known():
    recipe = config.load(grpo.GRPORecipe, ROOT / "recipes" / "quickstart" / "grpo_gym.yaml")
    recipe.check()
    fixed = config.load(grpo.GRPORecipe, ROOT / "recipes" / "quickstart" / "grpo.yaml")
    here, there = config.plain_of(recipe), config.plain_of(fixed)
    assert {key for key in here if here[key] != there[key]} == {
        "data",
        "output",
        "resample_groups",
    }  # so that the two can be compared
    assert RECIPE["subsets"]["rl"]["split"] == "train"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_plan_the_same_and_go_on(checkpoint, scenes, tmp_path):
    """Three prompts a step, the second one's group over both processes; resumed from the middle, equal to the digit."""
    changes = {"steps": 4, "save_steps": 2, "prompts_per_step": 3, "resample_groups": 1, "processes": 2}
    recipe = gym_recipe(checkpoint, scenes, tmp_path / "run", engine={"backend": "transformers"}, **changes)
    layout = ROOT / "recipes" / "accelerate" / "cpu_2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(layout)]
    command += ["-m", "audio_llm", "grpo", str(write_recipe(recipe, tmp_path / "r.yaml"))]
    found = []
    for _ in range(2):
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        state = json.loads((recipe.output / "checkpoint-4" / gym.FILE).read_text())
        found.append((prompts_seen(recipe.output), timeless(metrics(recipe.output)), state))
        (recipe.output / "result.json").unlink()
        shutil.rmtree(recipe.output / "checkpoint-4")
    assert found[0] == found[1]
    assert len({name for step in found[0][0] for name in step["ids"]}) == 12
    assert all(log["parity/max_abs_logp_difference"] < 1e-4 for log in found[0][1])
