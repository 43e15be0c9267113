"""What version 0.1.0 wrote still loads, answers, resumes and scores as it did: tests/data/previous/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from audio_llm.cli import main
from tests.paths import DATA
from tests.test_house import load_recipe

PREVIOUS = DATA / "previous"
REPLIES = json.loads((PREVIOUS / "replies.json").read_text())
RUNS = ("seld", "echotwin", "folds", "encoder", "language_model", "sft", "grpo", "sft_stopped")
NOT_SCORES = ("seconds", "version")  # of numbers that differ from run to run
TODAYS_RULE = ("low", "high", "mcnemar", "silence_gap")  # intervals and tests are those of today's estimates


@pytest.fixture
def previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, as the current folder: the recipes name what lies beside them."""
    folder = tmp_path / "previous"
    shutil.copytree(PREVIOUS, folder)
    for path in folder.glob("*/run.json"):
        path.write_text(path.read_text().replace("@/", f"{folder}/"))
    monkeypatch.chdir(folder)
    return folder


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """`found` has everything that `expected` has; numbers to six digits, which another machine's sums may miss."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key in TODAYS_RULE:
                continue
            assert key in found, f"{where}.{key} is gone"
            if not any(part in key for part in NOT_SCORES):
                assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), where
    else:
        assert found == expected, where


def assert_same_tensors(found: Path, expected: Path) -> None:
    """But for biases of keys: softmax cancels them, so their gradients are rounding errors, which Adam blows up."""
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{found}: {name} differs")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: " ".join(reply["command"][-3:]))
def test_folders_answer_as_they_did(previous: Path, capsys: pytest.CaptureFixture, reply: dict[str, Any]) -> None:
    assert main(reply["command"]) == reply["exit"]
    assert_same(json.loads(capsys.readouterr().out), reply["answer"])


EVALUATIONS = {
    "eval": ["sft/merged", "data/test", "--engine", "transformers", "--controls", "silence,swap", "--max-tokens", "32"],
    "eval_encoder": ["encoder", "data/test"],
    "eval_echotwin": ["echotwin", "questions/dev", "--benchmark", "dcase_aqa", "--controls", "none"],
    "eval_seld": ["seld", "seld_data"],
}


@pytest.mark.parametrize("run", EVALUATIONS)
def test_an_evaluation_gives_the_same_predictions_and_scores(previous: Path, run: str) -> None:
    assert main(["eval", *EVALUATIONS[run], "--out", f"again/{run}", "--quiet"]) == 0
    assert_same(
        json.loads(Path("again", run, "scores.json").read_text()), json.loads(Path(run, "scores.json").read_text())
    )
    if Path(run, "predictions.jsonl").exists():
        assert_same(lines(Path("again", run, "predictions.jsonl")), lines(Path(run, "predictions.jsonl")))


@pytest.mark.parametrize("run", ["eval", "eval_think"])
def test_stored_answers_are_scored_as_they_were(previous: Path, run: str) -> None:
    before = json.loads(Path(run, "scores.json").read_text())
    Path(run, "scores.json").unlink()
    assert main(["rescore", run]) == 0
    assert_same(json.loads(Path(run, "scores.json").read_text()), before)


def test_a_finished_evaluation_asks_nothing_again(previous: Path, capsys: pytest.CaptureFixture) -> None:
    before = Path("eval/predictions.jsonl").read_bytes()
    assert main(["eval", *EVALUATIONS["eval"], "--out", "eval", "--quiet"]) == 0
    assert Path("eval/predictions.jsonl").read_bytes() == before
    assert main(["report", "before=eval_think", "after=eval", "--out", "report.html"]) == 0


def test_a_stopped_run_resumes_to_the_same_weights(previous: Path) -> None:
    before = lines(Path("sft_stopped/metrics.jsonl"))
    assert main(["sft", "sft_stopped/recipe.yaml"]) == 0
    assert lines(Path("sft_stopped/metrics.jsonl"))[: len(before)] == before  # not begun anew
    assert lines(Path("sft_stopped/order-0.jsonl")) == lines(Path("sft_expected.jsonl"))
    assert_same_tensors(Path("sft_stopped/checkpoint-4/adapter_model.safetensors"), Path("sft_expected.safetensors"))


@pytest.mark.parametrize("run", ["encoder", "sft", "grpo"])  # whose data is kept too
def test_a_finished_run_is_known_in_its_own_folder(previous: Path, capsys: pytest.CaptureFixture, run: str) -> None:
    before = {path: path.read_bytes() for path in Path(run).rglob("*.safetensors")}
    assert main(["run", f"{run}/recipe.yaml"]) == 0
    assert "this run was finished before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert main(["run", f"{run}/recipe.yaml", "seed=77"]) == 2
    assert "another run: seed is 77 here and 0 there" in capsys.readouterr().err


def test_a_recipe_run_again_gives_the_same_weights(previous: Path) -> None:
    """From the encoder and the language model of then: assembling, shards, training and merging."""
    assert main(["sft", "sft/recipe.yaml", "output=again"]) == 0
    assert_same_tensors(Path("again/merged/model.safetensors"), Path("sft/merged/model.safetensors"))
    assert main(["train", "encoder/recipe.yaml", "output=encoder_again"]) == 0
    assert_same_tensors(Path("encoder_again/encoder.safetensors"), Path("encoder/encoder.safetensors"))


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_a_finished_run_is_left_as_it_is(previous: Path, verb: str) -> None:
    before = {path: path.read_bytes() for path in sorted(Path(verb).rglob("*")) if path.is_file()}
    assert main([verb, f"{verb}/recipe.yaml"]) == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "path", sorted((PREVIOUS / "recipes").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_recipes_load(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("folder", RUNS)
def test_recipes_of_runs_load(folder: str) -> None:
    load_recipe(PREVIOUS / folder / "recipe.yaml")
