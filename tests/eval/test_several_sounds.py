"""Questions about several sounds: every control, which sound was needed, the tables and the page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from audio_llm.answering.base import Answer
from audio_llm.cli import main
from audio_llm.errors import AudioError
from eval import predictions, runner
from eval.benchmarks import get_benchmark
from eval.controls import EACH, asked_as
from eval.figures import runs
from eval.lmms_export import export_task
from eval.report import hearing


@pytest.fixture(scope="module")
def questions(several):
    return get_benchmark("scenes").open(several())


class Keeper:
    """An engine that keeps what it is asked."""

    name, needs_audio = "keeper", False

    def __init__(self) -> None:
        self.asked = []

    def prepare(self, sound, name):
        return sound

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            yield Answer("the first", "stop")


def test_each_control_changes_the_sounds_it_names(questions, tmp_path: Path) -> None:
    engine = Keeper()
    controls = ["silence", "swap", "other_audio", "text_only", EACH]
    runner.evaluate(engine, questions, runner.EvalSettings(controls=controls), tmp_path, {}, progress=False)
    rows = predictions.read(tmp_path)
    assert len(rows) == len(engine.asked)
    counts = {item.id: item.audios for item in questions.items}
    places = {item.id: number for number, item in enumerate(questions.items)}
    found: dict[str, set[str]] = {}
    for row, request in zip(rows, engine.asked, strict=True):
        own, heard = questions.waveforms(places[row.id]), request.audios
        found.setdefault(row.id, set()).add(row.control)
        same = [np.array_equal(a.samples, b.samples) for a, b in zip(own, heard, strict=bool(heard))]
        silent = [not wave.samples.any() for wave in heard]
        content = [part["type"] for part in request.messages()[-1]["content"]]
        assert content.count("audio") == len(heard)
        if row.control == "":
            assert all(same)
            assert questions.items[places[row.id]].places == [] or content[0] == "text"
        elif row.control == "silence":
            assert all(silent) and len(silent) == counts[row.id]
        elif row.control == "text_only":
            assert not heard and "".join(p["text"] for p in request.messages()[-1]["content"]).startswith(row.question)
        elif row.control == "other_audio":
            assert len(heard) == counts[row.id] and not any(same)
        else:
            number = int(row.control.removeprefix("silence_")) - 1
            assert silent == [place == number for place in range(counts[row.id])]
            assert same == [place != number for place in range(counts[row.id])]
    every = {"", "silence", "other_audio", "text_only"}
    assert all(found[name] == every | set(asked_as(EACH, count)) for name, count in counts.items())
    assert asked_as(EACH, 1) == [] and asked_as(EACH, 2) == ["silence_1", "silence_2"]


def test_a_run_that_was_stopped_goes_on(questions, tmp_path: Path) -> None:
    settings = runner.EvalSettings(controls=["silence", EACH])
    runner.evaluate(Keeper(), questions, settings, tmp_path / "whole", {}, progress=False)
    whole = (tmp_path / "whole" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "predictions.jsonl").write_text("".join(whole[:17]))
    (tmp_path / "part" / "run.json").write_text("{}")
    work = runner.Work(questions, settings, Keeper(), predictions.mend(tmp_path / "part" / "predictions.jsonl"))
    assert work.reused == 17 and work.total == len(whole) == work.reused + len(work.asked)


def test_the_table_tells_which_sound_was_needed(several, checkpoint, tmp_path: Path, capsys) -> None:
    command = ["eval", str(checkpoint()), str(several()), "--engine", "transformers", "--max-tokens", "6", "--quiet"]
    command += ["--limit", "5", "--controls", "silence,silence_each", "--out", str(tmp_path)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    page = hearing.controls([runs.load(tmp_path)])
    for number in (1, 2, 3):
        assert f"sound {number} alone silent" in shown and f"sound {number} adds" in shown
        assert f"sound {number} alone silent" in page
    rows = predictions.read(tmp_path)
    assert not any(row.error for row in rows)
    raw = {(row.id, row.control): row.raw for row in rows}
    asked = [key for key in raw if key[1] == "silence_1"]
    assert asked and any(raw[key] != raw[key[0], ""] for key in asked)  # a sound that is silent is heard to be
    assert main(command) == 0
    assert "all that can be asked is answered already" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_plays_every_sound(several, checkpoint, tmp_path: Path) -> None:
    command = ["eval", str(checkpoint()), str(several()), "--engine", "transformers", "--max-tokens", "6", "--quiet"]
    assert main([*command, "--limit", "6", "--full", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "sound 2 alone silent" in page and page.count("<audio") > 6


def test_shards_of_one_sound_are_asked_as_ever(shards, checkpoint, tmp_path: Path) -> None:
    command = ["eval", str(checkpoint()), str(shards(8)), "--engine", "transformers", "--max-tokens", "4", "--quiet"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    settings = predictions.read_manifest(tmp_path)["settings"]
    assert settings["controls"] == ["silence", "swap"]


def test_what_takes_one_sound_says_so(questions, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="item 'several-0-001': expected one sound, found 2"):
        questions.waveform(1)
    exported = export_task(questions, "pairs", tmp_path, scorer="option-resolution")
    assert exported.questions == 4 and len(exported.left_out) == 8
    assert dataclasses.replace(questions).waveform(0).num_samples  # of one sound: as ever
