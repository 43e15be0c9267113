"""Curves of a run in TensorBoard and other programs: the numbers of metrics.jsonl, also after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from audio_llm import files
from audio_llm.errors import ConfigError, PrerequisiteError
from audio_llm.training import sft, trackers
from tests.training.test_sft import recipe_of


def curve_of(folder: Path) -> dict[int, float]:
    """Loss by step, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {point.step: point.value for point in shown.Scalars("loss")}


def logged(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in files.read_lines(folder / "metrics.jsonl") if "loss" in line}


def clock_of(folder: Path) -> dict[int, float]:
    return {line["step"]: line["seconds"] for line in files.read_lines(folder / "metrics.jsonl")}


def test_a_run_and_its_resumption_are_one_curve(checkpoint, shards, tmp_path):
    recipe = recipe_of(tmp_path, checkpoint(), shards(), steps=4, save_steps=2, keep_checkpoints=9)
    assert recipe.report_to == ["tensorboard"]
    sft.run(recipe)
    whole = curve_of(tmp_path)
    assert whole == pytest.approx(logged(tmp_path)) and list(whole) == [1, 2, 3, 4]
    marker = tmp_path / "checkpoint-2" / "complete.json"
    saved, before = files.read_json(marker), clock_of(tmp_path)
    assert before[2] <= saved["seconds"] <= before[3]
    files.write_json(marker, saved | {"seconds": 1000.0})
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")
    result = sft.run(recipe)
    assert curve_of(tmp_path) == pytest.approx(whole)
    after = clock_of(tmp_path)
    assert after[2] == before[2] and 1000 < after[3] <= after[4] <= result["seconds"] < 1100


def test_a_run_keeps_its_mark_when_it_goes_on_and_loses_it_when_made_anew(checkpoint, shards, tmp_path):
    """By which programs that are not told a folder's step know whose curve to go on with."""
    values = {"steps": 2, "save_steps": 1, "keep_checkpoints": 9}
    sft.run(recipe_of(tmp_path, checkpoint(), shards(), **values))
    mark = trackers._mark(tmp_path)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-2")
    sft.run(recipe_of(tmp_path, checkpoint(), shards(), **values))
    assert trackers._mark(tmp_path) == mark
    sft.run(recipe_of(tmp_path, checkpoint(), shards(), **values, resume="never"))
    assert trackers._mark(tmp_path) != mark


def test_none_is_none(checkpoint, shards, tmp_path):
    sft.run(recipe_of(tmp_path, checkpoint(), shards(), steps=1, report_to=[]))
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_or_cannot_start(tmp_path, monkeypatch):
    def broken(folder: Path, step: int) -> None:
        raise OSError("no space left")

    with pytest.raises(ConfigError, match="report_to"):
        recipe_of(tmp_path, tmp_path, tmp_path, steps=1, report_to=["tensorbord"])
    monkeypatch.setitem(trackers._BUILD, "tensorboard", broken)
    with pytest.raises(ConfigError, match="tensorboard: expected a tracker that starts, found no space left"):
        trackers.Trackers(["tensorboard"], tmp_path, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PrerequisiteError, match=r"report_to: \[wandb\].*trackers"):
        trackers.Trackers(["wandb"], tmp_path, {})


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_other_trackers_take_a_run_offline(name, checkpoint, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HOME", str(tmp_path))
    pytest.importorskip(name, reason=f"{name} is not installed (extra: trackers)")
    folder = tmp_path / "run"
    sft.run(recipe_of(folder, checkpoint(), shards(), steps=2, report_to=[name]))
    expected = logged(folder)
    if name == "mlflow":
        [metric] = folder.glob("mlruns/*/*/metrics/loss")
        rows = [line.split() for line in metric.read_text().splitlines()]
        assert {int(step): float(value) for _, value, step in rows} == pytest.approx(expected)
    elif name == "wandb":
        [stored] = folder.glob("wandb/offline-run-*/run-*.wandb")
        assert stored.stat().st_size > 1000
    else:
        assert any((tmp_path / "trackio").iterdir())
