"""A supervised run that is killed at a random step, in a process of its own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from audio_llm import config as recipes
from audio_llm.tasks import trainer
from audio_llm.tasks.base import TaskRecipe


def train_and_kill(recipe: TaskRecipe, first: int, last: int) -> None:
    """Train by `recipe` and SIGKILL it once its metrics have a drawn number of lines, from `first` to `last`.

    What it leaves is half a run: a checkpoint that it can go on from, and no summary. `first` has to be beyond the
    line of the first checkpoint; between `last` and the end there should be work for a second.
    """
    seed = random.SystemRandom().randrange(2**32)
    lines = random.Random(seed).randint(first, last)
    output = recipe.output
    path = output.with_name(f"{output.name}.yaml")
    recipes.dump(recipe, path)
    process = subprocess.Popen(
        [sys.executable, "-m", "audio_llm", "train", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + 300
    while written(output) < lines and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    print(f"killed at {written(output)} lines, {lines} drawn by seed {seed}")
    assert process.returncode == -signal.SIGKILL, said.decode()[-2000:]
    assert (output / trainer.CHECKPOINT).is_file() and not (output / trainer.SUMMARY).exists()


def written(output: Path) -> int:
    """Lines of the metrics so far."""
    path = output / trainer.METRICS
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics and weights to the byte, and the scores of the kept weights."""
    for name in (trainer.METRICS, trainer.WEIGHTS):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    summaries = [json.loads((folder / trainer.SUMMARY).read_text()) for folder in (one, other)]
    for key in ("steps", "scores", "last_scores"):
        assert summaries[0][key] == summaries[1][key], key
