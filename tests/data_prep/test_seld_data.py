"""Folders of DCASE task 3: read, split by room, and rendered from a sound folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm.cli import main
from audio_llm.datasets import dcase_seld, seld_tables
from audio_llm.encoders import seld_head
from audio_llm.errors import AudioLLMError
from audio_llm.model.encoder import build_encoder
from audio_llm.shards.schema import Event
from audio_llm.tasks import clips
from audio_llm.tasks.seld import tracks
from eval.tasks.seld import heard_tables, standing_out
from eval.tasks.seld_metric import score_tables
from tests.paths import ROOT

LABELS = ("bell", "dog", "rain")
SMALL = [
    "audio.snr_db=[30,30]",
    "rooms.train=2",
    "rooms.validation=1",
    "rooms.test=1",
    "rooms.listeners=1",
    "rooms.positions=12",
    "rooms.max_order=1",
    "rooms.seconds=0.05",
    "sounds.recordings=12",
    "sounds.seconds=[1,3]",
    "subsets.train.count=6",
    "subsets.validation.count=2",
    "subsets.test.count=3",
]
RECIPE = ROOT / "recipes" / "seld" / "clips.yaml"


def render(out: Path, *overrides: str, workers: int = 1) -> int:
    return main(["prep", str(RECIPE), str(out), *SMALL, *overrides, "--workers", str(workers), "--quiet"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seld") / "data"
    assert render(out) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    kinds = (dcase_seld.AUDIO, dcase_seld.TABLES)
    return {str(path.relative_to(folder)): path.read_bytes() for kind in kinds for path in (folder / kind).rglob("*.*")}


# ------------------------------------------------------------------------------------------------ reading

frames = st.integers(0, 49)
row = st.tuples(frames, st.integers(0, 2), st.integers(0, 2), st.integers(-90, 90), st.integers(0, 900), st.just(0))


@settings(max_examples=60, deadline=None)
@given(st.lists(row, max_size=40, unique_by=lambda cells: cells[:3]))
def test_tables_survive_as_events(rows):
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    events = dcase_seld.events_of_rows(table, LABELS)
    found = tracks.event_rows(events, {label: number for number, label in enumerate(LABELS)}, 50)
    plain = sorted(tuple(cells) for cells in table[:, [0, 1, 3, 4]].tolist())
    assert sorted(tuple(cells) for cells in found[:, [0, 1, 3, 4]].tolist()) == plain


def test_a_still_source_is_one_event():
    table = np.array([[frame, 1, 0, 30, 250, 1] for frame in range(10, 30)], dtype=np.float64)
    (event,) = dcase_seld.events_of_rows(table, LABELS)
    assert (event.label, event.onset, event.offset, event.azimuth, event.distance) == ("dog", 1.0, 3.0, 30, 2.5)


def challenge(root: Path, names: list[str]) -> Path:
    for name in names:
        for kind in (dcase_seld.AUDIO, dcase_seld.TABLES):
            (root / kind / "dev-train-tau").mkdir(parents=True, exist_ok=True)
        soundfile.write(root / dcase_seld.AUDIO / "dev-train-tau" / f"{name}.wav", np.zeros((2400, 2)), 24000)
        seld_tables.write_rows(
            root / dcase_seld.TABLES / "dev-train-tau" / f"{name}.csv", np.array([[0, 12, 0, 10, 90, 1]])
        )
    return root


def test_folds_and_rooms_are_chosen_by_name(tmp_path):
    names = [f"{room}_mix001_deg000_start0000" for room in ("fold3_room4", "fold3_room22", "fold4_room8")]
    folder = dcase_seld.find(challenge(tmp_path, names))
    assert folder.labels == list(seld_head.CLASSES)
    assert folder.load_sample(0).events[0].label == "knock"
    assert folder.select(["fold3"], ["fold3_room22"]).rooms == ["fold3_room4"]
    assert folder.select(["fold3_room22", "fold4"]).rooms == ["fold3_room22", "fold4_room8"]
    with pytest.raises(AudioLLMError, match="fold3_room21.*fold3_room22"):
        folder.select(["fold3"], ["fold3_room21"])


def test_a_clip_without_its_table_is_named(tmp_path):
    root = challenge(tmp_path, ["fold3_room4_mix001_deg000_start0000"])
    next((root / dcase_seld.TABLES).rglob("*.csv")).unlink()
    with pytest.raises(AudioLLMError, match="its table"):
        dcase_seld.find(root)


# ------------------------------------------------------------------------------------------------ rendering


def test_a_rendered_corpus_is_read_as_the_challenge_is(corpus):
    folder = dcase_seld.find(corpus)
    assert folder.labels == json.loads((corpus / "classes.json").read_text()) == sorted(folder.labels)
    assert {clip.fold for clip in folder.clips} == {"fold1", "fold2", "fold4"} and len(folder) == 11
    for number in range(len(folder)):
        waveform, rows = folder.load_waveform(number), folder.rows(number)
        assert waveform.samples.shape == (2, 120000) and waveform.sample_rate == 24000
        assert not len(rows) or (np.abs(rows[:, 3]).max() <= 90 and rows[:, 0].max() < 50 and rows[:, 4].min() >= 80)


def test_the_louder_channel_is_the_side_of_the_source(corpus):
    """Of coincident cardioids the one that faces the source is louder, so the tables tell the truth of the sound."""
    folder, checked = dcase_seld.find(corpus), 0
    for number in range(len(folder)):
        rows = folder.rows(number)
        azimuths = set(rows[:, 3].tolist())
        if len(azimuths) != 1 or abs(azimuth := azimuths.pop()) < 20:
            continue
        first, last = (int(frame * 2400) for frame in (rows[:, 0].min(), rows[:, 0].max() + 1))
        left, right = np.square(folder.load_waveform(number).samples[:, first:last]).sum(axis=1)
        assert (left > right) == (azimuth > 0)
        checked += 1
    assert checked >= 2


def test_frames_are_labelled_where_their_event_is_heard(tmp_path):
    """Claps with pauses: the pauses carry no label, and an oracle that hears what there is reaches all of the score."""
    for label in ("clap", "knock", "tick", "tap"):
        for number in range(16):
            path = tmp_path / "sounds" / label / f"{label}{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            sound = np.zeros(2 * 16000)
            for second in (0.1, 0.8, 1.5):
                start = round((second + 0.01 * number) * 16000)
                sound[start : start + 3200] = np.random.default_rng(number).normal(size=3200) * 0.2
            soundfile.write(path, sound, 16000)
    splits = ["split.test=0.5", "split.validation=0.5", "subsets.test.count=8"]
    assert render(tmp_path / "data", f"sounds.folder={tmp_path / 'sounds'}", *splits) == 0
    found = dcase_seld.find(tmp_path / "data").select(["fold4"])
    labelled = [len(found.rows(number)) for number in range(len(found))]
    kept = [len(standing_out(found.rows(number), found.load_waveform(number))) for number in range(len(found))]
    assert sum(labelled) > 20 and sum(kept) >= 0.98 * sum(labelled)
    assert any(
        np.diff(np.unique(found.rows(number)[:, 0])).max(initial=1) > 2 for number in range(len(found))
    )  # a pause inside an event
    oracle = score_tables(
        {f"{clip.name}.csv": found.rows(number) for number, clip in enumerate(found.clips)},
        heard_tables(found),
        num_classes=len(found.labels),
    )
    assert oracle.scores("micro").values[0] > 0.97


def test_no_recording_and_no_room_is_in_two_splits(corpus):
    manifest = json.loads((corpus / "dataset.json").read_text())
    rooms = [set(names) for names in manifest["rooms"].values()]
    assert not set.intersection(*rooms) and sum(map(len, rooms)) == len(set.union(*rooms))
    counts = manifest["sounds"]["recordings"]
    assert sum(counts.values()) <= 12 * len(manifest["labels"])


def test_clips_do_not_depend_on_workers_or_interruption(corpus, tmp_path):
    out = tmp_path / "again"
    assert render(out, workers=2) == 0
    assert contents(out) == contents(corpus)
    for path in sorted((out / dcase_seld.TABLES).rglob("*.csv"))[1::2]:  # as if killed between sound and table
        path.unlink()
    assert render(out) == 0
    assert contents(out) == contents(corpus)


def test_a_class_that_cannot_be_validated_is_told(tmp_path, capsys):
    out = tmp_path / "few"  # eight recordings of a class are not always on all sides
    counts = ["sounds.recordings=8", "seed=0", "subsets.train.count=1", "subsets.test.count=1"]
    assert main(["prep", str(RECIPE), str(out), *SMALL, *counts, "--workers", "1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: class")]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    absent = {reject["item"] for reject in rejects if reject["reason"] == "no recording in validation"}
    assert absent and len(absent) == len([line for line in said if line.endswith("in validation")])


def test_another_recipe_is_not_mixed_in(corpus, capsys):
    before = contents(corpus)
    assert render(corpus, "seed=1") == 2
    assert "another run: seed is 1 here" in capsys.readouterr().err and contents(corpus) == before


@pytest.mark.parametrize(
    ("override", "said"), [("audio.layout=foa", "stereo"), ("events_per_clip={-1: 1}", "events_per_clip")]
)
def test_refusals(tmp_path, override, said, capsys):
    assert render(tmp_path / "out", override) == 2
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ augmentation


def test_overlaid_clips_are_sums_of_sounds_and_of_events():
    generator = np.random.default_rng(0)
    batch = [
        clips.Clip(generator.standard_normal((2, 100 - 10 * n)).astype(np.float32), [Event(LABELS[n], 0.1, 0.5)], n)
        for n in range(3)
    ]
    mixed = clips.overlay(batch, 1.0, np.random.default_rng(3))
    for clip, found in zip(batch, mixed, strict=True):
        others = [event.label for event in found.events if event not in clip.events]
        assert found.number == clip.number and len(others) <= 1
        rest = np.zeros_like(found.samples)
        for label in others:
            other = batch[LABELS.index(label)].samples
            rest[:, : other.shape[1]] = other
        rest[:, : clip.samples.shape[1]] += clip.samples
        np.testing.assert_allclose(found.samples, rest, atol=1e-6)
    assert any(len(found.events) == 2 for found in mixed)
    assert clips.overlay(batch, 0.0, np.random.default_rng(3)) == batch


def test_the_head_answers_in_full_precision_under_autocast():
    encoder = build_encoder({"name": "cnn14", "preset": "tiny"}).eval()
    network = seld_head.SELDNetwork(encoder, seld_head.SELDHead(encoder, 3)).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert network(torch.zeros(1, 2, 40000), torch.tensor([40000])).dtype == torch.float32
