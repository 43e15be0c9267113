"""Classification and tagging: official folds, scores against scikit-learn, learning, resuming, cross-validation."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from audio_llm.audio import Waveform
from audio_llm.cli import main
from audio_llm.datasets import sounds
from audio_llm.encoders import urbansound_cnn
from audio_llm.encoders.heads import build_classifier
from audio_llm.errors import ConfigError, TrainingError
from audio_llm.model.encoder import build_encoder
from audio_llm.model.folder import save_parts
from audio_llm.shards.schema import AudioInfo, Event, Sample, Source
from audio_llm.shards.writer import ShardWriter
from audio_llm.tasks import clips
from audio_llm.tasks import trainer as trainer_module
from audio_llm.tasks.classification import ClassificationRecipe, predict
from audio_llm.tasks.classification import task as task_module
from audio_llm.tasks.classification.task import load_classifier
from audio_llm.tasks.spatial import SpatialRecipe
from eval.tasks import classification as scoring
from eval.tasks import classification_folds as folds
from eval.tasks.folds_recipe import merged
from tests.paths import SHARED

ENCODER = {"name": "urbansound_cnn", "preset": "tiny", "window_seconds": 0.5}
RATE = 16000
CLASSES = ("beep", "click train", "hiss")


def sound(label: str, rng: np.random.Generator, seconds: float = 0.5) -> np.ndarray:
    """A tone, clicks or noise, at any level and pitch: three classes that a small network tells apart soon."""
    time = np.arange(round(seconds * RATE)) / RATE
    if label == "beep":
        made = np.sin(2 * np.pi * rng.uniform(400, 3000) * time)
    elif label == "hiss":
        made = rng.standard_normal(len(time))
    else:
        made = (np.arange(len(time)) % int(rng.integers(400, 1200)) < 8).astype(float)
    return (rng.uniform(0.05, 0.3) * made + 1e-4 * rng.standard_normal(len(time))).astype(np.float32)


def write_esc50(root: Path, folds: int = 4, per_class: int = 3, seed: int = 0) -> Path:
    """A folder in ESC-50's layout; two clips (takes) from every recording."""
    rng = np.random.default_rng(seed)
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    rows = []
    for fold in range(1, folds + 1):
        for target, label in enumerate(CLASSES):
            for number in range(per_class):
                source = 1000 * fold + 100 * target + number
                for take in "AB":
                    name = f"{fold}-{source}-{take}-{target}.wav"
                    soundfile.write(root / "audio" / name, sound(label, rng), RATE)
                    category = label.replace(" ", "_")
                    row = {"filename": name, "fold": fold, "target": target, "category": category}
                    rows.append(row | {"esc10": True, "src_file": source, "take": take})
    write_rows(root / "meta" / "esc50.csv", rows)
    return root


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_esc50(tmp_path_factory.mktemp("corpus") / "esc")


def recipe(corpus, output: Path, **changes) -> ClassificationRecipe:
    values = {"task": "classification", "train": [corpus], "train_folds": [1, 2], "validation_folds": [3]}
    values |= {"output": output, "encoder": ENCODER, "steps": 30, "batch_size": 12, "learning_rate": 5e-3}
    values |= {"log_steps": 1, "save_steps": 4, "augment": clips.Augmentation(), "report_to": []}
    return ClassificationRecipe(**{**values, **changes})


# -------------------------------------------------------------------------------------------------- official folds


def test_official_folds_of_both_layouts(corpus, tmp_path):
    found = sounds.official_folds(sounds.find(corpus))
    assert list(found) == ["1", "2", "3", "4"] and {len(part) for part in found.values()} == {18}
    (tmp_path / "metadata").mkdir()
    names = {1: "100-1-0-0.wav", 2: "200-1-0-3.wav", 10: "300-8-1-0.wav"}
    rows = [
        {
            "slice_file_name": name,
            "fsID": name.split("-")[0],
            "fold": fold,
            "class": "car_horn",
            "salience": fold % 2 + 1,
        }
        for fold, name in names.items()
    ]
    write_rows(tmp_path / "metadata" / "UrbanSound8K.csv", rows)
    found = sounds.official_folds(sounds.find(tmp_path))
    assert list(found) == ["1", "2", "10"]  # as numbers
    assert [found[fold][0].foreground for fold in found] == [False, True, True]
    rows[0]["fsID"] = "999"
    write_rows(tmp_path / "metadata" / "UrbanSound8K.csv", rows)
    with pytest.raises(ConfigError, match="expected the recording its name says, found 999"):
        sounds.official_folds(sounds.find(tmp_path))


@pytest.mark.shared("data/esc10")
def test_esc10_has_no_recording_in_two_folds():
    found = sounds.official_folds(sounds.find(SHARED / "data" / "esc10"))
    recordings = [{clip.recording for clip in part} for part in found.values()]
    assert [len(part) for part in found.values()] == [80] * 4
    assert sum(map(len, recordings)) == len(set.union(*recordings))


def test_shuffled_folds_are_refused(corpus, tmp_path):
    root = tmp_path / "shuffled"
    (root / "meta").mkdir(parents=True)
    rows = read_rows(corpus / "meta" / "esc50.csv")
    order = np.random.default_rng(0).permutation(len(rows))
    mixed = [row | {"fold": rows[other]["fold"]} for row, other in zip(rows, order, strict=True)]
    write_rows(root / "meta" / "esc50.csv", mixed)
    with pytest.raises(ConfigError, match="expected the fold and recording its name says"):
        sounds.official_folds(sounds.find(root))
    renamed = [row | {"filename": f"clip{number}.wav"} for number, row in enumerate(mixed)]  # names that say nothing
    write_rows(root / "meta" / "esc50.csv", renamed)
    with pytest.raises(ConfigError, match="expected folds that share no recording"):
        sounds.official_folds(sounds.find(root))
    (root / "meta" / "esc50.csv").unlink()
    for label in CLASSES:
        (root / label).mkdir()
        (root / label / "a.wav").touch()
    with pytest.raises(ConfigError, match="expected a corpus with official folds"):
        sounds.official_folds(sounds.find(root))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["folds=5"], "expected 'official', found 5"),
        (["folds=shuffled"], "both sides"),
        (["training.train_folds=[1]"], "keys that the folds do not decide, found 'train_folds'"),
        (["test_folds=[7]"], "expected 1, 2, 3, 4, found '7'"),
        (["training.batchsize=3"], "did you mean 'batch_size'"),
        (["seeds=[1, 1]"], "different numbers"),
        (["sounds=nowhere"], "sounds nowhere: expected a file or folder, found none of that name"),
    ],
)
def test_recipes_that_would_not_cross_validate_are_refused(corpus, tmp_path, capsys, overrides, message):
    path = tmp_path / "folds.yaml"
    training = {"encoder": ENCODER, "steps": 1}
    tree = {"sounds": str(corpus), "output": str(tmp_path / "run"), "training": training}
    path.write_text(yaml.safe_dump(tree))
    assert main(["folds", str(path), *overrides]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda clip: clip.write_bytes(clip.read_bytes()[:900]), "the file is cut short. Mend them"),
        (lambda clip: clip.write_text("text"), "4 bytes that are not. Mend them"),
        (lambda clip: clip.unlink(), "1-1001-A-0.wav: expected an audio file"),
        (lambda clip: soundfile.write(clip, np.full(8000, np.nan), RATE, subtype="FLOAT"), "8000 of 8000 are NaN"),
    ],
    ids=["cut", "text", "absent", "nan"],
)
def test_an_unusable_clip_is_named_and_may_be_left_out(tmp_path, capsys, damage, message):
    root = write_esc50(tmp_path / "esc", per_class=2)
    damage(root / "audio" / "1-1001-A-0.wav")
    path = tmp_path / "train.yaml"
    tree = {"task": "classification", "train": [str(root)], "train_folds": [1, 2], "validation_folds": [3]}
    tree |= {"output": str(tmp_path / "run"), "encoder": ENCODER, "steps": 1, "batch_size": 4, "report_to": []}
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert message in told and "at most 2% unusable samples, found 1 of 24 unusable, the first: " in told, told
    assert ".." not in told and "events" not in told
    assert main(["train", str(path), "max_reject_share=0.1"]) == 0 and "(1 rejected)" in capsys.readouterr().out
    assert main(["train", str(path), f"train=[{tmp_path / 'nowhere'}]"]) == 2
    assert "nowhere: expected a file or folder, found none of that name" in capsys.readouterr().err


def test_no_steps_and_a_spoilt_summary_are_one_sentence(corpus, tmp_path, capsys):
    path = tmp_path / "train.yaml"
    tree = {"task": "classification", "train": [str(corpus)], "train_folds": [1], "output": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(tree | {"encoder": ENCODER, "steps": 1, "report_to": []}))
    assert main(["train", str(path), "steps=0"]) == 2
    assert "steps: expected a number of 1 or more, found 0" in capsys.readouterr().err
    assert main(["train", str(path)]) == 0
    (tmp_path / "run" / "summary.json").write_text("{")
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    assert "summary.json: expected the summary of a finished run, found no valid JSON" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- scores


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(6, 40))
def test_scores_are_scikit_learns(seed, classes, count):
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), rng.integers(classes, size=count)])  # every class is there
    probabilities = rng.dirichlet(np.ones(classes), len(truth))
    scores, guess = task_module.class_scores(probabilities, truth), probabilities.argmax(axis=1)
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, guess))
    assert scores["macro_recall"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, guess))
    assert scores["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(truth, guess, average="macro"))
    expected = sklearn_metrics.log_loss(truth, np.clip(probabilities, 1e-12, 1), labels=range(classes))
    assert scores["log_loss"] == pytest.approx(expected, rel=1e-6)
    labels = [f"c{number}" for number in range(classes)]
    lines = [{"label": labels[k], "probabilities": row.tolist()} for k, row in zip(truth, probabilities, strict=True)]
    assert (scoring.confusion(lines, labels) == sklearn_metrics.confusion_matrix(truth, guess)).all()
    targets = rng.random((count, classes)) < 0.4
    targets[0] = True
    tags = task_module.tagging_scores(probabilities[:count], targets)
    assert tags["mean_ap"] == pytest.approx(
        sklearn_metrics.average_precision_score(targets, probabilities[:count], average="macro")
    )
    guess = probabilities[:count] > 0.5
    expected = sklearn_metrics.f1_score(targets, guess, average="micro", zero_division=0)
    assert tags["micro_f1"] == pytest.approx(expected)


def test_summary_is_over_folds_and_recall_over_clips():
    names = iter(range(100))

    def line(label, guess, foreground, recording=None):
        facts = {"label": label, "foreground": foreground, "recording": recording or f"{next(names)}"}
        return facts | {"probabilities": [float(guess == 0), float(guess == 1)]}

    first = [line("a", 0, True), line("a", 0, False), line("b", 1, True), line("b", 0, False)]
    second = [line("a", 1, True), line("b", 1, True)]
    scores = scoring.summarise({0: {"1": first, "2": second}}, ["a", "b"])
    assert scores["mean"]["accuracy"] == pytest.approx(np.mean([0.75, 0.5]))
    assert scores["sd"]["accuracy"] == pytest.approx(np.std([0.75, 0.5], ddof=1))
    assert scores["confusion"] == [[2, 1], [1, 2]] and scores["recall"]["a"]["recall"] == pytest.approx(2 / 3)
    assert scores["folds"]["1"]["foreground_accuracy"] == 1.0 and scores["folds"]["1"]["background_accuracy"] == 0.5
    assert "b (1)" in scoring.table(scores) and "62.5 ± 17.7" in scoring.table(scores)
    assert scoring.headline(scores).startswith("62.5 ± 17.7 % over 2 folds [")
    alone = scoring.summarise({0: {"1": first}}, ["a", "b"])
    assert scoring.headline(alone).startswith("75.0 % on one fold [") and "±  |" not in scoring.table(alone)
    assert "| **mean ± sd** | 75.0 |" in scoring.table(alone)
    # Clips of one recording are one piece of evidence: the interval of recall is wider.
    apart, together = (
        scoring.summarise({0: {"1": [line("a", int(n < 3), True, r(n)) for n in range(12)]}}, ["a", "b"])["recall"]["a"]
        for r in (str, lambda n: f"r{n // 3}")
    )
    assert apart["recall"] == together["recall"] == 0.75
    assert together["high"] - together["low"] > apart["high"] - apart["low"]
    assert "chance 50.0, one answer to all, as in silence, 50.0" in scoring.headline(scores)


def test_several_seeds_are_no_further_clips_and_no_further_folds():
    """Twenty clips a fold, all heard by three networks alike: what is known of the class stays what it was."""
    rng = np.random.default_rng(0)

    def fold(number, right):
        lines = [{"label": "a", "probabilities": [0.9, 0.1] if hit else [0.1, 0.9]} for hit in right]
        lines += [{"label": "b", "probabilities": [0.1, 0.9]} for _ in right]
        return [
            line | {"clip": f"{number}-{index}", "recording": f"{number}-{index // 2}"}
            for index, line in enumerate(lines)
        ]

    folds = {str(number): fold(number, rng.random(20) < 0.7) for number in range(4)}
    one = scoring.summarise({0: folds}, ["a", "b"])
    three = scoring.summarise(dict.fromkeys(range(3), folds), ["a", "b"])
    assert three["recall"] == one["recall"] and one["recall"]["a"]["clips"] == 80
    assert three["accuracy"] == one["accuracy"] and three["sd"] == pytest.approx(one["sd"])
    assert one["sd_seeds"]["accuracy"] is None
    assert three["sd_seeds"]["accuracy"] < 1e-9 and "over 4 folds, ± 0.0 over 3 seeds" in scoring.headline(three)
    assert list(three["folds"])[:2] == ["0, seed 0", "1, seed 0"]


def test_windows_of_a_clip_are_averaged_by_length():
    parts = [
        task_module.ClassObservations(
            np.array([4, 2]), np.array([30, 10]), np.array([[1.0, 0.0], [0.4, 0.6]]), np.array([[1, 0], [0, 1]])
        ),
        task_module.ClassObservations(np.array([4]), np.array([10]), np.array([[0.2, 0.8]]), np.array([[1, 0]])),
    ]
    numbers, probabilities, targets = task_module.by_clip(parts)
    assert numbers.tolist() == [2, 4] and targets.tolist() == [[0, 1], [1, 0]]
    np.testing.assert_allclose(probabilities, [[0.4, 0.6], [0.8, 0.2]])


# -------------------------------------------------------------------------------------------------------- training


def test_it_learns_classes_from_a_sound_folder(corpus, tmp_path):
    trainer = trainer_module.TaskTrainer(
        recipe(corpus, tmp_path, steps=60, eval_steps=20, ema=0.9, report_to=["tensorboard"])
    )
    untrained = trainer.evaluate()["accuracy"]
    scores = trainer.fit()
    assert scores["accuracy"] > 0.9 > untrained and scores["macro_f1"] > 0.9
    encoder, head, config = load_classifier(tmp_path)
    assert config["labels"] == list(CLASSES) and config["task"] == "classification"
    store = clips.ClipStore([corpus], encoder, folds=["4"])  # neither trained nor validated on
    batch = clips.collate([store[number] for number in range(len(store))], 1, encoder.window_samples)
    with torch.inference_mode():
        guess = head(*encoder(batch.waveform, batch.lengths)).argmax(dim=1)
    truth = torch.tensor([CLASSES.index(events[0].label) for events in batch.events])
    assert (guess == truth).float().mean() > 0.8
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in curves.Scalars("train/loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert len(curves.Scalars("validation/accuracy")) == 4


def test_tagging_on_shards_with_several_classes(tmp_path):
    rng = np.random.default_rng(1)
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(48):
            chosen = [label for label in CLASSES if rng.random() < 0.5] or ["hiss"]
            samples = sum(sound(label, rng) for label in chosen)[None].astype(np.float32)
            waveform = Waveform(0.5 * samples, RATE, "mono")
            events = [Event(label, 0.0, 0.5) for label in chosen]
            info = AudioInfo.of(waveform)
            source = Source("made", clip=str(number))
            writer.write(Sample(f"s{number}", "tags", events=events, audio=[info], source=source), waveform)
    values = {"train": [tmp_path / "shards"], "validation": tmp_path / "shards", "train_folds": None}
    values |= {"validation_folds": None, "task": "tagging", "steps": 60}
    scores = trainer_module.TaskTrainer(recipe(None, tmp_path / "run", **values)).fit()
    assert scores["mean_ap"] > 0.85 and scores["micro_f1"] > 0.7
    with pytest.raises(TrainingError, match="expected one class, found beep, "):
        trainer_module.TaskTrainer(recipe(None, tmp_path / "no", **(values | {"task": "classification"}))).fit()


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_metrics_file(corpus, tmp_path):
    """SIGKILL in mid-run, with everything on that carries state: average, mixing, masks, best weights."""
    tree = {
        "task": "classification",
        "train": [str(corpus)],
        "train_folds": [1, 2],
        "validation_folds": [3],
        "encoder": {**ENCODER, "dropout": 0.2},
        "steps": 60,
        "batch_size": 6,
        "ema": 0.9,
        "label_smoothing": 0.1,
        "log_steps": 3,
        "eval_steps": 5,
        "save_steps": 7,  # no multiple of each other: sums are carried over
        "augment": {"roll_seconds": 0.5, "speed": 0.1, "mixup": 0.4, "frequency_mask": 6, "time_mask": 6, "masks": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = ["train", str(path), "report_to=[]"]
    assert main([*command, f"output={tmp_path / 'whole'}"]) == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "audio_llm", *command, f"output={killed}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while not (killed / "checkpoint.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "checkpoint.pt").is_file() and not (killed / "summary.json").is_file()
    assert main([*command, f"output={killed}"]) == 0
    assert (killed / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (killed / "encoder.safetensors").read_bytes() == (tmp_path / "whole" / "encoder.safetensors").read_bytes()


def test_unfrozen_layers_learn_and_the_others_keep_weights_and_statistics(corpus, tmp_path):
    encoder = {**ENCODER, "widths": [4, 8, 8], "pools": [[2, 2], [2, 2], [2, 2]], "normalize": "bands"}
    trainer = trainer_module.TaskTrainer(recipe(corpus, tmp_path / "a", encoder=encoder, unfreeze=1, steps=3))
    before = {key: value.clone() for key, value in trainer.raw.state_dict().items()}
    trainer.fit()
    changed = {key for key, value in trainer.raw.state_dict().items() if not torch.equal(value, before[key])}
    moved = {".".join(key.split(".")[:2]) for key in changed}
    assert moved == {"encoder.encoder3", "head.conv1d", "head.fc1", "head.fc2"}
    with pytest.raises(ConfigError, match="0 to 3 layers of 'urbansound_cnn', found 4"):
        trainer_module.TaskTrainer(recipe(corpus, tmp_path / "b", encoder=encoder, unfreeze=4))
    frozen = trainer_module.TaskTrainer(recipe(corpus, tmp_path / "c", encoder=encoder, unfreeze=0, steps=2))
    frozen.fit()
    assert not any(parameter.requires_grad for parameter in frozen.raw.encoder.parameters())


def test_lower_layers_learn_more_slowly(corpus, tmp_path):
    trainer = trainer_module.TaskTrainer(recipe(corpus, tmp_path, layer_decay=0.5))
    scale = {id(parameter): group["scale"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    found = {name: scale[id(parameter)] for name, parameter in trainer.raw.named_parameters()}
    assert found["encoder.encoder1.conv.weight"] == 0.25 and found["encoder.encoder2.bn.bias"] == 0.5
    assert found["head.fc2.weight"] == 1.0


def test_moving_average_is_its_recurrence():
    model = torch.nn.BatchNorm1d(1)
    average = trainer_module.moving_average(model, 0.7)
    expected = None
    for count in range(12):
        with torch.no_grad():
            model.weight.fill_(float(count**2))
            model.running_mean.fill_(-float(count))
            model.num_batches_tracked.fill_(count)
        average.update_parameters(model)
        if expected is None:
            expected = np.array([0.0, 0.0])
        else:
            decay = min(0.7, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * np.array([count**2, -count])
    found = [average.module.weight.item(), average.module.running_mean.item()]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert int(average.module.num_batches_tracked) == 11


# ---------------------------------------------------------------------------------------------------- augmentation


def test_mixing_has_the_stated_shares_at_one_level():
    rng = np.random.default_rng(0)
    tones = [np.sin(2 * np.pi * k * np.arange(4000) / 4000)[None].astype(np.float32) for k in (100, 200, 300)]
    whole = [
        clips.Clip(level * tone, [Event(str(k))], k)
        for k, (level, tone) in enumerate(zip((1, 0.1, 5), tones, strict=True))
    ]
    whole.append(clips.Clip(np.zeros((1, 3000), np.float32), [Event("3")], 3))
    mixed, mix = clips.mix_clips(whole, 1.0, rng)
    batch = clips.collate(mixed, 1, 4000, mix)
    for row, (clip, partner, share) in enumerate(zip(mixed, mix.partner.tolist(), mix.share.tolist(), strict=True)):
        spectrum = np.abs(np.fft.rfft(clip.samples[0])) / 2000
        if row == 3 or partner == 3:
            assert share == 1.0 and np.array_equal(clip.samples, whole[row].samples)
        elif partner != row:
            level = (1, 0.1, 5)[row]
            assert spectrum[100 * (row + 1)] == pytest.approx(level * share, abs=1e-3 * level)
            assert spectrum[100 * (partner + 1)] == pytest.approx(level * (1 - share), abs=1e-3 * level)
    labels = [str(k) for k in range(4)]
    task = task_module.TaggingTask(build_encoder(ENCODER), labels, {})
    shares = task.targets(batch)[0].shares
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
    assert all(shares[k, k] >= mix.share[k] - 1e-6 for k in range(4))


def test_speed_moves_the_pitch_and_rolling_keeps_every_sample():
    tone = np.sin(2 * np.pi * 50 * np.arange(4000) / 4000)[None].astype(np.float32)
    for speed in (0.9, 1.1):
        spectrum = np.abs(np.fft.rfft(clips.resampled(tone, speed)[0]))
        assert abs(int(spectrum.argmax()) - 50 * speed) <= 1
    switches = clips.Augmentation(swap=False, gain_db=0, roll_seconds=0.2)
    noise = np.random.default_rng(0).standard_normal((1, 4000)).astype(np.float32)
    rolled = clips.augment(clips.Clip(noise, []), switches, np.random.default_rng(1), RATE).samples
    assert not np.array_equal(rolled, noise) and np.array_equal(np.sort(rolled), np.sort(noise))
    with pytest.raises(ConfigError, match="expected labels of whole clips"):
        SpatialRecipe(train=[Path(".")], output=Path("."), steps=1, augment=switches).check()


def one_window(path):
    """A clip of a second class, for a folder of one alone is refused."""
    path.parent.mkdir()
    soundfile.write(path, np.full(8000, 0.25), RATE, subtype="FLOAT")


def test_long_clips_of_one_label_have_windows_of_one_length(tmp_path):
    one_window(tmp_path / "hum" / "b.wav")
    (tmp_path / "hiss").mkdir()
    soundfile.write(tmp_path / "hiss" / "a.wav", np.arange(18000) / 20000, RATE, subtype="FLOAT")
    store = clips.ClipStore([tmp_path], build_encoder(ENCODER), whole=True)
    assert [len(store[k].samples[0]) for k in range(3)] == [8000] * 3 and len(store) == 4
    assert store[2].samples[0, -1] == pytest.approx(17999 / 20000, abs=1e-4)
    plain = clips.ClipStore([tmp_path], build_encoder(ENCODER))
    assert [len(plain[k].samples[0]) for k in range(3)] == [8000, 8000, 2000]


def test_channels_are_mixed_only_when_asked_for(tmp_path):
    one_window(tmp_path / "hum" / "b.wav")
    (tmp_path / "hiss").mkdir()
    stereo = np.stack([np.full(8000, 0.5), np.full(8000, -0.25)], axis=1)
    soundfile.write(tmp_path / "hiss" / "a.wav", stereo, RATE, subtype="FLOAT")
    encoder = build_encoder(ENCODER)
    with pytest.raises(TrainingError, match="expected layout mono"):
        clips.ClipStore([tmp_path], encoder)
    for rule, value in (("mean", 0.125), ("left", 0.5)):
        assert clips.ClipStore([tmp_path], encoder, hearing=rule)[0].samples[0, 100] == pytest.approx(value, abs=1e-4)


# ------------------------------------------------------------------------------------------------ cross-validation


def folds_recipe(corpus, output: Path, **changes) -> folds.FoldsRecipe:
    training = {"encoder": ENCODER, "steps": 30, "batch_size": 12, "learning_rate": 5e-3, "report_to": []}
    training |= {"log_steps": 10, "save_steps": 10}
    values = {"sounds": corpus, "output": output, "training": training, "test_folds": [1, 2]}
    values["candidates"] = {"usual": {}, "stuck": {"learning_rate": 1e-9}}
    return folds.FoldsRecipe(**{**values, **changes})


def test_cross_validation_chooses_without_the_test_fold_and_resumes(corpus, tmp_path, monkeypatch, capsys):
    expected = folds.CrossValidation(folds_recipe(corpus, tmp_path / "whole")).run()
    assert expected["mean"]["accuracy"] > 0.8 and set(expected["chosen"].values()) == {"usual"}
    for test, validation in (("1", "2"), ("2", "3")):
        for name in ("usual", "stuck"):
            used = yaml.safe_load(
                (tmp_path / "whole" / f"fold-{test}" / f"candidate-{name}" / "recipe.yaml").read_text()
            )
            assert used["validation_folds"] == [validation]
            assert sorted(used["train_folds"]) == sorted({"1", "2", "3", "4"} - {test, validation})
        lines = (tmp_path / "whole" / f"fold-{test}" / "predictions.jsonl").read_text().splitlines()
        assert {json.loads(line)["fold"] for line in lines} == {test} and len(lines) == 18
    assert (tmp_path / "whole" / "confusion.png").read_bytes()[:4] == b"\x89PNG"

    output = tmp_path / "killed"
    killed = folds.CrossValidation(folds_recipe(corpus, output))
    update, count = trainer_module.TaskTrainer._update, 0

    def dies(self, batch, progress):
        nonlocal count
        count += 1
        if count == 75:  # the first candidate of the second fold, after its checkpoint at step 10
            raise KeyboardInterrupt
        return update(self, batch, progress)

    monkeypatch.setattr(trainer_module.TaskTrainer, "_update", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert (output / "fold-1" / "fold.json").is_file() and not (output / "fold-2" / "fold.json").is_file()
    count = 1000
    assert folds.CrossValidation(folds_recipe(corpus, output)).run() == expected
    assert count == 1000 + 20 + 30  # what was left: 20 steps of one candidate and the other one
    assert (output / "scores.md").read_bytes() == (tmp_path / "whole" / "scores.md").read_bytes()
    assert folds.CrossValidation(folds_recipe(corpus, output)).run() == expected and count == 1050
    with pytest.raises(ConfigError, match="found another run"):
        folds.CrossValidation(folds_recipe(corpus, output, candidates={})).run()


def test_refit_hears_the_validation_fold_and_a_bad_mean_is_exit_code_1(corpus, tmp_path, capsys):
    path = tmp_path / "folds.yaml"
    tree = dataclasses.asdict(folds_recipe(corpus, tmp_path / "run", candidates={}, refit={"steps": 12}))
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree, default=str))))
    assert main(["folds", str(path), "test_folds=[4]", "min_accuracy=1.01"]) == 1
    assert "below the expected 101 %" in capsys.readouterr().out
    used = yaml.safe_load((tmp_path / "run" / "fold-4" / "model" / "recipe.yaml").read_text())
    assert used["train_folds"] == ["1", "2", "3"] and used["validation_folds"] is None and used["steps"] == 12
    assert main(["folds", str(path), "test_folds=[4]"]) == 0


def test_folds_leave_the_files_of_the_urbansound_project_where_its_layout_holds_the_model(tmp_path):
    """Published layers and front end on UrbanSound8K's classes: model_fold_N_best.safetensors, the same answers."""
    labels = list(urbansound_cnn.CLASSES)
    waveform = Waveform(0.1 * np.random.default_rng(0).standard_normal((1, 30000)).astype(np.float32), 22050, "mono")

    def written(fold: int, encoder: dict, names: list[str]) -> bool:
        built = build_encoder({"name": "urbansound_cnn", **encoder})
        head = build_classifier({}, built, len(names))
        facts = {"task": "classification", "labels": names, "head": {}}
        model = save_parts(tmp_path / f"fold-{fold}" / "model", built, {"head": head}, facts)
        return folds.write_published(model, tmp_path / "models" / f"model_fold_{fold}_best.safetensors")

    assert written(1, {}, labels) and written(2, {"dropout": 0.5}, labels)
    for encoder, names in (
        ({"normalize": "bands"}, labels),
        ({"n_mels": 64}, labels),
        ({}, labels[::-1]),
        ({}, labels[:9]),
    ):
        assert not written(3, encoder, names)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "model_fold_1_best.safetensors",
        "model_fold_2_best.safetensors",
    ]
    for fold in ("1", "2"):
        ours = predict.load(tmp_path / f"fold-{fold}" / "model").predict(waveform)
        theirs = predict.load(tmp_path / "models", fold=fold).predict(waveform)
        assert theirs.labels == ours.labels
        np.testing.assert_array_equal(theirs.probabilities, ours.probabilities)


def test_sounds_made_anew_under_their_old_names_are_other_data(tmp_path):
    corpus = write_esc50(tmp_path / "esc", per_class=1)
    trainer_module.TaskTrainer(recipe(corpus, tmp_path / "run", steps=1)).fit()
    trainer_module.TaskTrainer(recipe(corpus, tmp_path / "run", steps=1)).fit()
    names = sorted((corpus / "audio").glob("1-*.wav"))
    names[0].write_bytes(names[1].read_bytes())
    with pytest.raises(ConfigError, match="found another run"):
        trainer_module.TaskTrainer(recipe(corpus, tmp_path / "run", steps=1)).fit()


def test_recipes_of_changes_are_merged():
    base = {"steps": 5, "augment": {"mixup": 0.2, "gain_db": 0}, "batch_size": 3}
    assert merged(base, {"seconds": 9, "augment": {"mixup": 0.4}}) == {
        "seconds": 9,
        "batch_size": 3,
        "augment": {"mixup": 0.4, "gain_db": 0},
    }


def test_identifiers_of_the_data_get_their_names(tmp_path: Path, capsys) -> None:
    """Classes that are AudioSet's identifiers, also as a folder writes them, are stored by the names of `classes`."""
    corpus = write_esc50(tmp_path / "esc", folds=1, per_class=1)
    table = corpus / "meta" / "esc50.csv"
    mids = dict(zip(CLASSES, ("/m/0_ksk", "_t_dd00003", "/m/068hy"), strict=True))
    write_rows(table, [row | {"category": mids[row["category"].replace("_", " ")]} for row in read_rows(table)])
    names = tmp_path / "class_labels_indices.csv"
    names.write_text('index,mid,display_name\n0,/m/068hy,"Animals, pets"\n1,/t/dd00003,Click train\n2,/m/0_ksk,Beep\n')
    run = recipe(corpus, tmp_path / "run", steps=1, train_folds=None, validation_folds=None, validation=corpus)
    stored = dataclasses.replace(run, classes=names)
    assert trainer_module.TaskTrainer(stored).fit()["accuracy"] >= 0
    labels = json.loads((tmp_path / "run" / "config.json").read_text())["labels"]
    assert sorted(labels) == ["animals, pets", "beep", "click train"]
    with pytest.raises(ConfigError, match="another run: classes is None here and .*; labels is"):
        trainer_module.TaskTrainer(run).fit()
    names.write_text("index,mid,display_name\n0,/m/x,Siren\n")
    with pytest.raises(ConfigError, match="expected names of the 3 labels, found 1 others than"):
        trainer_module.TaskTrainer(dataclasses.replace(stored, output=tmp_path / "other"))
    written = yaml.safe_dump(
        {"task": "classification", "train": [str(corpus)], "output": str(tmp_path / "no"), "steps": 1}
    )
    (tmp_path / "recipe.yaml").write_text(written)
    assert main(["train", str(tmp_path / "recipe.yaml"), f"classes={tmp_path / 'missing.csv'}"]) == 2
    assert "missing.csv: expected a file or folder" in capsys.readouterr().err
