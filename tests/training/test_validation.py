"""GRPO's validation: what is counted, that training does not notice it, which weights it keeps, when it stops a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("trl", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

from torch import Tensor  # noqa: E402

from audio_llm import config  # noqa: E402
from audio_llm.errors import ConfigError  # noqa: E402
from audio_llm.model.build import load_model  # noqa: E402
from audio_llm.training import grpo, validation  # noqa: E402
from audio_llm.training.callbacks import complete_checkpoints  # noqa: E402
from audio_llm.training.engine_recipe import EngineRecipe  # noqa: E402
from audio_llm.training.rollouts import Completion, PolicyWeights, Sampling  # noqa: E402
from audio_llm.training.transformers_rollouts import TransformersRollouts  # noqa: E402
from audio_llm.training.validation import Answered  # noqa: E402
from tests.paths import ROOT  # noqa: E402
from tests.training.test_grpo import environment, make_recipe, metrics, needs_vllm, transformers_engine, write_recipe  # noqa: E402

QUESTIONS = 5


class ListensForLeft(TransformersRollouts):
    """Samples as the policy does in training; asked, it says left, and right where it draws or hears silence."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.asked: list[tuple[float, list[Tensor]]] = []

    def generate(
        self, prompt_embeddings: Sequence[Tensor], group_sizes: Sequence[int], sampling: Sampling
    ) -> list[list[Completion]]:
        if set(group_sizes) != {1}:
            return super().generate(prompt_embeddings, group_sizes, sampling)
        self.asked.append((sampling.temperature, list(prompt_embeddings)))
        side = "left" if len(self.asked) % 3 == 1 else "right"
        ids = self.tokenizer(f"<answer>{side}</answer>")["input_ids"]
        return [[Completion(ids, [0.0] * len(ids))] for _ in prompt_embeddings]


def validated(checkpoint, shards, output, **changes: Any) -> grpo.GRPORecipe:
    data = {"train": [str(shards())], "validation": [str(shards(8, seed=1))], "validation_samples": QUESTIONS}
    return make_recipe(checkpoint, shards, output, **{"data": data, "eval_steps": 2, "steps": 5} | changes)


# --- what is counted -------------------------------------------------------------------------------------------------


def test_replies_are_read_as_rewards_read_them():
    row = {"answer": "rain", "choices": ["rain", "wind"]}
    replies = ["<answer>(A) rain</answer>", "<answer>B</answer>", "<think>rain", "<answer>(A) wind</answer>"]
    assert validation.grade(row, replies) == [1.0, 0.0, 0.0, 0.0]
    assert validation.grade({"answer": "yes", "choices": None}, ["<answer>Yes.</answer>"]) == [1.0]


def test_every_question_counts_once_and_silence_only_where_there_is_sound():
    answered = [Answered(0, "side", 1, 0, 0), Answered(1, "side", 1, 1, 1), Answered(2, None, 0, 0, None)]
    found = validation.summarise([*answered, answered[0]])
    assert found.pop("eval_accuracy") == found.pop("eval_accuracy_sampled") + 1 / 3 == pytest.approx(2 / 3)
    assert found == {
        "eval_accuracy_silence": 0.5,
        "eval_audio_gain": 0.5,
        "eval_accuracy/side": 1.0,
        "eval_questions": 3,
    }
    assert "eval_audio_gain" not in validation.summarise(answered[2:])


def test_the_policy_is_asked_with_sound_and_with_silence(checkpoint, shards, tmp_path):
    """Three replies a question: greedy, drawn, greedy in silence; accuracy is the share of them that are right."""
    engines = []

    def build(recipe: EngineRecipe, policy: PolicyWeights, tokenizer: Any, seed: int) -> Any:
        engines.append(ListensForLeft(tokenizer))
        return engines[0]

    result = grpo.run(validated(checkpoint, shards, tmp_path / "run"), build)
    logs = [log for log in metrics(tmp_path / "run") if "eval_accuracy" in log]
    assert [log["step"] for log in logs] == [2, 4, 5]
    [heard, drawn, silent] = engines[0].asked[:3]
    assert [temperature for temperature, _ in engines[0].asked[:3]] == [0.0, 1.0, 0.0]
    assert all(torch.equal(one, two) for one, two in zip(heard[1], drawn[1], strict=True))
    assert all((one - two).abs().max() > 1e-3 for one, two in zip(heard[1], silent[1], strict=True))
    left = logs[0]["eval_accuracy"]
    assert 0 < left < 1 and left * QUESTIONS == pytest.approx(round(left * QUESTIONS))
    for log in logs:
        assert log["eval_accuracy"] == log["eval_accuracy/side"] == left and log["eval_questions"] == QUESTIONS
        assert log["eval_accuracy_sampled"] == log["eval_accuracy_silence"] == pytest.approx(1 - left)
        assert log["eval_audio_gain"] == pytest.approx(2 * left - 1)
        assert not any(key.startswith("eval_reward") for key in log)
    assert result["eval_accuracy"] == left


# --- what a run does not notice --------------------------------------------------------------------------------------


def timeless(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`logs` without what the clock says, and without TRL's count of tokens, which begins anew with a resume."""
    clocks = {"seconds", "step_time", "num_tokens"}
    return [{k: v for k, v in log.items() if not k.startswith("time/") and k not in clocks} for log in logs]


def training(folder: Path) -> list[dict[str, Any]]:
    return timeless([log for log in metrics(folder) if "loss" in log])


def test_training_is_that_of_a_run_without_validation(checkpoint, shards, tmp_path):
    """To the last digit: the random state that samples the rollouts is not moved."""
    changes = {"prompts_per_step": 4, "steps": 4, "micro_batch_size": 8}
    grpo.run(validated(checkpoint, shards, tmp_path / "with", eval_steps=1, **changes), transformers_engine)
    grpo.run(make_recipe(checkpoint, shards, tmp_path / "without", **changes), transformers_engine)
    assert training(tmp_path / "with") == training(tmp_path / "without")
    steps = [log for log in metrics(tmp_path / "with") if "time/step" in log]
    assert all(log["time/update"] > 0 for log in steps)


def test_a_resumed_run_validates_as_an_unbroken_one(checkpoint, shards, tmp_path, monkeypatch):
    """Replies themselves are compared: the tiny model is never right."""
    said: dict[str, list[Any]] = {"whole": [], "cut": []}
    grade, current = validation.grade, "whole"
    monkeypatch.setattr(
        validation,
        "grade",
        lambda row, replies: said[current].append((row["sample_id"], replies)) or grade(row, replies),
    )
    recipe = validated(checkpoint, shards, tmp_path / "run", steps=4, save_steps=2)
    grpo.run(recipe, transformers_engine)
    whole = metrics(recipe.output)
    (recipe.output / "result.json").unlink()
    shutil.rmtree(recipe.output / "checkpoint-4")
    current = "cut"
    grpo.run(recipe, transformers_engine)
    assert said["cut"] == said["whole"][QUESTIONS:] and len(said["cut"]) == QUESTIONS
    assert len({replies[1] for _, replies in said["cut"]}) > 1
    assert timeless(metrics(recipe.output)) == timeless(whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_steps": 0}, "eval_steps: expected at least 1"),
        ({"data": {"train": ["t"]}}, "eval_steps: 2: expected data.validation to evaluate on, found none"),
        ({"eval_steps": None, "keep": "best", "save_steps": 2}, "keep: best: expected data.validation and eval_steps"),
        ({"eval_steps": None, "on_overfit": "stop"}, "on_overfit: stop: expected data.validation and eval_steps"),
        ({"keep": "best"}, "keep: best: expected eval_steps that are a multiple of save_steps.*save_steps: null"),
        ({"keep": "best", "save_steps": 4}, "found eval_steps: 2 and save_steps: 4"),
    ],
)
def test_what_cannot_be_is_refused(checkpoint, shards, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        validated(checkpoint, shards, tmp_path, **changes).check()


def test_recipes_say_the_same_words_in_sft_and_grpo():
    tree = {"output": "o", "model": {"path": "m"}, "data": {"train": ["t"], "validation": ["v"]}, "eval_steps": 5}
    assert config.build(grpo.GRPORecipe, tree).eval_steps == 5


# --- what a run decides ----------------------------------------------------------------------------------------------


def history(accuracies: Sequence[float], rewards: Sequence[float], questions: int = 100) -> list[dict[str, Any]]:
    """What a run logs that is validated after every second step."""
    logs: list[dict[str, Any]] = []
    for place, accuracy in enumerate(accuracies):
        logs += [{"step": 2 * place + n, "reward": rewards[place]} for n in (1, 2)]
        logs.append({"step": 2 * place + 2, "eval_accuracy": accuracy, "eval_questions": questions})
    return logs


@pytest.mark.parametrize(
    "accuracies, rewards, questions, found",
    [
        ([0.6, 0.7, 0.5], [0.1, 0.2, 0.3], 100, True),
        ([0.6, 0.7, 0.5], [0.1, 0.3, 0.2], 100, False),  # rewards fall as well: the policy broke, nothing was pleased
        ([0.6, 0.7, 0.6], [0.1, 0.2, 0.3], 50, False),  # 10 % of 50 questions are within twice the error
        ([0.6, 0.7, 0.6], [0.1, 0.2, 0.3], 500, True),
        ([1.0, 0.9], [0.1, 0.2], 100, True),  # the error of a share of 1 alone would be 0
        ([1.0, 0.99], [0.1, 0.2], 100, False),
        ([0.5, 0.6, 0.7], [0.1, 0.2, 0.3], 100, False),
        ([0.5], [0.1], 100, False),
    ],
)
def test_overfit_is_a_fall_beyond_its_error_while_rewards_rise(accuracies, rewards, questions, found):
    told = validation.overfit(history(accuracies, rewards, questions))
    assert (told is not None) is found
    if found:
        top = max(range(len(accuracies)), key=accuracies.__getitem__)
        assert f"at step {2 * top + 2}" in told


def test_of_equal_validations_the_first_is_best():
    assert validation.best([]) is None
    assert validation.best(history([0.5, 0.7, 0.7], [0, 0, 0])) == {"step": 4, "accuracy": 0.7, "questions": 100}


def scripted(monkeypatch, by_step: dict[int, float]) -> None:
    """Let the greedy reply to the first questions be right: as large a share of them as `by_step` says."""

    def ask(self: Any, questions: Any, places: Sequence[int]) -> list[Answered]:
        right = by_step[self.state.global_step] * len(questions)
        return [Answered(place, None, float(place < right), 0.0, 0.0) for place in places]

    monkeypatch.setattr(validation.ValidatedTrainer, "_ask", ask)


SIX = {"steps": 6, "save_steps": 2, "keep_checkpoints": 1, "schedule": "constant", "export": ["merged"]}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_best_weights_are_kept_and_exported(checkpoint, shards, tmp_path, monkeypatch, lora):
    scripted(monkeypatch, {2: 0.4, 4: 0.8, 6: 0.4})
    changes = SIX | {"train": {"language_model": "lora" if lora else "full"}}
    kept = grpo.run(validated(checkpoint, shards, tmp_path / "best", keep="best", **changes), transformers_engine)
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == kept["best"]
    assert kept["best"] == {"step": 4, "accuracy": 0.8, "questions": QUESTIONS} and kept["kept_step"] == 4
    assert [path.name for path in complete_checkpoints(tmp_path / "best")] == ["checkpoint-4", "checkpoint-6"]
    short = {**changes, "steps": 4}
    four = grpo.run(validated(checkpoint, shards, tmp_path / "four", **short), transformers_engine)
    last = grpo.run(validated(checkpoint, shards, tmp_path / "last", **changes), transformers_engine)
    assert four["kept_step"] == 4 and last["kept_step"] == 6 and last["best"] == kept["best"]
    best, at_four, at_six = (load_model(tmp_path / name / "merged").state_dict() for name in ("best", "four", "last"))
    assert all(torch.equal(best[name], at_four[name]) for name in at_four)
    assert any(not torch.equal(best[name], at_six[name]) for name in at_six)


def test_a_run_taken_up_again_keeps_what_was_best(checkpoint, shards, tmp_path, monkeypatch):
    """The best of the history that the checkpoint carries, not of steps that the killed run had made after it."""
    scripted(monkeypatch, {2: 0.8, 4: 1.0, 6: 0.4})
    recipe = validated(checkpoint, shards, tmp_path / "run", keep="best", **SIX | {"keep_checkpoints": 9})
    grpo.run(recipe, transformers_engine)
    (recipe.output / "result.json").unlink()
    for step in (4, 6):
        shutil.rmtree(recipe.output / f"checkpoint-{step}")
    scripted(monkeypatch, {4: 0.6, 6: 0.4})
    again = grpo.run(recipe, transformers_engine)
    assert again["best"]["step"] == again["kept_step"] == 2


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_run_that_is_overfit_says_so_or_stops(checkpoint, shards, tmp_path, monkeypatch, capsys, action):
    scripted(monkeypatch, {2: 1.0, 4: 0.2, 6: 0.2})
    monkeypatch.setattr(validation, "_rewards", lambda history, after, until: until)
    changes = SIX | {"export": []}
    result = grpo.run(validated(checkpoint, shards, tmp_path, on_overfit=action, **changes), transformers_engine)
    told = capsys.readouterr().err
    assert "validation at step 4: expected an accuracy that rises with the rewards, found 20.0% of 5 questions" in told
    assert result["steps"] == (4 if action == "stop" else 6) and result["best"]["step"] == 2
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / f"checkpoint-{result['steps']}").is_dir()


# --- vLLM ------------------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.vllm
def test_vllm_answers_the_validation_and_stays_in_step(checkpoint, shards, tmp_path):
    from audio_llm.serving.rollout_engines import build_engine

    engine = {"backend": "vllm", "max_model_len": 128, "max_num_seqs": 16}
    changes = {"engine": engine, "steps": 3, "eval_steps": 1, "parity_bound": 1e-4, "resample_groups": 1}
    grpo.run(validated(checkpoint, shards, tmp_path / "run", **changes), build_engine)
    logs = [log for log in metrics(tmp_path / "run") if "eval_accuracy" in log]
    assert [log["step"] for log in logs] == [1, 2, 3] and all(log["eval_questions"] == QUESTIONS for log in logs)


# --- processes -------------------------------------------------------------------------------------------------------


def launch(recipe: Path, layout: str) -> None:
    """Run `recipe` in as many processes as recipes/accelerate/`layout`.yaml says."""
    accelerate = ["accelerate.commands.accelerate_cli", "launch", "--config_file", f"recipes/accelerate/{layout}.yaml"]
    command = [sys.executable, "-m", *accelerate, "-m", "audio_llm", "grpo", recipe]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["cpu_2", "zero3_cpu"])
def test_two_processes_ask_a_share_each(checkpoint, shards, tmp_path, layout):
    """Five questions are no even number: each counts once, as in one process, and training does not notice them."""
    for name, more in (("with", {}), ("without", {"data": {"train": [str(shards())]}, "eval_steps": None})):
        recipe = validated(
            checkpoint, shards, tmp_path / name, steps=2, processes=2, engine={"backend": "transformers"}, **more
        )
        launch(write_recipe(recipe, tmp_path / f"{name}.yaml"), layout)
    [log] = [log for log in metrics(tmp_path / "with") if "eval_accuracy" in log]
    assert log["step"] == 2 and log["eval_questions"] == QUESTIONS
    assert training(tmp_path / "with") == training(tmp_path / "without")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["cpu_2", "zero3_cpu"])
def test_two_processes_export_the_best(checkpoint, shards, tmp_path, layout):
    """The tiny model is never right: of equal validations the first is best, so that of step 2."""
    how = {"save_steps": 2, "schedule": "constant", "export": ["merged"], "processes": 2}
    how |= {"engine": {"backend": "transformers"}}
    for name, more in (("best", {"steps": 4, "keep": "best"}), ("two", {"steps": 2})):
        recipe = validated(checkpoint, shards, tmp_path / name, **how | more)
        launch(write_recipe(recipe, tmp_path / f"{name}.yaml"), layout)
    result = json.loads((tmp_path / "best" / "result.json").read_text())
    assert (result["steps"], result["best"]["step"], result["kept_step"]) == (4, 2, 2)
    best, two = (load_model(tmp_path / name / "merged").state_dict() for name in ("best", "two"))
    assert all(torch.equal(best[name], two[name]) for name in two)
