"""A run folder that lost something since: a sentence with the file and the cure, and never a run that goes on without
its optimiser, as Transformers does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from audio_llm.cli import main
from audio_llm.files import read_own
from audio_llm.training.callbacks import COMPLETE, complete_checkpoints, saved_whole, written

DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no optimiser": (lambda folder: (folder / "optimizer.pt").unlink(), "its optimizer.pt of"),
    "no schedule": (lambda folder: (folder / "scheduler.pt").unlink(), "its scheduler.pt of"),
    "no random numbers": (lambda folder: (folder / "rng_state.pth").unlink(), "its rng_state.pth of"),
    "cut weights": (lambda folder: os.truncate(next(folder.glob("*.safetensors")), 100), "found one of 100"),
    "cut state": (lambda folder: os.truncate(folder / "trainer_state.json", 20), "its trainer_state.json of"),
    "cut marker": (lambda folder: os.truncate(folder / COMPLETE, 20), "expected what a run wrote there, found no JSON"),
    "empty marker": (
        lambda folder: os.truncate(folder / COMPLETE, 0),
        "expected what a run wrote there, found no JSON",
    ),
    "a list for a marker": (lambda folder: (folder / COMPLETE).write_text("[]"), "found list"),
}


def test_a_checkpoint_that_lost_something_is_not_resumed(checkpoint, shards, tmp_path: Path, capsys) -> None:
    recipe, run, kept = tmp_path / "sft.yaml", tmp_path / "run", tmp_path / "kept"
    recipe.write_text(
        f"verb: sft\noutput: {run}\nmodel: {{path: {checkpoint()}}}\ndata: {{train: [{shards()}]}}\nsteps: 2\n"
        "save_steps: 1\nbatch_size: 2\nexport: [merged]\nprecision: fp32\n"
    )
    assert main(["sft", str(recipe)]) == 0
    first, second = complete_checkpoints(run)
    assert saved_whole(second)["files"] == written(second) and "optimizer.pt" in written(second)
    shutil.copytree(second, run / "checkpoint-2 (copy)")  # of somebody's file manager: it is nobody's checkpoint
    assert complete_checkpoints(run) == [first, second]
    shutil.rmtree(run / "checkpoint-2 (copy)")

    (run / "result.json").write_text('{"position": ')
    capsys.readouterr()
    assert main(["sft", str(recipe)]) == 2
    assert "result.json: expected what a run wrote there, found no JSON" in capsys.readouterr().err
    (run / "result.json").unlink()

    shutil.copytree(second, kept)
    for damage, words in DAMAGED.values():
        damage(second)
        assert main(["sft", str(recipe)]) == 2
        told = capsys.readouterr().err
        assert words in told and f"Delete {second} to go on from the one before" in told, told
        shutil.rmtree(second)
        shutil.copytree(kept, second)
    # What the messages say works: without the last checkpoint the run ends from the one before.
    shutil.rmtree(second)
    assert main(["sft", str(recipe)]) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == 2


def test_an_object_is_what_a_run_writes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"step": 3}', encoding="utf-8")
    assert read_own(tmp_path / "a.json", "") == {"step": 3}
    with pytest.raises(FileNotFoundError):
        read_own(tmp_path / "b.json", "")
