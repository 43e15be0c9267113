"""A made set in DCASE's format: what the reader finds in it is what was put in; splits share nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from audio_llm import config as recipes
from audio_llm.cli import main
from audio_llm.datasets import dcase_aqa
from audio_llm.errors import ConfigError
from audio_llm.shards.reader import ShardDataset
from data_prep import sounds
from data_prep.scenes import simulate
from data_prep.tasks import dcase_aqa as dcase_aqa_module
from tests.paths import ROOT

pytest.importorskip("pyroomacoustics", reason="rooms are simulated with pyroomacoustics")

RECIPE = {
    "seed": 3,
    "scenes": {
        "audio": {"sample_rate": 16000, "seconds": 1.0, "layout": "mono"},
        "sounds": {"recordings": 6, "seconds": [0.5, 0.9]},
        "split": {"train": 0.6, "test": 0.4},
        "rooms": {"train": 1, "validation": 0, "test": 1, "max_order": 1, "seconds": 0.05, "positions": 12},
        "events": {"seconds": [0.3, 0.5], "gap": 0.05, "overlap": 0.1},
    },
    "parts": {
        "part1": {
            "sounds": {"classes": ["bird", "cricket", "frog", "whistle"]},
            "questions": {"choice": {"identity": 1}},
        },
        "part2": {"questions": {"choice": {"presence": 1, "counting": 1}}, "events": {"seconds": [0.15, 0.25]}},
    },
    "splits": {
        "train": {"split": "train", "count": {"part1": 12, "part2": 20}},
        "dev": {"split": "test", "count": {"part1": 10, "part2": 10}},
        "eval": {"split": "test", "count": {"part1": 4}, "hidden": True},
    },
    "defects": {"mpeg": 0.4, "comma": 0.2, "broken": 0.2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("aqa") / "data"
    config = recipes.build(dcase_aqa_module.AudioQuestionsConfig, RECIPE)
    return out, dcase_aqa_module.prepare(config, out, workers=1, quiet=True).manifest


def test_a_folders_recordings_are_split_once_for_all_parts(tmp_path):
    """Whatever a part draws of them; and the shipped recipe, whose first part names built-in sounds, takes a folder."""
    for number in range(160):
        path = tmp_path / f"class{number % 8}" / f"rec{number:03d}.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"RIFF")
    tree = recipes.read(ROOT / "recipes" / "echotwin" / "questions.yaml")
    tree = {key: value for key, value in tree.items() if key not in ("verb", "kind")}
    tree["scenes"]["sounds"] = {**tree["scenes"]["sounds"], "folder": str(tmp_path)}
    config = recipes.build(dcase_aqa_module.AudioQuestionsConfig, tree)
    config.check()
    assert config.of_built_in_sounds("part1") and config.of("part1").sounds.classes is None
    sides: dict[str, set[str]] = {}
    for part in config.parts:
        scenes = config.of(part)
        groups, _ = sounds.split(simulate.find_sounds(scenes), scenes.split, scenes.recordings_seed, scenes.folds)
        for side, clips in groups.items():
            sides.setdefault(side, set()).update(clip.recording for clip in clips)
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"]
    assert len(set().union(*sides.values())) == 160
    tree["parts"]["part1"]["sounds"]["classes"] = ["class0", "class1", "class2", "class3"]
    config = recipes.build(dcase_aqa_module.AudioQuestionsConfig, tree)
    assert config.of("part1").sounds.classes == ["class0", "class1", "class2", "class3"]


def test_the_reader_counts_what_was_put_in(made) -> None:
    out, manifest = made
    for split in ("train", "dev"):
        found, counts = dcase_aqa.read(out / split), manifest["subsets"][split]
        assert len(found.rows) == counts["samples"] > 0
        assert found.counts.get("MPEG audio named .wav", 0) == counts["mpeg"] > 0
        assert found.counts.get("answer is none of the options", 0) == counts["broken"] > 0
        repaired = found.counts.get("answer differs from its option by punctuation, case or spaces", 0)
        assert repaired == counts["comma"] > 0
        assert {row.part for row in found.rows} == {1, 2}
        assert all(row.waveform().seconds == pytest.approx(1.0, abs=0.1) for row in found.rows)
    assert all(row.answer is None and not row.problem for row in dcase_aqa.read(out / "eval").rows)
    assert not dcase_aqa.heard_in_both(dcase_aqa.read(out / "train"), dcase_aqa.read(out / "dev"))


def test_answers_are_those_of_the_scenes_and_splits_share_no_recording(made) -> None:
    out, _ = made
    recordings: dict[str, set] = {"train": set(), "dev": set()}
    for split in recordings:
        rows = {row.id: row for row in dcase_aqa.read(out / split).rows}
        for part in ("part1", "part2"):
            shards = ShardDataset(out / "scenes" / part / split, decode=False)
            for index in range(len(shards)):
                sample = shards.load_sample(index)
                row = rows[f"{part}_{split}_{int(sample.id.rpartition('-')[2]):05d}"]
                recordings[split] |= {(part, name) for name in sample.meta["recordings"]}
                assert row.problem or row.gold == sample.answer
                assert sorted(row.choices) == sorted(sample.choices)
                if set(row.choices) == {"yes", "no"}:
                    assert row.choices == ("yes", "no")
                if row.question_type == "sound counting":
                    assert row.choices == ("1", "2", "3")
    assert not recordings["train"] & recordings["dev"]


def test_it_is_made_once_and_the_same_again(made, tmp_path: Path) -> None:
    out, manifest = made
    config = recipes.build(dcase_aqa_module.AudioQuestionsConfig, RECIPE)
    again = dcase_aqa_module.prepare(config, out, workers=1, quiet=True)
    assert not again.fresh and again.manifest == manifest
    dcase_aqa_module.prepare(config, tmp_path / "other", workers=2, quiet=True)
    for path in sorted((out / "dev").iterdir()):
        assert path.read_bytes() == (tmp_path / "other" / "dev" / path.name).read_bytes()
        name = Path(json.loads(path.read_text())["audio_url"]).name
        one, other = (folder / "audio" / "dev" / name for folder in (out, tmp_path / "other"))
        assert one.read_bytes() == other.read_bytes()


def test_wrong_recipes_are_named() -> None:
    for change, said in (
        ({"parts": {"part9": {}}}, "part9"),
        ({"splits": {"dev": {"split": "test", "count": {"part3": 1}}}}, "part3"),
        ({"splits": {}}, "splits"),
    ):
        with pytest.raises(ConfigError, match=said):
            recipes.build(dcase_aqa_module.AudioQuestionsConfig, {**RECIPE, **change}).check()


def test_a_kind_that_there_is_not_names_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("kind: dcase_aq\n")
    assert main(["prep", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 2
    expected = (
        "kind: expected one of audioset_reverb, corpus, dcase_aqa, manifest, scenes, seld, or package.module:Name"
    )
    assert f"{expected}, found 'dcase_aq' (did you mean 'dcase_aqa'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("splits.train.count={part1: 0}", "splits.train.count: expected at least one question, found none"),
        ("splits={audio: {split: train, count: {part1: 1}}}", "splits: expected names .*, found 'audio'"),
        ("splits={a.b: {split: train, count: {part1: 1}}}", "splits: expected names .*, found 'a.b'"),
        ("defects.mpeg=2", "defects.mpeg: expected a share between 0 and 1, found 2"),
        ("seed=-1", "seed: expected 0 or more, found -1"),
    ],
)
def test_values_that_nothing_can_be_drawn_by_are_named(override: str, words: str) -> None:
    recipe = ROOT / "recipes" / "echotwin" / "questions.yaml"
    config = recipes.load(dcase_aqa_module.AudioQuestionsConfig, recipe, [override])
    with pytest.raises(ConfigError, match=words):
        config.check()
