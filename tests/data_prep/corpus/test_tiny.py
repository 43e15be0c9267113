"""The recipe of the documentation: its 20 planted defects fall out, each for its reason, and nothing else does."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from audio_llm import config as recipes
from audio_llm.cli import main
from audio_llm.shards.reader import ShardDataset
from data_prep.corpus.recipe import CorpusConfig
from data_prep.corpus.stage import Item, Reject
from tests.paths import ROOT, SHARED

RECIPE = ROOT / "recipes" / "corpus" / "tiny.yaml"
REASONS = {
    "not_a_sound": ("classify", "no_sound"),
    "no_caption": ("classify", "no_text"),
    "no_file": ("cut", "no_such_file"),
    "beyond_the_end": ("cut", "beyond_the_sound"),
    "ends_before_it_starts": ("cut", "end_before_start"),
}
with open(RECIPE.with_name("tiny_captions.csv"), newline="", encoding="utf-8") as stream:
    ROWS = list(csv.DictReader(stream))


def test_the_table_has_320_rows_of_which_20_are_spoilt() -> None:
    planted = Counter(row["planted"] for row in ROWS)
    assert len(ROWS) == 320 and planted[""] == 300 and set(planted) == {"", *REASONS}


def test_its_captions_are_told_from_what_is_none(tmp_path: Path) -> None:
    config = recipes.load(CorpusConfig, RECIPE)
    stage = next(entry.stage for entry in config.entries if entry.label == "classify")
    stage.open(tmp_path)
    results = stage.run([Item(str(number), {"text": row["caption"]}) for number, row in enumerate(ROWS)])
    for row, result in zip(ROWS, results, strict=True):
        wanted = REASONS.get(row["planted"], ("", ""))
        expected = wanted[1] if wanted[0] == "classify" else ""
        assert (result.reason if isinstance(result, Reject) else "") == expected, row


@pytest.mark.slow
@pytest.mark.shared("data/esc10")
def test_the_funnel_adds_up_and_only_what_was_planted_falls_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    out, root = tmp_path / "out", SHARED / "data" / "esc10" / "audio"
    assert main(["prep", str(RECIPE), str(out), f"source.root={root}", "--quiet"]) == 0
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    found = Counter((row["stage"], row["reason"]) for row in rejects)
    planted = Counter(REASONS[row["planted"]] for row in ROWS if row["planted"])
    assert found == planted and sum(found.values()) == 20
    funnel = json.loads((out / "funnel.json").read_text())["stages"]
    for before, after in zip(funnel, funnel[1:], strict=False):
        assert before["out"] == after["in"] == after["out"] + sum(after["rejects"].values())
    labels = {"tiny-" + row["filename"].replace(".", "_"): row["label"].replace("_", " ") for row in ROWS}
    recordings: dict[str, set[str]] = {}
    for side in ("sft", "rl", "validation", "test"):
        shards = ShardDataset(out / side, decode=False)
        samples = [shards.load_sample(number) for number in range(len(shards))]
        recordings[side] = {str(sample.source.clip) for sample in samples if sample.source}
        assert samples and all(sample.thinking and sample.semantic_elements for sample in samples)
        assert all([event.label for event in sample.events] == [labels[sample.meta["item"]]] for sample in samples)
    assert len(set[str]().union(*recordings.values())) == sum(map(len, recordings.values()))
