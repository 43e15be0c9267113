"""Questions of items become shards: what is asked, on which side it lies, and what is no sample."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from audio_llm import audio
from audio_llm import config as recipes
from audio_llm.cli import main
from audio_llm.errors import ConfigError, DataError
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Sample
from data_prep.corpus.recipe import CorpusConfig
from data_prep.corpus.sounds import Clip
from data_prep.tasks.corpus import prepare
from tests.data_prep.manifest_tools import wav
from tests.paths import ROOT

SIDES = {"sft": 0.5, "rl": 0.25, "test": 0.25}


def recordings(folder: Path, count: int) -> list[dict[str, Any]]:
    """Recordings of a second, each with two stretches of half a second as rows."""
    rows = []
    for number in range(count):
        wav(folder / "wav" / f"{number}.wav", number, seconds=1.0)
        for part in (0, 1):
            times = {"start": part / 2, "end": part / 2 + 0.5}
            rows.append({"audio": f"wav/{number}.wav", "id": f"{number}.{part}", "text": f"bell {part}", **times})
    return rows


def recipe(folder: Path, rows: list[dict[str, Any]], **pack: Any) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "corpus": "mine",
        "source": {"name": "recordings", "format": "jsonl", "path": str(folder / "rows.jsonl")},
        "stages": {
            "cut": {},
            "ask": {"name": "tests.data_prep.corpus.stages:Ask"},
            "pack": {"splits": SIDES, "samples_per_shard": 4, **pack},
        },
        "engine": {"name": "local", "workers": 1},
    }


def made(folder: Path, tree: dict[str, Any], out: str = "out") -> dict[str, Any]:
    return prepare(recipes.build(CorpusConfig, tree), folder / out, quiet=True).manifest


def samples(out: Path) -> dict[str, list[Sample]]:
    found = {}
    for side in SIDES:
        dataset = ShardDataset(out / side)
        found[side] = [dataset.load_sample(number) for number in range(len(dataset))]
        assert not dataset.indexes[0].rejects and len({s.id for s in found[side]}) == len(found[side])
    return found


def shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/*.tar"))}


def test_questions_become_samples_and_a_recording_lies_on_one_side(tmp_path: Path, capsys) -> None:
    rows = recordings(tmp_path, 8)
    rows[0]["text"], rows[1]["text"], rows[2]["text"] = "nothing", "wrong", "<|audio|>"
    tree = recipe(tmp_path, rows, keep=["text"], licence="CC0")
    (tmp_path / "recipe.yaml").write_text(json.dumps({"verb": "prep", "kind": "corpus"} | tree))
    out = tmp_path / "out"
    assert main(["prep", str(tmp_path / "recipe.yaml"), str(out), "--quiet"]) == 0
    told = capsys.readouterr().out
    manifest = json.loads((out / "dataset.json").read_text())
    found = samples(out)
    number = sum(map(len, found.values()))
    # Fourteen items have two questions that might be samples, one has one that is not; open ones are not for `rl`.
    not_taken = manifest["question_rejects"]["not_taken"]
    assert manifest["questions"] == 2 * 14 + 1 == number + 1 + 2 + not_taken and not_taken > 0
    assert f"29 questions = {number} samples + {not_taken + 3} rejects" in told
    assert manifest["question_rejects"] == {"answer_no_choice": 1, "marks": 2, "not_taken": not_taken}
    assert manifest["funnel"][3]["rejects"] == {"answer_no_choice": 1, "marks": 1, "no_questions": 1}
    assert {sample.task for sample in found["rl"]} == {"choice"}
    assert {sample.task for sample in found["sft"]} == {"choice", "open"}
    homes = {side: {clip for s in found[side] for clip in s.recordings} for side in found}
    assert not homes["sft"] & homes["rl"] and not homes["sft"] & homes["test"] and not homes["rl"] & homes["test"]
    one = found["test"][0]
    assert one.thinking == "It rings." and one.semantic_elements == {"agents": ["a bell"], "when": ["at once"]}
    by = {"question": "templates", "thinking": "a model"}
    assert all(sample.meta.get("written_by") == (by if sample.choices else None) for sample in found["sft"])
    assert one.source is not None and (one.source.split, one.source.licence) == ("test", "CC0")
    assert one.meta["item"] in one.id and one.meta["text"] in ("bell 0", "bell 1") and one.audio[0].seconds == 0.5
    assert main(["prep", str(tmp_path / "recipe.yaml"), str(out), "--quiet"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_shards_of_other_questions_are_replaced_and_of_the_same_are_kept(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 6)
    made(tmp_path, recipe(tmp_path, rows))
    first, out = shards(tmp_path / "out"), tmp_path / "out"
    assert len(first) > 3
    changed = recipe(tmp_path, rows)
    changed["stages"]["ask"]["thinking"] = "Other words."
    made(tmp_path, changed)
    assert {s.thinking for found in samples(out).values() for s in found} == {"Other words."}
    fewer = recipe(tmp_path, rows[:8])
    made(tmp_path, fewer)
    assert sum(map(len, samples(out).values())) < 20
    made(tmp_path, recipe(tmp_path, rows))
    assert shards(out) == first
    # What a stopped writer left is gone on with.
    last = sorted((out / "sft").glob("*.tar"))[-1]
    last.unlink()
    (out / "sft" / "sizes.json").unlink()
    made(tmp_path, recipe(tmp_path, rows))
    assert shards(out) == first


def test_without_cut_the_stretch_of_the_recording_is_packed(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 6)
    whole = made(tmp_path, recipe(tmp_path, rows))
    tree = recipe(tmp_path, rows)
    del tree["stages"]["cut"]
    made(tmp_path, tree, "other")
    sounds = [Counter(s.audio[0].sha256 for f in samples(tmp_path / o).values() for s in f) for o in ("out", "other")]
    assert sounds[0] == sounds[1] and whole["subsets"]["sft"]["seconds"] > 0


def test_clips_of_any_form_give_the_same_shards_and_those_in_flac_are_not_encoded_again(tmp_path: Path) -> None:
    rows, packed = recordings(tmp_path, 6), {}
    for name, cut in {"flac": {}, "wav": {"format": "wav"}, "deep": {"subtype": "PCM_24"}}.items():
        tree = recipe(tmp_path, rows)
        tree["stages"]["cut"] = cut
        made(tmp_path, tree, f"of_{name}")
        packed[name] = shards(tmp_path / f"of_{name}")
    assert packed["flac"] == packed["wav"] == packed["deep"] and len(packed["flac"]) > 3
    clips = {path.read_bytes() for path in (tmp_path / "of_flac" / "clips").rglob("*.flac")}
    shard_folders = [ShardDataset(tmp_path / "of_flac" / side) for side in SIDES]
    stored = {sound for found in shard_folders for n in range(len(found)) for sound in found.load_audio_bytes(n)}
    assert stored <= clips  # those that are 24 bits deep are none of these


def test_a_clip_that_is_another_sound_by_now_is_packed_as_what_it_is(tmp_path: Path) -> None:
    clip, other = tmp_path / "a.flac", wav(tmp_path / "b.wav", 1, seconds=0.5)
    waveform = audio.decode(other)
    clip.write_bytes(audio.encode(waveform))
    content = audio.sha256(waveform)
    assert Clip(clip, "a", content).stored(content) == clip.read_bytes()
    assert Clip(clip, "a", "0" * 64).stored(content) is None
    clip.write_bytes(audio.encode(waveform, subtype="PCM_24"))
    assert Clip(clip, "a", content).stored(content) is None


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 1)
    for pack, message in (
        ({"splits": {"a": 0.5}}, "shares above 0 that sum to 1"),
        ({"tasks": {"rll": ["choice"]}}, "pack.tasks: expected sides among"),
        ({"tasks": {"rl": ["choices"]}}, "pack.tasks.rl: expected choice, open or both"),
        ({"group": []}, "pack.group"),
        ({"splits": {"items": 1.0}}, "pack.splits: expected names other than the corpus's own folders, .*'items'"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipes.build(CorpusConfig, recipe(tmp_path, rows, **pack)).check()
    twice = recipe(tmp_path, rows)
    twice["stages"]["again"] = {"name": "pack", "splits": {"other": 1.0}}
    with pytest.raises(ConfigError, match="stages: expected one that packs, found two"):
        recipes.build(CorpusConfig, twice).check()
    with pytest.raises(DataError, match="split 'sft': expected rows, found none"):
        made(tmp_path, recipe(tmp_path, rows))


def test_the_stage_of_the_page_about_stages(tmp_path: Path, monkeypatch) -> None:
    page = (ROOT / "docs" / "extending" / "stage.md").read_text()
    (tmp_path / "my_peaks.py").write_text(page.split("```python")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    tree = recipe(tmp_path, recordings(tmp_path, 2))
    tree["stages"] = {"cut": {}, "mine": {"name": "my_peaks:Peaks", "least": 0.05, "batch": 8, "timeout": 60}}
    assert made(tmp_path, tree)["funnel"][2]["out"] == 4
    peaks = [json.loads(line)["fields"]["peak"] for line in (tmp_path / "out" / "items" / "mine.jsonl").open()]
    assert all(0.49 < peak <= 0.5 for peak in peaks)
    tree["stages"]["mine"]["least"] = 0.6
    assert made(tmp_path, tree)["funnel"][2]["rejects"] == {"soft": 4}
