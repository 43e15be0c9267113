"""Scores of Spatial-AST's task: by hand, by a plain oracle, by the reference's angles, and from a network's answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from audio_llm.audio import Waveform
from audio_llm.cli import main
from audio_llm.encoders import heads as published_heads
from audio_llm.errors import ConfigError
from audio_llm.model.encoder import build_encoder
from audio_llm.model.folder import save_parts
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Event, Sample, Source
from audio_llm.shards.writer import ShardWriter
from audio_llm.tasks.spatial import heads, task
from eval.tasks import spatial
from tests.paths import SHARED

FIXTURES = SHARED / "fixtures" / "bat_ref.npz"
LABELS = ["dog", "bell", "rain"]


def line(name: str, labels: list[str], sound: list[float], guess=(0.0, 0, 1.0), place=(0.0, 0.0, 1.0)) -> dict:
    azimuth, elevation, distance = guess
    answer = {"sound": sound, "azimuth": azimuth, "elevation": elevation, "distance": distance}
    return {"id": name, "labels": labels, "place": None if place is None else list(place), **answer}


def test_scores_by_hand() -> None:
    found = spatial.score(
        [
            line("a", ["dog"], [3, 1, 0], guess=(20, 0, 1.5), place=(0, 0, 1.0)),  # 20° is not above 20°; one class off
            line("b", ["dog", "bell"], [1, 2, 9], guess=(21, 0, 2.0), place=(0, 0, 1.0)),  # 21°; two classes off
            line("c", ["bell"], [2, 0, 8], guess=(180, 0, 3.0), place=(-170, 0, 3.0)),  # 10° across the back
            line("d", ["dog"], [0, 3, 7], guess=(0, 90, 9.0), place=(120, 90, 8.9)),  # straight up: 1° in class 179
            line("e", ["bell"], [-9, 9, 0], place=None),
        ],
        LABELS,
    )
    # dog by score: a+ c- b+ d+ e-: (1/1 + 2/3 + 3/4) / 3; bell: e+ d- b+ a- c+: (1/1 + 2/3 + 3/5) / 3; no clip has rain
    assert found["mean_ap"].value == pytest.approx((29 / 36 + 34 / 45) / 2)
    assert found["er20"].value == 0.25 and found["er20"].n == 4
    assert found["direction_mae"].value == pytest.approx((20 + 21 + 10 + 1) / 4)
    assert found["der"].value == 0.25
    assert found["distance_mae"].value == pytest.approx((0.5 + 1.0 + 0.0 + 0.1) / 4)
    assert (found["clips"], found["errors"]) == (5, 0)
    assert "| ER20° ↓ | 25.00 % |" in spatial.table(found)


def test_a_class_without_clips_is_skipped_or_counts_nothing() -> None:
    lines = [line("a", ["dog"], [1, 0, 0]), line("b", ["bell"], [0, 1, 0])]
    assert spatial.score(lines, LABELS)["mean_ap"].value == 1
    assert spatial.score(lines, LABELS, empty_classes="zero")["mean_ap"].value == pytest.approx(2 / 3)


def test_no_placed_clip_and_failed_clips() -> None:
    lines = [line("a", ["dog"], [1, 0, 0], place=None), {"id": "b", "error": "broken"}, {"id": "c", "error": "broken"}]
    found = spatial.score([*lines, line("c", ["bell"], [0, 1, 0], place=None)], LABELS)
    assert math.isnan(found["er20"].value) and found["clips"] == 2 and found["errors"] == 1
    assert "| DER ↓ | – |" in spatial.table(found)
    assert math.isnan(spatial.score([], LABELS)["mean_ap"].value)


def test_unknown_classes_are_an_error_with_a_cure() -> None:
    with pytest.raises(ConfigError, match="'cat'.*--labels"):
        spatial.score([line("a", ["cat"], [1.0, 0.0])], ["class 0", "class 1"])


def oracle(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision by its definition: a threshold at every score there is, no sorting."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        reached = (taken & positive).sum() / positive.sum()
        total += (reached - recall) * (taken & positive).sum() / taken.sum()
        recall = reached
    return total


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 25))
def test_weighted_precision_is_that_of_the_clips_repeated(data, clips: int) -> None:
    scores = data.draw(arrays.arrays(np.float64, clips, elements=st.integers(-3, 3).map(float)))
    positive = data.draw(arrays.arrays(np.bool_, clips))
    counts = data.draw(arrays.arrays(np.int16, (3, clips), elements=st.integers(0, 3)))
    found = spatial.weighted_average_precision(scores, positive, counts)
    for row, value in zip(counts, found, strict=True):
        kept = np.repeat(positive, row)
        if kept.any():
            assert value == pytest.approx(oracle(np.repeat(scores, row), kept))
        else:
            assert math.isnan(value)


def test_intervals_hold_the_value_and_shrink_with_the_clips() -> None:
    rng, widths = np.random.default_rng(0), []
    for clips in (12, 50, 800):
        targets = rng.random((clips, 4)) < 0.3
        scores = targets + rng.standard_normal((clips, 4))
        found = spatial.mean_average_precision(scores, targets)
        assert found.low < found.value < found.high
        assert found == spatial.mean_average_precision(scores, targets)
        widths.append(found.high - found.low)
    assert widths[2] < widths[1] / 2  # a quarter, by the square root of 16


def test_clips_of_one_recording_tell_no_more_than_one() -> None:
    """Twelve recordings, once each and forty times each: the figures are the same, and so is what is known of them."""
    rng = np.random.default_rng(0)
    alone = [
        line(
            f"{number:02d}", [LABELS[number % 3]], rng.standard_normal(3).tolist(), guess=(45.0 * (number % 2), 0, 1.5)
        )
        for number in range(12)
    ]
    copies = [one | {"id": f"{one['id']}-{n}", "recording": one["id"]} for one in alone for n in range(40)]
    few, many = spatial.score(alone, LABELS), spatial.score(copies, LABELS)
    assert (many["mean_ap"].low, many["mean_ap"].high) == pytest.approx((few["mean_ap"].low, few["mean_ap"].high))
    for name in ("mean_ap", "er20", "direction_mae"):
        assert many[name].value == pytest.approx(few[name].value) and many[name].clusters == 12
        assert many[name].high - many[name].low > 0.95 * (few[name].high - few[name].low)
    for one in copies:
        del one["recording"]
    widths = [found.high - found.low for found in (spatial.score(copies, LABELS)["er20"], many["er20"])]
    assert widths[0] < widths[1] / 3  # as if they were 480


@pytest.mark.shared("fixtures/bat_ref.npz")
def test_angles_of_the_reference() -> None:
    reference = np.load(FIXTURES)
    rows = list(zip(*reference["ang_in"].tolist(), reference["ang_out"].tolist(), strict=True))

    def error(order: tuple[int, ...]) -> float:
        worst = 0.0
        for *classes, expected in rows:
            azimuth, elevation, other_azimuth, other_elevation = (classes[index] for index in order)
            place = [heads.class_azimuth(other_azimuth), float(other_elevation - 90), 1.0]
            guess = {"azimuth": heads.class_azimuth(azimuth), "elevation": elevation - 90}
            worst = max(worst, abs(spatial.direction_error({**guess, "place": place}) - expected))
        return worst

    assert min(error((0, 1, 2, 3)), error((0, 2, 1, 3))) < 1e-6


# ------------------------------------------------------------------------------------------------ from sound to scores


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A tiny encoder folder whose heads answer differently for every clip."""
    torch.manual_seed(3)
    encoder = build_encoder({"name": "spatial_ast", "preset": "tiny"}).eval()
    spatial_heads = published_heads.SpatialHeads(encoder.hidden_size, len(LABELS))
    with torch.no_grad():
        for parameter in spatial_heads.parameters():
            parameter.normal_()
    folder = tmp_path_factory.mktemp("encoder") / "net"
    parts = {"spatial": spatial_heads, "events": heads.EventHead(encoder.hidden_size, len(LABELS))}
    return save_parts(folder, encoder, parts, {"labels": LABELS})  # as version 0.1 wrote it, without the task


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("shards") / "test"
    with ShardWriter(folder) as writer:
        for number in range(7):
            place = {"azimuth": float(40 * number - 120), "elevation": 5.0 * number, "distance": 0.7 + number}
            events = [Event(LABELS[number % 3], **place)]
            if number == 4:
                events.append(Event("rain", azimuth=-90.0, elevation=0.0, distance=2.0))
            samples = (rng.standard_normal((2, 8000 + 100 * number)) * 0.1).astype(np.float32)
            known = [{"source": Source("made", clip="b")}, {"meta": {"recordings": ["a", "c"]}}, {}][number % 3]
            waveform = Waveform(samples, 16_000, "binaural")
            writer.write(Sample(f"s-{number}", "localisation", events=events, **known), waveform)
    return folder


def test_scores_are_those_of_training(network: Path, shards: Path, tmp_path: Path) -> None:
    """The trainer's own validation computes the same scores from tensors, without the file of answers."""
    found = spatial.answer(spatial.load(network), [shards], tmp_path / "run", {}, batch_size=3)
    loaded, dataset = spatial.load(network), ShardDataset(shards)
    items = [dataset[index] for index in range(len(dataset))]
    events = [item["sample"].events for item in items]
    index = {label: number for number, label in enumerate(LABELS)}
    clip = heads.clip_targets(events, index)
    with torch.inference_mode():
        tokens = [
            loaded.encoder(
                torch.from_numpy(i["waveforms"][0].samples)[None], torch.tensor([i["waveforms"][0].num_samples])
            )[0]
            for i in items
        ]
        logits = loaded.heads(torch.cat(tokens))
        columns = loaded.encoder.grid[0]
        event = heads.event_targets(events, index, columns, loaded.encoder.window_seconds / columns)
        output = heads.EventHead(loaded.encoder.hidden_size, len(LABELS))(loaded.encoder.patches(torch.cat(tokens)))
        expected = task.summarise([task.observe(logits, output, clip, event, events, index)])
    assert found["mean_ap"].value == pytest.approx(expected["mean_ap"])
    assert found["er20"].value == pytest.approx(expected["er20"])
    assert found["direction_mae"].value == pytest.approx(expected["direction_mae"], abs=1e-6)
    assert 1 - found["der"].value == pytest.approx(expected["distance_accuracy"])
    assert found["er20"].n == 6 and found["clips"] == 7
    recordings = [answered["recording"] for answered in spatial.read_lines(tmp_path / "run" / spatial.PREDICTIONS)]
    assert recordings == ["b", "a", "s-2", "b", "a", "s-5", "b"] and found["mean_ap"].clusters == 4


def test_the_command_line_goes_on_where_it_was_stopped(network: Path, shards: Path, tmp_path: Path, capsys) -> None:
    command = ["eval", str(network), str(shards), "--out", str(tmp_path / "run"), "--batch-size", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "run" / spatial.PREDICTIONS
    whole, scores = path.read_text(), (tmp_path / "run" / spatial.SCORES).read_text()
    assert json.loads(scores)["er20"]["n"] == 6
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:30])  # killed while writing the fifth answer
    assert main(command) == 0
    assert capsys.readouterr().out == printed
    again = [json.loads(text) for text in path.read_text().splitlines()]
    for first, second in zip(map(json.loads, lines), again, strict=True):
        assert first["id"] == second["id"] and np.allclose(first["sound"], second["sound"], atol=1e-4)

    with ShardWriter(tmp_path / "other") as writer:
        samples = np.full((2, 8000), 0.1, dtype=np.float32)
        writer.write(Sample("x", "localisation", events=[Event("dog")]), Waveform(samples, 16_000, "binaural"))
    assert main(["eval", str(network), str(tmp_path / "other"), "--out", str(tmp_path / "run")]) == 2
    assert "another run" in capsys.readouterr().err


def test_two_clips_of_one_id_are_refused(network: Path, shards: Path, tmp_path: Path) -> None:
    """Folders of two seeds have the same ids: one of the clips was left out of the scores without a word."""
    with ShardWriter(tmp_path / "other") as writer:
        samples = np.full((2, 8000), 0.1, dtype=np.float32)
        for name in ("x", "s-3"):
            writer.write(Sample(name, "localisation", events=[Event("dog")]), Waveform(samples, 16_000, "binaural"))
    with pytest.raises(ConfigError, match="sample 's-3': expected one id, found it in .*test and .*other"):
        spatial.answer(spatial.load(network), [shards, tmp_path / "other"], tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_clips_that_cannot_be_heard_are_lines_with_an_error(network: Path, tmp_path: Path) -> None:
    noise = (np.random.default_rng(0).standard_normal((2, 50_000)) * 0.1).astype(np.float32)
    with ShardWriter(tmp_path / "shards") as writer:
        for name, waveform in {
            "long": Waveform(noise, 16_000, "binaural"),
            "mono": Waveform(noise[:1, :8000], 16_000, "mono"),
            "rate": Waveform(noise[:, :8000], 8_000, "binaural"),
            "good": Waveform(noise[:, :8000], 16_000, "binaural"),
        }.items():
            writer.write(Sample(name, "localisation", events=[Event("dog", azimuth=3.0)]), waveform)
    found = spatial.answer(spatial.load(network), [tmp_path / "shards"], tmp_path / "run", {})
    assert (found["clips"], found["errors"], found["er20"].n) == (2, 2, 0)  # another rate is resampled, as in training
    lines = {line["id"]: line for line in spatial.read_lines(tmp_path / "run" / spatial.PREDICTIONS)}
    assert "window" in lines["long"]["error"] and "mono" in lines["mono"]["error"] and "error" not in lines["rate"]


def test_an_evaluation_that_heard_nothing_ends_with_1(network: Path, tmp_path: Path, capsys) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        mono = Waveform(np.full((1, 8000), 0.1, dtype=np.float32), 16_000, "mono")
        writer.write(Sample("mono", "localisation", events=[Event("dog", azimuth=3.0)]), mono)
    assert main(["eval", str(network), str(tmp_path / "shards"), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "expected clips that can be heard, found none" in said.err and ".." not in said.err and "mAP" not in said.out


def test_published_weights_get_the_names_of_their_classes(network: Path, tmp_path: Path) -> None:
    """What ``audio-llm convert`` writes for ``finetuned.pth``: spatial heads alone, classes numbered."""
    loaded = spatial.load(network)
    numbered = {"labels": ["class 0", "class 1", "class 2"]}
    folder = save_parts(tmp_path / "published", loaded.encoder, {"spatial": loaded.heads}, numbered)
    assert spatial.load(folder).labels == numbered["labels"]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    assert spatial.load(folder, tmp_path / "dataset.json").labels == LABELS
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS[:2]}))
    with pytest.raises(ConfigError, match="3 different names"):
        spatial.load(folder, tmp_path / "dataset.json")
