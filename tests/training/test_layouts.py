"""All weights of a model with a tied head, shared out over two processes on a CPU: learnt as in whole copies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from audio_llm.model.build import load_model
from tests.paths import ROOT
from tests.training.test_distributed import NEEDS_COMPILER, here, launched
from tests.training.test_grpo import metrics


def recipe_of(folder: Path, verb: str, model: Path, data: Path) -> Path:
    folder.mkdir()
    tree = {"verb": verb, "output": str(folder / "run"), "model": {"path": str(model)}, "data": {"train": [str(data)]}}
    tree |= {"train": {"language_model": "full"}, "learning_rate": 1e-3, "precision": "fp32", "steps": 3}
    if verb == "grpo":
        tree |= {"rewards": {"tests.training.test_grpo:even_ids": 1.0}, "engine": {"backend": "transformers"}}
        tree |= {"prompts_per_step": 2, "group_size": 4, "max_completion_length": 8, "parity_bound": 1e-4}
    else:
        tree |= {"batch_size": 1}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"export": ["merged"]}))
    return path


def start(layout: str, recipe: Path, verb: str, *more: str) -> None:
    done = launched(layout, ["-m", "audio_llm", verb, str(recipe), "--expect-processes", "2", *more])
    assert done.returncode == 0, done.stdout[-3000:]


def assert_alike(one: Path, two: Path) -> None:
    """Losses and exported weights of the runs beside two recipes."""
    losses = [[line["loss"] for line in metrics(path.parent / "run") if "loss" in line] for path in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 3 and any(losses[0])
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3
    first, second = (load_file(path.parent / "run" / "merged" / "model.safetensors") for path in (one, two))
    counts = ("running_mean", "running_var", "num_batches_tracked")  # of its batches: a process's own
    assert first.keys() == second.keys()
    assert max(float((first[key] - second[key]).abs().max()) for key in first if not key.endswith(counts)) < 1e-3
    load_model(two.parent / "run" / "merged")


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.distributed
def test_sft_under_zero3_is_that_of_one_process(checkpoint, shards, tmp_path):
    one, two = (recipe_of(tmp_path / name, "sft", checkpoint(tie=True), shards()) for name in ("one", "two"))
    here(["-m", "audio_llm", "sft", str(one), "gradient_accumulation=4"])
    start("zero3_cpu", two, "sft", "gradient_accumulation=2")
    assert_alike(one, two)


@pytest.mark.slow
@pytest.mark.distributed
def test_grpo_under_fsdp_is_that_of_whole_copies(checkpoint, shards, tmp_path):
    """Against two processes by DDP, which draw the same replies: one process draws others."""
    copies, parts = (recipe_of(tmp_path / name, "grpo", checkpoint(tie=True), shards()) for name in ("copies", "parts"))
    start("cpu_2", copies, "grpo")
    start("fsdp2_cpu", parts, "grpo")
    assert_alike(copies, parts)


def test_the_matrix_names_tests_that_are_there():
    text = (
        (ROOT / "docs" / "sft.md").read_text().split("What was run in two processes")[1].split("`accelerate launch")[0]
    )
    named = {name if "/" in name else f"tests/training/{name}" for name in re.findall(r"`([\w/]+\.py)`", text)}
    assert len(named) == 5 and all((ROOT / name).is_file() for name in named)
