"""A run folder is one run's: what would change its result is refused with what differs, for every verb that trains."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from audio_llm import config, identity
from audio_llm.cli import main
from audio_llm.errors import ConfigError
from audio_llm.training import grpo, sft
from audio_llm.training.transformers_rollouts import TransformersRollouts
from tests.conftest import make_shards
from tests.paths import ROOT
from tests.tasks.test_language_model import write_text
from tests.training.test_grpo import make_recipe
from tests.training.test_sft import recipe_of


def scaled(folder: Path) -> None:
    """Train the model in `folder` anew, as far as a digest can tell."""
    path = next(folder.glob("*.safetensors"))
    save_file({key: value * 1.5 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def runs(checkpoint, shards, tmp_path_factory) -> dict[str, Any]:
    """A finished run of SFT and one of GRPO from a model of their own, and what else a recipe may name."""
    root = tmp_path_factory.mktemp("runs")
    model = shutil.copytree(checkpoint(), root / "model")
    recipes = {
        "sft": recipe_of(root / "sft", model, shards(), steps=1, save_steps=1),
        "grpo": make_recipe(lambda: model, shards, root / "grpo", steps=1, save_steps=1),
    }
    sft.run(recipes["sft"])
    RUN["grpo"](recipes["grpo"])
    return recipes | {"model": model, "root": root}


CHANGES = {
    "a longer run": (["steps=2"], "steps is 2 here and 1 there"),
    "rate": (["learning_rate=0.01"], "learning_rate is 0.01 here and 0.001 there"),
    "precision": (["precision=bf16"], "precision is bf16 here and fp32 there"),
    "LoRA's rank": (["lora.rank=2"], "lora.rank is 2 here and 4 there"),
    "LoRA's alpha": (["lora.alpha=128"], "lora.alpha is 128 here and 8 there"),
    "a frozen projector": (["train.projector=frozen"], "train.projector is frozen here and full there"),
    "an encoder that learns": (["train.encoder=full"], "train.encoder is full here and frozen there"),
    "its adapters": (["train.encoder=lora"], "train.encoder is lora here and frozen there"),
    "all of the language model": (["train.language_model=full"], "train.language_model is full here and lora there"),
    "no language model": (["train.language_model=frozen"], "train.language_model is frozen here and lora there"),
    "a part's rate": (["learning_rates.projector=0.5"], "learning_rates.projector is 0.5 here and None there"),
    "seed": (["seed=3"], "seed is 3 here and 0 there"),
    "style": (["data.style=answer"], "data.style is answer here and think there"),
    "hearing": (["data.hearing=left"], "data.hearing is left here and refuse there"),
    "weights": (["data.weights=[2]"], r"data.weights is \[2.0\] here and None there"),
}
EVEN = "tests.training.test_grpo:even_ids"
# A name with dots is no key of an override, so the whole group is given.
GRPO_CHANGES = {
    "a reward's weight": ([f"rewards={{'{EVEN}': 0.5}}"], f"rewards.{EVEN} is 0.5 here and 1.0 there"),
    "a reward more": ([f"rewards={{'{EVEN}': 1.0, format: 0.1}}"], "rewards.format is 0.1 here and None there"),
    "another reward": (["rewards={format: 1.0}"], "rewards.format is 1.0 here and None there; "),
    "a reward's target": (
        [f"rewards={{'{EVEN}': 1.0, length: {{weight: 0.1, target: 9}}}}"],
        "rewards.length is .*'target': 9.* here and None there",
    ),
    "group": (["group_size=2"], "group_size is 2 here and 4 there"),
    "temperature": (["temperature=0.5"], "temperature is 0.5 here and 1.0 there"),
    "length of a reply": (["max_completion_length=9"], "max_completion_length is 9 here and 8 there"),
    "engine": (["engine.backend=transformers"], "engine.backend is transformers here and "),
    "TRL's own": (["grpo={beta: 0.1}"], "grpo.beta is 0.1 here and None there"),
}
BATCH = {"sft": "batch_size=2", "grpo": "prompts_per_step=4"}
RUN = {"sft": sft.run, "grpo": lambda recipe: grpo.run(recipe, lambda *_: TransformersRollouts())}


def changed(recipe: Any, overrides: list[str]) -> Any:
    """`recipe` with overrides, as the command line puts them in."""
    path = recipe.output / "recipe.yaml"
    return config.load(type(recipe), path, overrides)


@pytest.mark.parametrize(
    ("verb", "change"),
    [
        *((verb, change) for change in CHANGES for verb in ("sft", "grpo")),
        *(("grpo", change) for change in GRPO_CHANGES),
    ],
)
def test_another_recipe_is_refused_with_what_differs(runs, verb: str, change: str) -> None:
    overrides, told = (CHANGES | GRPO_CHANGES)[change]
    folder = runs[verb].output
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"another run: .*{told}"):
        RUN[verb](changed(runs[verb], overrides))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_another_batch_other_data_and_another_model_are_refused(runs, verb: str, checkpoint, tmp_path: Path) -> None:
    recipe = runs[verb]
    other_model = tmp_path / "other"
    shutil.copytree(runs["model"], other_model)
    scaled(other_model)
    for override, told in {
        BATCH[verb]: BATCH[verb].partition("=")[0],
        f"data.train=[{make_shards(tmp_path / 'shards', seed=5)}]": "data.train .its shards. is",
        f"model.path={other_model}": "weights of model.path is",
    }.items():
        with pytest.raises(ConfigError, match=f"another run: .*{told}"):
            RUN[verb](changed(recipe, [override]))


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_the_same_run_is_known_and_what_decides_nothing_may_differ(runs, verb: str, capsys, tmp_path: Path) -> None:
    recipe = runs[verb]
    moved = shutil.copytree(runs["model"], tmp_path / "moved")
    more = ["log_steps=5", "save_steps=", "keep_checkpoints=1", f"model.path={moved}"]
    for overrides in ([], more):
        capsys.readouterr()
        RUN[verb](changed(recipe, overrides))
        assert "this run was finished before" in capsys.readouterr().out


def test_a_model_that_was_trained_anew_at_its_path_is_another(runs, tmp_path: Path) -> None:
    model = shutil.copytree(runs["model"], tmp_path / "model")
    recipe = dataclasses.replace(
        runs["sft"], output=tmp_path / "run", model=dataclasses.replace(runs["sft"].model, path=model)
    )
    sft.run(recipe)
    scaled(model)
    with pytest.raises(ConfigError, match="weights of model.path is"):
        sft.run(recipe)


def test_starting_over_takes_nothing_of_the_old_run(runs, shards, tmp_path: Path) -> None:
    """Neither checkpoints, which would be thought newer, nor lines of the log."""
    recipe = recipe_of(tmp_path / "run", runs["model"], shards(), steps=3, save_steps=1)
    sft.run(recipe)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    sft.run(dataclasses.replace(recipe, steps=1, seed=1, resume="never"))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_run_never_removes_what_it_begins_with(runs, shards, tmp_path: Path) -> None:
    output = tmp_path / "run"
    model = shutil.copytree(runs["model"], output / "merged")
    with pytest.raises(ConfigError, match="expected a folder that may be emptied"):
        sft.run(recipe_of(output, model, shards(), steps=1, resume="never"))
    assert (model / "config.json").is_file()


def test_a_run_that_left_nothing_is_nobodys(runs, shards, tmp_path: Path) -> None:
    """What failed before its first checkpoint stands in no other recipe's way."""
    recipe = recipe_of(tmp_path / "run", runs["model"], shards(), steps=1)
    told = identity.identity_of(dataclasses.replace(recipe, seed=9), {"weights of model.path": "x"})
    recipe.output.mkdir()
    identity.write(recipe.output, told)
    assert sft.run(recipe)["steps"] == 1


def test_the_tasks_are_known_by_the_same_rule(tmp_path: Path, capsys) -> None:
    """Encoder, language model and folds: the refusal names the keys; the same command says that it is done."""
    write_text(tmp_path / "text.jsonl", 40)
    command = ["train", str(ROOT / "recipes/quickstart/language_model.yaml"), f"text={tmp_path / 'text.jsonl'}"]
    command += [f"output={tmp_path / 'lm'}", "steps=1", "batch_size=4", "validation=4", "style=answer"]
    command += ["model.hidden_size=16", "model.intermediate_size=16", "model.num_hidden_layers=1"]
    assert main(command) == 0
    stamp = (tmp_path / "lm" / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0 and "finished before" in capsys.readouterr().out
    assert (tmp_path / "lm" / "model.safetensors").stat().st_mtime_ns == stamp
    assert main([*command, "learning_rate=0.1"]) == 2
    assert "another run: learning_rate is 0.1 here" in capsys.readouterr().err


def test_a_key_that_is_new_has_its_default_in_an_older_folder(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Recipe:
        output: Path
        rate: float = 1.0
        extra: int = 2

    def read(path: Path) -> Recipe:
        return config.load(Recipe, path)

    same = identity.identity_of(Recipe(tmp_path))
    identity.write(tmp_path, dataclasses.replace(same, recipe={"rate": 1.0}))
    assert not identity.differences(tmp_path, same, read)
    other = identity.identity_of(Recipe(tmp_path, extra=3))
    assert identity.differences(tmp_path, other, read) == ["extra is 3 here and 2 there"]
    (tmp_path / identity.FILE).write_text("{")
    with pytest.raises(ConfigError, match="another file"):
        identity.differences(tmp_path, same, read)
