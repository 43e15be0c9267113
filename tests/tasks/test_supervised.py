"""Heads, scores and the training of encoders: against the reference's geometry, scikit-learn, and by learning."""

import dataclasses
import json
import math
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score

from audio_llm.audio import Waveform
from audio_llm.cli import main
from audio_llm.encoders import heads as published_heads
from audio_llm.errors import CheckpointError, ConfigError, TrainingError
from audio_llm.model.folder import load_encoder
from audio_llm.model.validate import read_facts
from audio_llm.shards.schema import AudioInfo, Event, Sample, Source
from audio_llm.shards.writer import ShardWriter
from audio_llm.tasks import clips, trainer
from audio_llm.tasks import scores as scores_module
from audio_llm.tasks.spatial import SpatialRecipe, heads, task
from audio_llm.tasks.spatial.task import SpatialTask
from audio_llm.tasks.spatial.weights import LossWeights
from tests.killing import assert_same_run, train_and_kill
from tests.paths import ROOT, SHARED

FIXTURES = SHARED / "fixtures" / "bat_ref.npz"
RATE, SAMPLES = 16000, 8192
ENCODER = {
    "name": "spatial_ast",
    "preset": "tiny",
    "window_seconds": 0.512,
    "target_frames": 24,
    "n_mels": 32,
    "patch_size": [8, 32],
    "hidden_size": 32,
    "depth": 1,
    "heads": 2,
}


# ------------------------------------------------------------------------------------------- classes, angles, scores


def test_azimuth_classes_turn_from_front_left_to_right_front():
    ours = {0.0: 90, 90.0: 180, -90.0: 0, 180.0: 270, -180.0: 270, 45.4: 135}
    for azimuth, index in ours.items():
        assert heads.azimuth_class(azimuth) == index
    assert [heads.class_azimuth(index) for index in (90, 180, 0, 270)] == [0, 90, -90, 180]
    assert all(heads.azimuth_class(heads.class_azimuth(index)) == index for index in range(360))


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_classes_of_the_reference_geometry():
    """Reference columns: sensor xyz, source xyz (x right, y up, −z front), distance, azimuth and elevation class."""
    for row in np.load(FIXTURES)["geometry"]:
        right, up, back = row[3:6] - row[:3]
        azimuth = math.degrees(math.atan2(-right, -back))
        elevation = math.degrees(math.atan2(up, math.hypot(right, back)))
        distance = math.hypot(right, up, back)
        if distance > 10.25:
            continue
        found = heads.distance_class(distance), heads.azimuth_class(azimuth), heads.elevation_class(elevation)
        assert found == tuple(row[6:].astype(int))


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_great_circle_of_the_reference():
    reference = np.load(FIXTURES)
    rows = reference["ang_in"]

    def vectors(azimuth, elevation):
        return np.array([heads.unit_vector(a, e - 90) for a, e in zip(azimuth, elevation, strict=True)])

    orders = [((0, 2), (1, 3)), ((0, 1), (2, 3))]
    errors = []
    for (a, b), (c, d) in orders:
        angles = scores_module.great_circle(vectors(rows[a], rows[b]), vectors(rows[c], rows[d]))
        errors.append(np.abs(angles - reference["ang_out"]).max())
    assert min(errors) < 1e-6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_average_precision_is_scikit_learns(pairs):
    scores, positive = np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs])
    if positive.any():
        ours = scores_module.average_precision(scores, positive)
        assert ours == pytest.approx(average_precision_score(positive, scores))


def test_column_targets():
    labels = {"bell": 0, "dog": 1}
    events = [
        Event("bell", 0.1, 0.5, 90.0, 0.0, 2.0),
        Event("dog", 0.62, 0.64),
        Event("bell", 0.45, 0.8, 0.0, 0.0, 1.0),
    ]
    target = heads.event_targets([events], labels, columns=10, column_seconds=0.1)
    assert target.activity[0, :, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert target.activity[0, :, 1].tolist() == [
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
    ]  # shorter than half a column, still there
    torch.testing.assert_close(target.direction[0, 2, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        target.direction[0, 4, 0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0
    )  # the nearer
    assert target.log_distance[0, 2, 0].item() == pytest.approx(math.log(2.0))
    assert target.log_distance[0, 6, 1].isnan() and not target.direction[0, 6, 1].any()


def test_clip_targets_ask_for_a_place_only_where_there_is_one():
    labels = {"bell": 0, "dog": 1}
    one, two = Event("bell", 0, 1, -90.0, 10.0, 1.6), Event("dog", 0, 1, 90.0, 0.0, 3.0)
    target = heads.clip_targets([[one], [one, two], [dataclasses.replace(two, azimuth=None)]], labels)
    assert target.sound.tolist() == [[1, 0], [1, 1], [0, 1]]
    assert target.azimuth.tolist() == [0, -1, -1] and target.elevation.tolist() == [100, -1, 90]
    assert target.distance.tolist() == [3, -1, 6]


def test_losses_of_perfect_and_of_unknown_answers():
    labels = {"bell": 0, "dog": 1}
    events = [[Event("bell", 0.0, 0.5, 30.0, 0.0, 2.0)], []]
    clip, event = heads.clip_targets(events, labels), heads.event_targets(events, labels, 4, 0.25)
    perfect = heads.EventOutput(200 * event.activity - 100, event.direction, event.log_distance.nan_to_num())
    assert all(float(value) == pytest.approx(0, abs=1e-6) for value in heads.event_losses(perfect, event).values())
    one_hot = [
        torch.nn.functional.one_hot(part.clamp(min=0), size)
        for part, size in zip(clip[1:], (21, 360, 180), strict=True)
    ]
    logits = published_heads.SpatialLogits(200 * clip.sound - 100, *(100.0 * part for part in one_hot))
    parts = heads.clip_losses(logits, clip, heads.LossWeights())
    assert all(float(value) == pytest.approx(0, abs=1e-6) for value in parts.values())
    weights = heads.LossWeights(azimuth_smoothing=5.0)
    turned = [logits._replace(azimuth=100.0 * torch.roll(one_hot[1], shift, 1)) for shift in (0, 3, 90)]
    losses = [float(heads.clip_losses(answer, clip, weights)["azimuth"]) for answer in turned]
    assert losses[0] < losses[1] < losses[2]


def test_scores_of_perfect_answers_and_of_mirrored_ones():
    labels = {"bell": 0, "dog": 1}
    places = [(30.0, 0.0, 2.0), (-100.0, 20.0, 4.0), (150.0, -30.0, 1.0), (-60.0, 0.0, 6.0)]
    events = [[Event(name, 0.0, 0.5, *place)] for name, place in zip(["bell", "dog"] * 2, places, strict=True)]
    clip, event = heads.clip_targets(events, labels), heads.event_targets(events, labels, 4, 0.25)
    one_hot = [
        torch.nn.functional.one_hot(part, size).float() for part, size in zip(clip[1:], (21, 360, 180), strict=True)
    ]
    logits = published_heads.SpatialLogits(clip.sound, *one_hot)
    output = heads.EventOutput(2 * event.activity - 1, event.direction, event.log_distance)
    scores = task.summarise([task.observe(logits, output, clip, event, events, labels)])
    assert scores["score"] == pytest.approx(1.0)
    assert scores["er20"] == 0 and scores["direction_mae"] < 1 and scores["event_direction_mae"] < 1e-3
    mirror = torch.tensor([1.0, -1.0, 1.0])
    output = output._replace(direction=event.direction * mirror, activity=-output.activity)
    scores = task.summarise([task.observe(logits, output, clip, event, events, labels)])
    assert scores["event_left_right"] == 0 and scores["event_front_back"] == 1 and scores["frame_f1"] == 0


# ------------------------------------------------------------------------------------------------- data and training


def write_scenes(folder: Path, count: int, seed: int, events: bool = True) -> Path:
    """Noise ("hiss") or a tone ("beep") that is louder and earlier on one side: the least there is to learn."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder) as writer:
        for number in range(count):
            label, side = ("hiss", "beep")[rng.integers(2)], (1, -1)[rng.integers(2)]
            onset, offset = rng.uniform(0.0, 0.15), rng.uniform(0.3, 0.5)
            time = np.arange(SAMPLES) / RATE
            sound = (
                rng.standard_normal(SAMPLES) if label == "hiss" else np.sin(2 * np.pi * rng.uniform(500, 2000) * time)
            )
            sound = 0.1 * sound * ((time > onset) & (time < offset))
            samples = np.stack([sound, 0.4 * np.roll(sound, 6)])[::side] + 1e-4 * rng.standard_normal((2, SAMPLES))
            waveform = Waveform(samples.astype(np.float32), RATE, "binaural")
            event = Event(label, onset, offset, 60.0 * side, 0.0, 2.0)
            info, source = AudioInfo.of(waveform), Source("made", clip=f"{seed}-{number}")
            writer.write(
                Sample(f"s{number}", "scene", events=[event] if events else [], audio=[info], source=source), waveform
            )
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return write_scenes(folder / "train", 96, seed=1), write_scenes(folder / "validation", 40, seed=2)


def recipe(scenes, output: Path, **changes) -> SpatialRecipe:
    values = {"train": [scenes[0]], "validation": scenes[1], "output": output, "encoder": ENCODER, "steps": 12}
    values |= {"batch_size": 16, "learning_rate": 3e-3, "log_steps": 1, "save_steps": 4}
    return SpatialRecipe(**{**values, **changes})


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def test_it_learns_what_and_where(scenes, tmp_path):
    scores = trainer.TaskTrainer(recipe(scenes, tmp_path, steps=70)).fit()
    assert scores["event_class_accuracy"] > 0.9 and scores["event_left_right"] > 0.9 and scores["frame_f1"] > 0.8
    encoder, labels = load_encoder(tmp_path), read_facts(tmp_path)["labels"]
    task = SpatialTask(encoder, labels, LossWeights()).eval()
    task.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    spatial, events = task.spatial, task.events
    assert labels == ["beep", "hiss"] and not encoder.training
    store = clips.ClipStore([scenes[1]], encoder)
    batch = clips.collate([store[number] for number in range(len(store))], 2, SAMPLES)
    with torch.inference_mode():
        tokens, _ = encoder(batch.waveform, batch.lengths)
        output = events(encoder.patches(tokens))
        assert spatial(tokens).sound.shape == (40, 2)
    left = (output.direction[..., 1] * output.activity.sigmoid()).sum(dim=(1, 2)) > 0
    truth = torch.tensor([listed[0].azimuth > 0 for listed in batch.events])
    assert (left == truth).float().mean() > 0.9  # counter-clockwise: left is +y


def test_a_killed_run_goes_on_as_if_nothing_had_happened(scenes, tmp_path, monkeypatch):
    changes = {"encoder": {**ENCODER, "drop_path": 0.2}, "eval_steps": 6}
    changes["augment"] = clips.Augmentation(shift_seconds=0.1, frequency_mask=8, time_mask=4)
    whole = trainer.TaskTrainer(recipe(scenes, tmp_path / "whole", **changes))
    expected = whole.fit()
    killed = trainer.TaskTrainer(recipe(scenes, tmp_path / "killed", **changes))
    update = killed._update

    def dies(batch, progress):
        if killed.step == 10:  # after the checkpoint at step 8
            raise KeyboardInterrupt
        return update(batch, progress)

    monkeypatch.setattr(killed, "_update", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    again = trainer.TaskTrainer(recipe(scenes, tmp_path / "killed", **changes))
    assert again.fit() == expected
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12
    for key, value in whole.raw.state_dict().items():
        assert torch.equal(value, again.raw.state_dict()[key]), key
    steps = again.step
    assert steps == 12 and trainer.TaskTrainer(recipe(scenes, tmp_path / "killed", **changes)).fit() == expected
    with pytest.raises(ConfigError, match="found another run"):
        trainer.TaskTrainer(recipe(scenes, tmp_path / "killed", **changes, learning_rate=1e-4)).fit()


def test_a_process_killed_at_a_random_step_goes_on_to_the_same_metrics(scenes, tmp_path):
    changes = {"steps": 40, "encoder": {**ENCODER, "drop_path": 0.2}, "eval_steps": 9, "ema": 0.9, "report_to": []}
    changes["augment"] = clips.Augmentation(shift_seconds=0.1, frequency_mask=8, time_mask=4)
    trainer.TaskTrainer(recipe(scenes, tmp_path / "whole", **changes)).fit()
    killed = recipe(scenes, tmp_path / "killed", **changes)
    train_and_kill(killed, first=6, last=12)
    trainer.TaskTrainer(killed).fit()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_gradient_that_is_no_number_ends_the_run(scenes, tmp_path):
    """With a finite loss, in the last step: nothing else would have told of it."""
    run = trainer.TaskTrainer(recipe(scenes, tmp_path / "run", steps=1, eval_steps=0))
    next(run.raw.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match="step 1: expected a finite gradient, found nan. Lower learning_rate"):
        run.fit()
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


def test_shards_made_anew_are_other_data(tmp_path):
    folders = [write_scenes(tmp_path / "shards", 8, seed=1)] * 2
    trainer.TaskTrainer(recipe(folders, tmp_path / "run", steps=1, batch_size=4)).fit()
    trainer.TaskTrainer(recipe(folders, tmp_path / "run", steps=1, batch_size=4)).fit()
    shutil.rmtree(tmp_path / "shards")
    write_scenes(tmp_path / "shards", 8, seed=2)
    with pytest.raises(ConfigError, match="found another run"):
        trainer.TaskTrainer(recipe(folders, tmp_path / "run", steps=1, batch_size=4)).fit()


def test_a_time_budget_ends_the_run_and_the_schedule(scenes, tmp_path):
    scores = trainer.TaskTrainer(recipe(scenes, tmp_path, steps=None, seconds=2.0)).fit()
    summary = json.loads((tmp_path / "summary.json").read_text())
    rates = [json.loads(line).get("rate") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate is not None]
    assert scores["score"] >= 0 and rates[-1] < max(rates)
    assert summary["seconds"] < 30


def test_of_steps_and_seconds_the_nearer_limit_ends_the_run(scenes, tmp_path, monkeypatch):
    both = trainer.TaskTrainer(recipe(scenes, tmp_path / "steps", steps=2, seconds=1000.0))
    both.fit()
    alone = trainer.TaskTrainer(recipe(scenes, tmp_path / "alone", steps=2))
    alone.fit()
    assert both.step == alone.step == 2
    for a, b in zip(both.raw.parameters(), alone.raw.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # the rates are those of the steps
    # A clock that says 3 s at the first look and 2 s more at each: the budget is over before the steps are.
    times = iter(range(3, 100, 2))
    monkeypatch.setattr(trainer.TaskTrainer, "seconds", property(lambda self: float(next(times))))
    timed = trainer.TaskTrainer(recipe(scenes, tmp_path / "time", steps=1000, seconds=8.0, log_steps=100))
    timed.fit()
    assert timed.step == 3


def test_augmentation_moves_the_truth_with_the_sound():
    samples = np.random.default_rng(0).standard_normal((2, 1600)).astype(np.float32)
    events = [Event("bell", 0.02, 0.05, 40.0, 10.0, 1.0)]
    mirrored, flipped = clips.mirror(samples, events)
    assert np.array_equal(mirrored, samples[::-1]) and flipped[0].azimuth == -40.0
    again, restored = clips.mirror(mirrored, flipped)
    assert np.array_equal(again, samples) and restored == events
    foa, _ = clips.mirror(np.ones((4, 8), dtype=np.float32), [])
    assert foa[:, 0].tolist() == [1, -1, 1, 1]
    for offset in (160, -160):
        moved, at = clips.shift(samples, events, offset, RATE)
        kept = slice(max(offset, 0), 1600 + min(offset, 0))
        assert np.array_equal(moved[:, kept], samples[:, slice(max(-offset, 0), 1600 - max(offset, 0))])
        assert at[0].onset == pytest.approx(0.02 + offset / RATE) and np.count_nonzero(moved) == 2 * (1600 - 160)


def test_long_clips_become_windows_with_their_own_events():
    events = [Event("a", 0.5, 3.0, 10.0), Event("b", 4.9, None)]
    first, second = clips.events_between(events, 0.0, 2.0), clips.events_between(events, 2.0, 2.0)
    assert [(e.onset, e.offset) for e in first] == [(0.5, 2.0)] and [(e.onset, e.offset) for e in second] == [
        (0.0, 1.0)
    ]
    assert [(e.label, e.onset, e.offset) for e in clips.events_between(events, 4.0, 2.0)] == [
        ("b", pytest.approx(0.9), 2.0)
    ]


def test_every_epoch_holds_every_clip_once_over_all_ranks(scenes):
    store = clips.ClipStore([scenes[0]], trainer.build_encoder(ENCODER))
    plans = [clips.BatchPlan(store, clips.Augmentation(), batch_size=16, seed=3, rank=r, world=2) for r in (0, 1)]
    epochs = [[i for step in range(6 * e, 6 * e + 6) for plan in plans for i in plan.indices(step)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(96)) and epochs[0] != epochs[1]
    uncached = clips.ClipStore([scenes[0]], trainer.build_encoder(ENCODER), memory_gib=0)
    alone = clips.BatchPlan(uncached, clips.Augmentation(), batch_size=16, seed=3, rank=0, world=2)
    torch.testing.assert_close(alone.batch(4).waveform, plans[0].batch(4).waveform, atol=2e-5, rtol=0)
    assert alone.batch(4).events == plans[0].batch(4).events


def damaged(folder: Path, count: int) -> Path:
    """Scenes of which the sound of the eighth is zeros but for its head."""
    folder = write_scenes(folder, count, seed=4)
    (shard,) = folder.glob("*.tar")
    with tarfile.open(shard) as tar:
        member = next(entry for entry in tar if entry.name == "s7.flac")
    with open(shard, "r+b") as file:
        file.seek(member.offset_data + 60)
        file.write(bytes(member.size - 60))
    return folder


def test_a_clip_that_cannot_be_decoded_is_one_reject_however_often_its_turn_comes(tmp_path):
    folder = damaged(tmp_path, 60)
    store = clips.ClipStore([folder], trainer.build_encoder(ENCODER), memory_gib=0)  # decoded at every access
    plan = clips.BatchPlan(store, clips.Augmentation(), batch_size=20, seed=0, rank=0, world=1)
    for step in range(12):  # four epochs
        assert len(plan.batch(step).events) == 20
    assert [reject["sample"] for reject in store.rejects] == ["7"]
    assert len(store.readable(range(60))) == 59 and len(store.rejects) == 1  # as validation reads


def test_a_validation_from_disk_does_without_a_clip_that_cannot_be_decoded(scenes, tmp_path) -> None:
    changes = {"steps": 2, "memory_gib": 0, "max_reject_share": 0.05}
    done = trainer.TaskTrainer(recipe((scenes[0], damaged(tmp_path / "validation", 40)), tmp_path / "run", **changes))
    assert done.fit()["score"] > 0 and [reject["sample"] for reject in done.validation.rejects] == ["7"]


def test_folders_without_events_or_with_new_labels_are_refused(scenes, tmp_path):
    silent = write_scenes(tmp_path / "silent", 4, seed=3, events=False)
    with pytest.raises(TrainingError, match="expected samples with events, found 4 of 4 unusable"):
        trainer.TaskTrainer(recipe((silent, scenes[1]), tmp_path / "out"))
    with pytest.raises(TrainingError, match="expected labels among 1 known, found 'beep'"):
        trainer.TaskTrainer(recipe(scenes, tmp_path / "out", labels=["hiss"]))


def test_command_line(scenes, tmp_path, capsys):
    path = tmp_path / "encoder.yaml"
    tree = {
        "task": "encoder",
        "train": [str(scenes[0])],
        "output": str(tmp_path / "run"),
        "encoder": ENCODER,
        "steps": 2,
    }
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path), "batch_size=8"]) == 0
    assert (tmp_path / "run" / "encoder.safetensors").is_file() and (tmp_path / "run" / "recipe.yaml").is_file()
    for overrides, message in (
        (["batchsize=8"], "unknown key 'batchsize' (did you mean 'batch_size'?)"),
        (["task=spacial"], "did you mean 'spatial'"),
        (["distance_weight=0.5"], "distance_weight: expected keys of task spatial, found one of seld"),
        (["steps="], "expected 'steps', 'seconds' or both (the smaller counts), found neither"),
    ):
        assert main(["train", str(path), *overrides]) == 2
        assert message in capsys.readouterr().err


def test_damaged_folder_is_one_clear_message(scenes, tmp_path):
    trainer.TaskTrainer(recipe(scenes, tmp_path, steps=1)).fit()
    weights = (tmp_path / "encoder.safetensors").read_bytes()
    (tmp_path / "encoder.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_encoder(tmp_path)
    (tmp_path / "encoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected a file encoder\.safetensors, found none"):
        load_encoder(tmp_path)


def test_recipes_load():
    for path in sorted((ROOT / "recipes").glob("*/encoder.yaml")):
        loaded = trainer.recipes.load(SpatialRecipe, path)
        loaded.check()
        trainer.build_encoder({**loaded.encoder, "depth": 1})


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_have_the_curve_of_one(scenes, tmp_path):
    from tests.training.test_distributed import trained

    still = clips.Augmentation(swap=False, gain_db=0.0)  # its draws differ from process to process
    whole = recipe(scenes, tmp_path / "one", steps=3, augment=still)
    trainer.TaskTrainer(whole).fit()
    path = tmp_path / "encoder.yaml"
    trainer.recipes.dump(dataclasses.replace(whole, output=tmp_path / "two"), path)
    trained("cpu_2", ["-m", "audio_llm", "train", str(path)])
    # Batch statistics are each process's own, hence not to the last digit.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.02)
    alone = trainer.TaskTrainer(recipe(scenes, tmp_path / "again", init=tmp_path / "two"))
    alone.raw.load_state_dict(load_file(tmp_path / "two" / "encoder.safetensors"))
    found = metrics(tmp_path / "two")[-1]
    for name, value in alone.evaluate().items():  # of all clips, gathered from both processes
        assert found[f"validation_{name}"] == pytest.approx(value, abs=1e-4), name
    before = metrics(tmp_path / "two")
    trained("cpu_2", ["-m", "audio_llm", "train", str(path)])  # complete: nothing is done again
    assert metrics(tmp_path / "two") == before
