"""Rates of single parts, and stages: what learns in which steps, on which data, and that a stop changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from audio_llm import config, files
from audio_llm.errors import ConfigError
from audio_llm.model.build import load_model, load_processor
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import callbacks, examples, sft
from tests.training.test_sft import losses, order, recipe_of

ALIGN = {"objective": "align", "train": {"language_model": "frozen"}, "learning_rate": 2e-3, "steps": 3}


def weights(folder: Path, step: int) -> dict[str, Any]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


def moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {"projector" if "projector" in name else "lora" for name in before if not before[name].equal(after[name])}


@pytest.fixture(scope="module")
def staged(checkpoint, shards, tmp_path_factory) -> Path:
    """Three steps that align the projector, then three of both parts, with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("staged") / "run"
    sft.run(staged_recipe(folder, checkpoint(), shards()))
    return folder


def staged_recipe(folder: Path, model: Path, samples: Path, **changes: Any) -> sft.SFTRecipe:
    second = {"learning_rate": 1e-3, "learning_rates": {"language_model": 5e-4}, "schedule": "constant"}
    usual = {"steps": 3, "stages": [ALIGN, second], "save_steps": 1, "keep_checkpoints": 9}
    return recipe_of(folder, model, samples, **(usual | changes))


def test_each_stage_trains_its_parts_at_its_rates(staged):
    lines = [line for line in files.read_lines(staged / "metrics.jsonl") if "loss" in line]
    assert [line["stage"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert moved(weights(staged, 1), weights(staged, 3)) == {"projector"}
    assert moved(weights(staged, 3), weights(staged, 6)) == {"projector", "lora"}
    rates = [(line["learning_rate/projector"], line["learning_rate/language_model"]) for line in lines]
    assert rates[:3] == [(pytest.approx(2e-3 * share), 0) for share in (1, 0.75, 0.25)]  # a cosine
    assert rates[3:] == [(pytest.approx(1e-3), pytest.approx(5e-4))] * 3
    assert files.read_json(staged / "result.json")["stages"] == [3, 3]


@pytest.mark.parametrize("kept", [2, 3, 5], ids=["in the first stage", "between them", "in the second"])
def test_a_stop_in_any_stage_changes_nothing(staged, tmp_path, kept, checkpoint, shards):
    folder = tmp_path / "run"
    shutil.copytree(staged, folder)
    (folder / "result.json").unlink()
    for step in range(kept + 1, 7):
        shutil.rmtree(folder / f"checkpoint-{step}")
    result = sft.run(staged_recipe(folder, checkpoint(), shards()))
    assert result["steps"] == 6 and result["stages"] == [3, 3]
    assert losses(folder) == losses(staged)
    assert all(value.equal(weights(staged, 6)[name]) for name, value in weights(folder, 6).items())


def test_a_stage_has_data_of_its_own(checkpoint, shards, tmp_path):
    first, second = shards(), shards(10, 2, 1)
    own = {**ALIGN, "data": {"train": [str(first)], "style": "answer"}}
    result = sft.run(staged_recipe(tmp_path, checkpoint(), second, stages=[own, {}], data={"style": "think"}))
    seeds = [(step, name.split("-")[1]) for step, name in order(tmp_path)]
    assert seeds == [(step, "0" if step < 4 else "1") for step in range(1, 7) for _ in range(4)]
    assert result["position"]["samples"] == 34


def test_a_stage_ends_by_the_clock(checkpoint, shards, tmp_path):
    stages = [{**ALIGN, "steps": None, "seconds": 0.5}, {"learning_rate": 1e-3}]
    result = sft.run(staged_recipe(tmp_path, checkpoint(), shards(), stages=stages, save_steps=None))
    first, second = result["stages"]
    assert 1 <= first < 1000 and second == 3 and result["steps"] == first + second


PARTS = ("projector", "lora")


def test_a_part_has_a_rate_of_its_own(checkpoint, shards, tmp_path):
    own = {"learning_rates": {"projector": 1e-30}, "steps": 2, "save_steps": 1, "schedule": "constant"}
    sft.run(recipe_of(tmp_path, checkpoint(), shards(), **own))
    before, after = weights(tmp_path, 1), weights(tmp_path, 2)
    change = {part: max(float((after[n] - before[n]).abs().max()) for n in before if part in n) for part in PARTS}
    assert change["projector"] < 1e-20 and change["lora"] > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"batch_size": 4}, {}]}, r"stages\[0\]: batch_size.*expected one of objective, steps"),
        ({"stages": [{"learning_rat": 1.0}, {}]}, "did you mean 'learning_rate'"),
        ({"stages": [{"data": {"validation": []}}, {}]}, r"stages\[0\].data: validation"),
        ({"stages": [{"steps": 3}, {"train": {"language_model": "ful"}}]}, r"stages\[1\]: train: language_model"),
        ({"stages": [{"steps": 3}, {"steps": 4}]}, "steps: expected none beside stages"),
        ({"stages": [{"train": {"language_model": "full"}}, {}]}, "language_model: expected lora or full in all"),
        ({"stages": [{"seconds": 3, "data": {"style": "answer"}}, {}]}, "known before other data begins"),
        ({"stages": [3]}, r"stages\[0\]: expected a mapping"),
        ({"stages": [{"objective": "align"}, {}]}, "objective: align: expected a frozen language model"),
        ({"stages": [{}, {**ALIGN, "steps": None}]}, "objective: align: expected a stage before the last"),
        ({"objective": "align", "train": {"language_model": "frozen"}}, "a stage before the last"),
        ({"stages": [{"objective": "aline"}, {}]}, "objective"),
        (
            {"learning_rates": {"encoder": 1e-3}},
            "learning_rates.encoder: expected a rate above 0 of a part that learns",
        ),
        ({"learning_rates": {"projector": 0}}, "For a part that does not learn"),
    ],
)
def test_stages_and_rates_that_say_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(tmp_path, tmp_path, tmp_path, **{"steps": 5, **changes}).check()


def test_one_stage_is_a_run_of_its_keys(tmp_path):
    recipe = recipe_of(tmp_path, tmp_path, tmp_path, steps=5, stages=[{"learning_rate": 2e-3}])
    [stage] = recipe.stage_recipes()
    assert stage.learning_rate == 2e-3 and stage.steps == 5 and stage.stages is None


def test_stages_are_part_of_whose_the_folder_is(staged, checkpoint, shards):
    with pytest.raises(ConfigError, match="stages"):
        sft.run(staged_recipe(staged, checkpoint(), shards(), stages=[{**ALIGN, "steps": 2}, {}]))
    assert callbacks.complete_checkpoints(staged)


def test_the_recipe_with_its_stages_is_written_down(staged):
    read = config.load(sft.SFTRecipe, staged / "recipe.yaml")
    assert [stage.learning_rate for stage in read.stage_recipes()] == [2e-3, 1e-3]


def test_alignment_is_one_less_the_cosine_of_sound_and_words(checkpoint, shards):
    """By hand from the parts: projector's embeddings against the table's, row by row, however the batch is cut."""
    folder = checkpoint()
    model, processor = load_model(folder).eval(), load_processor(folder)
    rows = [examples.Examples(ShardDataset(shards()), processor)[index] for index in range(4)]
    rows[3].ids = rows[3].ids[rows[3].ids != model.config.audio_token_id]  # a question without sound does not count
    rows[3].labels, rows[3].input_audio, rows[3].audio_lengths = rows[3].labels[: len(rows[3].ids)], None, None
    table = model.get_input_embeddings().weight.detach().double().numpy()
    expected = []
    for row in rows[:3]:
        heard = model.get_audio_features(row.input_audio, row.audio_lengths).detach().double().numpy().mean(0)
        said = table[row.words.numpy()].mean(0)
        assert processor.tokenizer.decode(row.words) == examples.words_for(
            ShardDataset(shards())[row.row["index"]]["sample"]
        )
        expected.append(1 - heard @ said / np.linalg.norm(heard) / np.linalg.norm(said))

    def loss(rows: list[Any]) -> float:
        batch = examples.collate(rows, processor.tokenizer)
        audio = {key: batch[key] for key in ("input_ids", "input_audio", "audio_lengths")}
        return model(**audio, heard=examples.pad(batch["words"], examples.IGNORED)).loss.item()

    assert loss(rows) == pytest.approx(np.mean(expected), abs=1e-6)
    assert [loss([row]) for row in rows[:3]] == pytest.approx(expected, abs=1e-6)
