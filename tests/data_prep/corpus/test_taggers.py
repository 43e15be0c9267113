"""``describe`` with networks of ours: classes and events become facts, as sure as the networks are, at their times."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio_llm import audio
from audio_llm import config as recipes
from audio_llm.cli import main
from audio_llm.datasets import seld_tables
from audio_llm.encoders import seld_head
from audio_llm.encoders.heads import build_classifier
from audio_llm.errors import AudioLLMError
from audio_llm.model.encoder import build_encoder
from audio_llm.model.folder import save_parts
from audio_llm.tasks.seld import predict
from data_prep.corpus.recipe import CorpusConfig
from data_prep.tasks.corpus import prepare
from tests.paths import ROOT, SHARED

RATE, SECONDS = 16_000, 4.0
ESC10 = SHARED / "data" / "esc10"
LABELS = ["dog", "rooster"]
SELD = {
    "name": "cnn14",
    "sample_rate": RATE,
    "window_seconds": SECONDS,
    "hop": 800,
    "win_length": None,
    "n_mels": 32,
    "fmax": 8000.0,
    "peak_normalize": False,
    "widths": [16, 32, 48],
    "time_pools": [2, 1, 1],
    "frequency_pools": [4, 4, 2],
}


def described(folder: Path, rows: list[dict[str, Any]], **describe: Any) -> dict[str, list[dict[str, Any]]]:
    """The facts of each recording, by its file."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "recordings", "format": "jsonl", "path": str(folder / "rows.jsonl"), "root": str(folder)}
    stages: dict[str, Any] = {"cut": {}, "describe": {"captions": [], "acoustic": False, **describe}}
    tree = {"corpus": "mine", "source": source, "stages": stages, "engine": {"name": "local", "workers": 1}}
    manifest = prepare(recipes.build(CorpusConfig, tree), folder / "out", quiet=True).manifest
    assert manifest["rejects"] == 0
    items = map(json.loads, (folder / "out" / "items" / "describe.jsonl").open())
    return {item["fields"]["name"]: item["fields"]["facts"] for item in items}


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["predict", *arguments, "--format", "json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_facts_are_what_predict_says_of_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Networks of random weights: what they say is of no use, but certain."""
    torch.manual_seed(0)
    labels = ["car_horn", "Dog, bark", "rain"]
    encoder = build_encoder({"name": "urbansound_cnn", "preset": "tiny"})
    facts = {"task": "classification", "labels": labels, "head": {}, "hearing": "mean"}
    tagger = save_parts(tmp_path / "classes", encoder, {"head": build_classifier({}, encoder, 3)}, facts)
    encoder = build_encoder(SELD)
    head = seld_head.SELDHead(encoder, 2)
    torch.nn.init.normal_(head.projection.bias, std=1.0)
    facts = {"task": "seld", "labels": LABELS, "seld": head.facts, "thresholds": [0.3, 0.3]}
    locator = save_parts(tmp_path / "events", encoder, {"seld": head}, facts)
    rng = np.random.default_rng(0)
    for name, channels in (("mono.wav", 1), ("stereo.wav", 2)):
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal((3 * RATE, channels)), RATE)
    rows = [{"audio": "mono.wav", "id": "1"}, {"audio": "stereo.wav", "id": "2"}]
    found = described(tmp_path, rows, taggers=[str(tagger)], locators=[str(locator)], top=2, least=0.0)
    names = [str(tmp_path / name) for name in ("mono.wav", "stereo.wav")]
    for name, told in zip(names, printed([str(tagger), *names], capsys), strict=True):
        best = sorted(told["probabilities"].items(), key=lambda pair: -pair[1])[:2]
        classes = [fact for fact in found[Path(name).name] if fact["kind"] == "label"]
        said = {"car_horn": "car horn", "Dog, bark": "dog", "rain": "rain"}  # as people say it
        assert [fact["value"] for fact in classes] == [said[label] for label, _ in best]
        assert [fact["confidence"] for fact in classes] == pytest.approx([chance for _, chance in best], abs=2e-3)
        assert {fact["source"] for fact in classes} == {"classes"}
    # Events are the runs of frames in the table that predict prints, with gaps of up to 0.3 s closed.
    events = [fact for fact in found["stereo.wav"] if fact["kind"] == "event"]
    assert main(["predict", str(locator), names[1], "--format", "csv"]) == 0
    rows = seld_tables.parse_rows(capsys.readouterr().out)
    expected = set()
    for number, label in enumerate(LABELS):
        frames = np.unique(rows[rows[:, 1] == number, 0]).astype(int)
        for run in np.split(frames, np.flatnonzero(np.diff(frames) > 4) + 1) if len(frames) else []:
            expected.add((label, round(run[0] / 10, 3), round((run[-1] + 1) / 10, 3)))
    assert expected and {(fact["value"], fact["start"], fact["end"]) for fact in events} == expected
    assert all(0.3 < fact["confidence"] <= 1 for fact in events)
    # A locator has two channels: a sound of one is in both of them.
    alone = [fact for fact in found["mono.wav"] if fact["kind"] == "event"]
    both = audio.Waveform(audio.decode(names[0]).samples.repeat(2, axis=0), RATE, "stereo")
    heard = predict.load(locator).locate(both).frame
    assert alone and alone[0]["start"] == heard[0] / 10 and alone[-1]["end"] <= (heard[-1] + 1) / 10
    with pytest.raises(AudioLLMError, match="describe.locator_hearing, .*: hearing mean: expected a model of mono"):
        described(tmp_path, [{"audio": "mono.wav", "id": "1"}], locators=[str(locator)], locator_hearing="mean")


# ---------------------------------------------------------------------------------------------- trained, on recordings


def train(folder: Path, tree: dict[str, Any]) -> None:
    """In a process of its own: precision is chosen once in a process."""
    (folder / "train.yaml").write_text(json.dumps(tree))
    subprocess.run([sys.executable, "-m", "audio_llm", "train", str(folder / "train.yaml")], check=True)


def folds() -> dict[int, list[tuple[str, str]]]:
    """File and class of the recordings of each official fold."""
    found: dict[int, list[tuple[str, str]]] = {}
    with open(next((ESC10 / "meta").glob("*.csv")), newline="") as stream:
        for row in csv.DictReader(stream):
            found.setdefault(int(row["fold"]), []).append((row["filename"], row["category"]))
    return found


def loudest(name: str, seconds: float = 0.8) -> np.ndarray:
    """The part of a recording with the most energy, at a peak of one."""
    samples = audio.resample(audio.decode(ESC10 / "audio" / name), RATE).samples[0]
    energy = np.cumsum(np.pad(samples.astype(float) ** 2, (1, 0)))
    length = round(seconds * RATE)
    start = int((energy[length:] - energy[:-length]).argmax())
    part = samples[start : start + length]
    return part / np.abs(part).max()


def scene(
    rng: np.random.Generator, parts: dict[str, list[np.ndarray]]
) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """(time, 2) with one or two sounds, one after the other, and what sounds from which frame of 100 ms to which."""
    # Of one channel also while it learns: else it finds what is alike in both, which mono noise is as well.
    samples = 1e-3 * rng.standard_normal((round(RATE * SECONDS), 1)).repeat(2, axis=1)
    events = []
    for start in [3, 20] if rng.random() < 0.7 else [int(rng.integers(2, 28))]:
        label = LABELS[int(rng.integers(2))]
        first = start + int(rng.integers(0, 5))
        part = parts[label][int(rng.integers(len(parts[label])))] * rng.uniform(0.2, 0.5)
        samples[first * RATE // 10 : first * RATE // 10 + len(part)] += part[:, None]  # straight ahead
        events.append((label, first, first + round(len(part) * 10 / RATE)))
    return samples, events


@pytest.mark.slow
@pytest.mark.shared("data/esc10")
def test_a_trained_tagger_names_recordings_that_it_has_not_heard(tmp_path: Path) -> None:
    """The small classifier of ESC-10's recipe, two of its folds and some steps: nine classes of ten are wrong at
    chance."""
    training = recipes.read(ROOT / "recipes" / "classification" / "esc10.yaml")["training"]
    tree = training | {
        "task": "classification",
        "train": [str(ESC10)],
        "train_folds": [1, 2],
        "validation_folds": [3],
    }
    tree |= {"output": str(tmp_path / "tagger"), "steps": 150, "report_to": [], "verb": "train"}
    train(tmp_path, tree)
    rows = [{"audio": name, "id": str(number)} for number, (name, _) in enumerate(folds()[4])]
    for name, _ in folds()[4]:
        (tmp_path / name).symlink_to(ESC10 / "audio" / name)
    found = described(tmp_path, rows, taggers=[str(tmp_path / "tagger")])
    truth = {name: label.replace("_", " ") for name, label in folds()[4]}
    right = [bool(facts) and facts[0]["value"] == truth[name] for name, facts in found.items()]
    sure = [facts[0]["confidence"] if facts else 0.0 for facts in found.values()]
    by_right = {
        kind: np.mean([one for one, fine in zip(sure, right, strict=True) if fine == kind]) for kind in (True, False)
    }
    print(f"tagger: {np.mean(right):.1%} of {len(right)}, confidence {by_right[True]:.2f}, else {by_right[False]:.2f}")
    assert np.mean(right) > 0.4 and by_right[True] > by_right[False]


@pytest.mark.slow
@pytest.mark.shared("data/esc10")
def test_a_trained_locator_says_when_recordings_begin_and_end(tmp_path: Path) -> None:
    """Barks and crows of ESC-10, at drawn times; those of the described clips are of other recordings."""
    rng = np.random.default_rng(0)
    parts: dict[bool, dict[str, list[np.ndarray]]] = {True: {}, False: {}}
    for fold, listed in folds().items():
        for name, label in listed:
            if label in LABELS:
                parts[fold < 4].setdefault(label, []).append(loudest(name))
    data = tmp_path / "data"
    for kind in ("stereo_dev", "metadata_dev"):
        (data / kind / "dev-train").mkdir(parents=True)
    for number in range(100):
        samples, events = scene(rng, parts[True])
        name = f"fold3_room{1 + (number >= 84)}_mix{number:03}_deg000_start0000"
        soundfile.write(data / "stereo_dev" / "dev-train" / f"{name}.wav", samples, RATE)
        table = [[frame, LABELS.index(label), 0, 0, 200, 0] for label, *span in events for frame in range(*span)]
        seld_tables.write_rows(data / "metadata_dev" / "dev-train" / f"{name}.csv", np.array(table))
    (data / "classes.json").write_text(json.dumps(LABELS))
    tree = {"verb": "train", "task": "seld", "train": [str(data)], "output": str(tmp_path / "locator"), "encoder": SELD}
    tree |= {"train_folds": ["fold3"], "validation_folds": ["fold3_room2"], "steps": 150, "batch_size": 16}
    tree |= {"learning_rate": 2e-3, "distance_weight": 0.1, "augment": {"gain_db": 3}, "report_to": []}
    train(tmp_path, tree)
    truth = {}
    for number in range(30):
        samples, events = scene(rng, parts[False])
        soundfile.write(tmp_path / f"{number:02}.wav", samples[:, 0], RATE)  # one channel
        truth[f"{number:02}.wav"] = events
    rows = [{"audio": name, "id": name[:2]} for name in truth]
    found = described(tmp_path, rows, locators=[str(tmp_path / "locator")])
    facts = [fact for listed in found.values() for fact in listed]
    hits, late, sure = 0, [], {True: [], False: []}
    for name, listed in found.items():
        for fact in listed:
            near = [
                abs(fact["start"] - first / 10)
                for label, first, last in truth[name]
                if label == fact["value"] and fact["start"] < last / 10 and fact["end"] > first / 10
            ]
            sure[bool(near)].append(fact["confidence"])
        for label, first, last in truth[name]:
            same = [f for f in listed if f["value"] == label and f["start"] < last / 10 and f["end"] > first / 10]
            hits += bool(same)
            late += [min(abs(f["start"] - first / 10) for f in same)] if same else []
    total = sum(map(len, truth.values()))
    print(f"locator: {hits} of {total} events, onset off by {np.median(late):.2f} s in the median, {len(facts)} facts")
    print(f"confidence: {np.mean(sure[True]):.2f} of the right ones, {np.mean(sure[False] or [0]):.2f} of the others")
    assert hits / total > 0.7 and np.median(late) <= 0.1 and len(facts) < 2 * total
    assert np.mean(sure[True]) > np.mean(sure[False] or [0]) and all(0 < one <= 1 for one in sure[True])
