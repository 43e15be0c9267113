"""A run of ``kind: corpus``: every item has one result, nothing is computed twice, and what fails is a reject."""

from __future__ import annotations

import json
import math
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio_llm import config as recipes
from audio_llm.cli import main
from audio_llm.errors import AudioLLMError, ConfigError, DataError
from data_prep.corpus.engines.base import AHEAD
from data_prep.corpus.ledger import Ledger, hashed, line_of
from data_prep.corpus.recipe import CorpusConfig
from data_prep.corpus.sources.recordings import Recordings
from data_prep.corpus.stage import Item, Reject
from data_prep.tasks.corpus import prepare
from tests.paths import ROOT

STAGES = "tests.data_prep.corpus.stages"
NOTE, ORDER, BROKEN, STRANGE = (f"{STAGES}:{name}" for name in ("Note", "Order", "Broken", "Strange"))


def rows(folder: Path, texts: Sequence[str]) -> Path:
    """A table of recordings with a text each."""
    for number, _ in enumerate(texts):
        (folder / f"{number:03}.wav").write_text(f"{number}")
    lines = [{"audio": f"{number:03}.wav", "id": f"{number:03}", "text": text} for number, text in enumerate(texts)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe(folder: Path, **keys: Any) -> dict[str, Any]:
    note = {"name": NOTE, "log": str(folder / "log"), "timeout": 20}
    return {
        "corpus": "mine",
        "source": {"name": "recordings", "format": "jsonl", "path": str(folder / "rows.jsonl")},
        "stages": {"note": note | keys.pop("note", {}), "order": {"name": ORDER, "log": str(folder / "order")}},
        "engine": {"name": "local", "workers": 1},
        **keys,
    }


def made(folder: Path, out: str = "out", **keys: Any) -> dict[str, Any]:
    config = recipes.build(CorpusConfig, recipe(folder, **keys))
    return prepare(config, folder / out, quiet=True).manifest


def called(folder: Path, log: str = "log") -> Counter[str]:
    path = folder / log
    return Counter(path.read_text().split()) if path.exists() else Counter()


def outcome(folder: Path, out: str = "out") -> dict[str, bytes]:
    """What a run leaves, but for the ledgers, which have the order of time, and for times."""
    found = {path.name: path.read_bytes() for path in sorted((folder / out / "items").iterdir())}
    return found | {"rejects.jsonl": (folder / out / "rejects.jsonl").read_bytes()}


def test_rows_without_a_group_or_a_label_have_none(tmp_path: Path) -> None:
    """NaN, as tables of numbers and Python's JSON write what is not there, is no name that all rows share."""
    path = rows(tmp_path, ["a", "b", "c"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    more = [{"group": math.nan, "label": math.nan}, {"group": "one", "start": math.nan}, {"group": ["one", "two"]}]
    path.write_text("".join(json.dumps(line | told) + "\n" for line, told in zip(lines, more, strict=True)))
    source = recipes.build(Recordings, {"path": str(path), "format": "jsonl", "corpus": "mine"})
    first, second, third = source.items()
    assert isinstance(first, Item) and isinstance(second, Item) and isinstance(third, Reject)
    assert first.fields["source"] == "000.wav" and "label" not in first.fields
    assert second.fields["source"] == "one" and "start" not in second.fields and third.reason == "wrong_type"


# ------------------------------------------------------------------------------------------------ what fails


def test_what_raises_hangs_or_kills_its_worker_is_a_reject_and_the_run_goes_on(tmp_path: Path) -> None:
    texts = ["a", "raise", "b", "hang", "c", "die", "d", "nan", "unwanted", "e"]
    rows(tmp_path, texts)
    manifest = made(tmp_path, note={"timeout": 1.0, "batch": 2}, engine={"name": "local", "workers": 2})
    rejects = {line["item"]: line for line in map(json.loads, (tmp_path / "out" / "rejects.jsonl").open())}
    found = {texts[int(name[-3:])]: line["reason"] for name, line in rejects.items() if line["stage"] == "note"}
    expected = {"raise": "raised", "hang": "timeout", "die": "worker_died", "nan": "raised", "unwanted": "unwanted"}
    assert found == expected
    assert "KeyError" in rejects["mine-001"]["detail"] and "stages.py:" in rejects["mine-001"]["detail"]
    note, order = manifest["funnel"][1:]
    assert (note["in"], note["out"], order["in"], order["out"]) == (10, 5, 5, 4)
    calls = called(tmp_path)
    assert {texts[int(name[-3:])] for name, number in calls.items() if number > 2} == set()
    assert all(calls[f"mine-{texts.index(text):03}"] == 2 for text in ("raise", "hang", "die", "nan"))


def test_what_failed_is_tried_again_only_where_that_is_asked_for(tmp_path: Path) -> None:
    rows(tmp_path, ["a", "raise", "unwanted"])
    made(tmp_path)
    calls = called(tmp_path)
    made(tmp_path, note={"timeout": 30})
    assert called(tmp_path) == calls
    made(tmp_path, retry=True)
    assert called(tmp_path) - calls == Counter({"mine-001": 2})


def test_a_full_disk_stops_the_run_and_is_no_fault_of_an_item(tmp_path: Path) -> None:
    rows(tmp_path, ["a", "full", "b"])
    with pytest.raises(
        AudioLLMError, match=r"clips/a.flac: expected a disk to write on, found No space left on device"
    ):
        made(tmp_path)
    rows(tmp_path, ["a", "room", "b"])
    assert made(tmp_path)["funnel"][1]["out"] == 3 and called(tmp_path)["mine-000"] == 1


def test_a_line_that_the_disk_does_not_take_whole_is_none(tmp_path: Path) -> None:
    key = hashed(1)
    with Ledger(tmp_path / "x.jsonl") as ledger:
        ledger.add(key, line_of(key, Item("a", {"b": 1}), ("b",)))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "x.jsonl").stat().st_size + 10, limits[1]))
        try:
            with pytest.raises(OSError, match="No space left"):
                ledger.add(hashed(2), line_of(hashed(2), Item("b", {"b": 2}), ("b",)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        ledger.add(hashed(3), line_of(hashed(3), Item("c", {"b": 3}), ("b",)))
    with Ledger(tmp_path / "x.jsonl") as ledger:
        found = ledger.find(hashed(3))
        assert len(ledger) == 2 and found is not None and found["fields"] == {"b": 3} and hashed(2) not in ledger


@pytest.mark.parametrize("how", ["fewer", "other", "reason", "detail"])
def test_results_that_break_the_contract_are_rejects_that_say_so(tmp_path: Path, how: str) -> None:
    rows(tmp_path, ["a"])
    stages = {"broken": {"name": BROKEN, "how": how}}
    assert made(tmp_path, stages=stages)["funnel"][1]["rejects"] == {"raised": 1}
    assert "'broken'" in (tmp_path / "out" / "rejects.jsonl").read_text()


def test_a_stage_that_does_not_open_stops_the_run(tmp_path: Path) -> None:
    rows(tmp_path, ["a"])
    with pytest.raises(AudioLLMError, match="stage 'first': expected a stage that opens, found OSError: no model here"):
        made(tmp_path, stages={"first": {"name": BROKEN, "how": "open"}})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("digests", "stages.all: expected a version, and digests that are words by name, found ValueError"),
        ("open", "stage 'all': expected results of all items, found ValueError: no model here"),
        ("field", "stage 'all': expected results of all items, found TypeError: field 'told' holds what JSON"),
        ("facts", "stage 'all': expected results of all items, found ValueError: Out of range"),
    ],
)
def test_a_stage_that_says_what_json_cannot_is_told_in_a_sentence(how: str, message: str, tmp_path: Path) -> None:
    rows(tmp_path, ["a"])
    with pytest.raises(AudioLLMError, match=message):
        made(tmp_path, stages={"all": {"name": STRANGE, "how": how}})


def test_rows_that_are_no_items_are_in_the_funnel(tmp_path: Path) -> None:
    path = rows(tmp_path, ["a", "b"])
    with open(path, "a") as file:
        file.write('{"audio": "../x.wav", "id": 7}\n{"id": 8}\n{"audio": "000.wav", "id": "000"}\n[]\n')
        file.write('{"audio": "001.wav", "id": 9, "start": "soon"}\n')
    first = made(tmp_path)["funnel"][0]
    assert (first["in"], first["out"]) == (7, 2)
    assert first["rejects"] == {
        "bad_time": 1,
        "broken_row": 1,
        "duplicate_id": 1,
        "no_sound_named": 1,
        "outside_root": 1,
    }
    path.write_text("[]\n")
    with pytest.raises(DataError, match="source 'recordings': expected items, found none of 1"):
        made(tmp_path)


# ------------------------------------------------------------------------------------------------ nothing twice


def test_a_changed_stage_is_computed_again_and_no_other(tmp_path: Path) -> None:
    rows(tmp_path, [f"text {number}" for number in range(6)])
    made(tmp_path)
    first, whole = called(tmp_path), called(tmp_path, "order")
    assert set(first.values()) == set(whole.values()) == {1} and len(first) == 6
    assert made(tmp_path)["funnel"][1]["computed"] == 6  # up to date: what the first run said
    made(tmp_path, note={"seconds": 0.001, "workers": 1, "batch": 3, "timeout": 30})  # decides nothing
    assert (called(tmp_path), called(tmp_path, "order")) == (first, whole)
    manifest = made(tmp_path, note={"word": "other"})
    assert called(tmp_path) == first + first and manifest["funnel"][2]["computed"] == 6
    back = made(tmp_path)  # what the ledger knew before is still there
    assert called(tmp_path) == first + first and [row["computed"] for row in back["funnel"][1:]] == [0, 0]
    # One more recording: one more call; a whole stage sees all of them again.
    rows(tmp_path, [f"text {number}" for number in range(7)])
    manifest = made(tmp_path)
    assert called(tmp_path)["mine-006"] == 1 and manifest["funnel"][1]["computed"] == 1
    assert manifest["funnel"][2]["computed"] == 7
    rows(tmp_path, ["changed", *(f"text {number}" for number in range(1, 7))])
    before = called(tmp_path)
    made(tmp_path)
    assert called(tmp_path) - before == Counter({"mine-000": 1})


def test_what_a_stage_of_all_items_said_is_kept_beside_its_ledger(tmp_path: Path) -> None:
    """A run that was stopped behind it, and a recipe that is set back, find it in the ledger and call it no more."""
    rows(tmp_path, ["b", "a"])
    first = made(tmp_path)["first"]
    assert first == "noted a"
    assert made(tmp_path, note={"word": "other"})["first"] == "other a"
    back = made(tmp_path)
    assert back["first"] == first and back["funnel"][2]["computed"] == 0


def test_a_column_that_no_row_has_is_told(tmp_path: Path) -> None:
    rows(tmp_path, ["a"])
    about = {"path": str(tmp_path / "rows.jsonl"), "format": "jsonl", "corpus": "mine"}
    for more, said in (({"columns": {"text": "texts"}}, "columns.text"), ({"keep": ["colour"]}, "keep")):
        with pytest.raises(ConfigError, match=rf"source.{said}: expected a column of rows.jsonl: audio, id, text"):
            list(recipes.build(Recordings, about | more).items())


def test_a_folder_of_another_corpus_is_refused(tmp_path: Path) -> None:
    rows(tmp_path, ["a", "b"])
    made(tmp_path)
    with pytest.raises(ConfigError, match="corpus is other here and mine there"):
        made(tmp_path, corpus="other")
    config = recipes.build(CorpusConfig, recipe(tmp_path, corpus="other"))
    prepare(config, tmp_path / "out", overwrite=True, quiet=True)
    assert "mine-" not in (tmp_path / "out" / "ledger" / "note.jsonl").read_text()


def test_any_number_of_workers_gives_the_same(tmp_path: Path) -> None:
    rows(tmp_path, [f"text {number % 7}" if number % 5 else "unwanted" for number in range(40)])
    made(tmp_path, engine={"name": "local", "workers": 1})
    made(tmp_path, "three", engine={"name": "local", "workers": 3}, note={"batch": 4})
    assert outcome(tmp_path) == outcome(tmp_path, "three")


def kill_and_resume(folder: Path, engine: str, items: int, seconds: float, moments: int) -> None:
    """SIGKILL a run at so many random moments: the result is that of a run that was left alone, and no item is computed
    again but those that had been handed out."""
    rows(folder, [f"text {number % 13}" for number in range(items)])
    keys = {"engine": {"name": engine, "workers": 2}}
    made(folder, "whole", **keys)
    (folder / "log").unlink()
    tree = recipe(folder, note={"seconds": seconds}, **keys)
    (folder / "recipe.yaml").write_text(json.dumps({"verb": "prep", "kind": "corpus"} | tree))
    command = [sys.executable, "-m", "audio_llm", "prep", str(folder / "recipe.yaml"), str(folder / "out"), "--quiet"]
    draw = random.Random(0)
    for moment in range(moments):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        goal = sum(called(folder).values()) + draw.randrange(1, max(2, items // moments))
        deadline = time.monotonic() + 120
        while sum(called(folder).values()) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        process.wait()
        ledger = folder / "out" / "ledger" / "note.jsonl"
        if moment == 0:  # half a line, as a full disk or a power cut leaves it
            with open(ledger, "ab") as file:
                file.write(b'{"key": "0123')
        time.sleep(0.3)  # workers end when they see that the driver is gone
    made(folder, note={"seconds": seconds}, **keys)
    assert outcome(folder) == outcome(folder, "whole")
    calls = called(folder)
    assert len(calls) == items and sum(calls.values()) <= items + moments * 2 * AHEAD


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, "local", 30, 0.02, 2)


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stages": {}}, "stages: expected at least one"),
        ({"stages": {"cutt": None}}, "stage: expected one of"),
        ({"stages": {"a": {"name": NOTE}}}, "stages.a: missing key log"),
        ({"note": {"wrod": "x"}}, "unknown key 'wrod' (did you mean 'word'?)"),
        ({"note": {"timeout": 0}}, "stages.note.timeout: expected seconds above 0"),
        ({"note": {"workers": 0}}, "stages.note.workers: expected 1 or more"),
        (
            {"stages": {"o": {"name": ORDER, "log": "x"}}},
            "stages.o: expected a stage or a source before it with 'noted'",
        ),
        ({"engine": {"name": "locall"}}, "engine: expected one of"),
        ({"engine": {"name": "local", "workers": 0}}, "engine.workers: expected 1 or more"),
        ({"source": {"path": "x"}}, "source: expected a key 'name'"),
        ({"source": {"name": "recordings", "path": "x", "columns": {"texts": "a"}}}, "did you mean 'text'?"),
        (
            {"source": {"name": "subtitles", "path": "x", "media": "y", "encoding": "cp99"}},
            "source.encoding: expected an",
        ),
        ({"corpus": "a b"}, "corpus: expected a name of letters"),
        ({"stages": {"json": {"name": "json:loads"}}}, "expected one of"),
        ({"stages": {"x": {"name": f"{STAGES}:Bare"}}}, "a stage with 'needs', found none. Let it inherit"),
        ({"stages": {"x": {"name": f"{STAGES}:Stranger"}}}, "a stage with 'version', found none. Let it inherit"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipes.build(CorpusConfig, recipe(tmp_path, **keys)).check()
    assert message in str(caught.value)


def test_from_the_command_line_with_a_stage_of_a_package_of_ones_own(tmp_path: Path, monkeypatch, capsys) -> None:
    rows(tmp_path, ["a", "b", "unwanted"])
    package = (ROOT / "tests" / "data_prep" / "corpus" / "stages.py").read_text()
    (tmp_path / "guest_stages.py").write_text(package)
    monkeypatch.syspath_prepend(tmp_path)
    tree = recipe(tmp_path, stages={"mine": {"name": "guest_stages:Note", "log": str(tmp_path / "log")}})
    (tmp_path / "recipe.yaml").write_text(json.dumps({"verb": "prep", "kind": "corpus"} | tree))
    out = tmp_path / "out"
    command = ["prep", str(tmp_path / "recipe.yaml"), str(out), "--quiet"]
    assert main([*command, "stages.mine.word=heard", "--workers", "1"]) == 0
    assert "made: " in capsys.readouterr().out
    assert '"noted": "heard a"' in (out / "items" / "mine.jsonl").read_text()
    assert main(["inspect", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told[:4]] == [
        ["stage", "in", "out", "rejects"],
        ["source", "3", "3", "0"],
        ["mine", "3", "2", "1"],
        ["1", "unwanted"],
    ]
    assert "<svg" in (out / "figures" / "funnel.svg").read_text()
    counted = json.loads((out / "funnel.json").read_text())
    counted["stages"][1]["out"] = 3
    (out / "funnel.json").write_text(json.dumps(counted))
    assert main(["inspect", str(out)]) == 2 and "in = out + rejects" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the ledger


def test_a_ledger_gives_back_what_it_was_given(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    path, known = tmp_path / "x.jsonl", dict[str, Any]()
    for _ in range(4):
        with Ledger(path) as ledger:
            assert len(ledger) == len(known)
            for _ in range(200):
                key = hashed(int(draw.integers(300)))
                value = {"text": "é\n" * int(draw.integers(3000)), "number": float(draw.normal())}
                ledger.add(key, line_of(key, Item("a", value), ("text", "number")))
                known[key] = value
            for key, value in known.items():
                found = ledger.find(key)
                assert found is not None and found["fields"] == value
            assert ledger.find(hashed("none")) is None and hashed("none") not in ledger
        with open(path, "ab") as file:  # torn by a killed process
            file.write(b'{"key": "00000000000000000000000000000000", "id": "a", "fie')
    with Ledger(path, write=False) as ledger:
        assert len(ledger) == len(known) and "0" * 32 not in ledger


def test_lines_that_a_disk_damaged_are_computed_anew_and_no_others(tmp_path: Path, capsys) -> None:
    rows(tmp_path, [*"abcdefgh"])
    made(tmp_path)
    whole, path, order = outcome(tmp_path), tmp_path / "out" / "ledger" / "note.jsonl", tmp_path / "out" / "ledger"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:60] + lines[2]  # two in one, neither of them whole
    lines[2] = b""
    lines[4] = lines[4][:70] + b"\0" * (len(lines[4]) - 71) + b"\n"
    lines[6] = lines[6].replace(b'{"key": "', b'{"key": "zz')
    path.write_bytes(b"".join(lines))
    (order / "order.jsonl").write_bytes((order / "order.jsonl").read_bytes()[:-9] + b"#######\n")
    (tmp_path / "log").unlink()
    capsys.readouterr()
    made(tmp_path, retry=True)
    assert outcome(tmp_path) == whole
    assert called(tmp_path) == Counter(f"mine-{number:03}" for number in (1, 2, 4, 6))
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in told] == [
        f"{n} damaged lines; what they held is computed anew" for n in (2, 1)
    ]
    (tmp_path / "log").unlink()
    made(tmp_path, retry=True)  # the new lines stand for the damaged ones
    assert not called(tmp_path) and not capsys.readouterr().err


def test_a_damaged_line_is_told(tmp_path: Path) -> None:
    path, key = tmp_path / "x.jsonl", hashed(1)
    with Ledger(path) as ledger:
        ledger.add(key, line_of(key, Reject("a", "why"), ()))
    data = path.read_bytes()
    path.write_bytes(data[:-8] + b"#######\n")
    with Ledger(path) as ledger, pytest.raises(DataError, match="the whole line of key"):
        ledger.find(key)
