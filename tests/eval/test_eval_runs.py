"""Runs over a benchmark's files with a stranger's endpoint: kills, corrupt audio, controls, rescoring, comparing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_llm.answering.engines import open_engine
from audio_llm.cli import main
from audio_llm.errors import AudioLLMError
from eval import controls, predictions
from eval.benchmarks import BENCHMARKS, get_benchmark, open_benchmark
from eval.benchmarks.base import BenchmarkError
from eval.controls import Item
from eval.figures.scores import permutations, score_rows
from eval.predictions import Prediction
from eval.scorers import SCORERS
from eval.scorers.choice import OptionResolution
from eval.scorers.mmau import official_report
from tests.paths import ROOT
from tests.servers import Listener, serving

SOUNDS = ("rain", "dog", "bell", "siren")


class Hearing(Listener):
    """Names the sound by the pitch of what it is sent, as an option's text; the first option where it hears nothing."""

    pause = 0.0

    def heard(self, text: str, samples: np.ndarray | None) -> str:
        time.sleep(self.pause)
        if samples is None or np.abs(samples).max() < 1e-3:
            return text.split("(A) ")[1].split("\n")[0]
        pitch = np.abs(np.fft.rfft(samples[:, 0])).argmax() * 8000 / len(samples)
        return SOUNDS[round(pitch / 500) - 1]


def make_mmau(folder: Path, count: int, hidden: bool = False) -> Path:
    """`count` questions in MMAU's layout; the sounds are tones of 500, 1000, 1500 and 2000 Hz."""
    rng = random.Random(7)
    (folder / "audios").mkdir(parents=True)
    records = []
    for number in range(count):
        kind = rng.randrange(len(SOUNDS))
        tone = 0.3 * np.sin(2 * np.pi * 500 * (kind + 1) * np.arange(800) / 8000 + number)
        soundfile.write(folder / "audios" / f"{number}.wav", tone, 8000)
        choices = rng.sample(SOUNDS, k=4)
        record = {"id": f"q{number}", "audio_id": f"./audios/{number}.wav", "question": "Which sound is it?"}
        record |= {"choices": choices, "task": rng.choice(["sound", "music", "speech"]), "split": "test-mini"}
        record |= {"difficulty": rng.choice(["easy", "medium", "hard"]), "sub-category": "Sources"}
        records.append(record if hidden else record | {"answer": SOUNDS[kind]})
    (folder / "mmau-test-mini.json").write_text(json.dumps(records))
    return folder


def command(data: Path, out: Path, address: str, *more: str) -> list[str]:
    return [
        "eval",
        "listener",
        str(data),
        "--benchmark",
        "mmau",
        "--out",
        str(out),
        "--engine",
        address,
        "--quiet",
        *more,
    ]


def lines(out: Path) -> list[dict]:
    """The predictions file without the one thing that no two runs share."""
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Data of 40 questions and a run with all controls."""
    folder = tmp_path_factory.mktemp("mmau")
    data, out = make_mmau(folder / "data", 40), folder / "run"
    with serving(Hearing) as address:
        assert main(command(data, out, address, "--controls", "all", "--permutations", "3")) == 0
    yield data, out


def test_a_model_that_listens_is_told_from_one_that_does_not(finished, capsys) -> None:
    data, out = finished
    assert main(["rescore", str(out)]) == 0
    shown = capsys.readouterr().out
    tree = json.loads((out / "scores.json").read_text())
    summary = tree["summary"]
    assert summary["greedy"]["accuracy"] | {"low": 0} == {"value": 1.0, "low": 0, "high": 1.0, "n": 40, "clusters": 40}
    rows = predictions.read(out)
    first = np.mean([row.gold == row.choices[0] for row in rows if row.control == "silence"])
    for name in ("silence", "text_only"):
        assert summary["controls"][name]["accuracy"]["value"] == first
        assert summary["contributions"][name]["difference"]["value"] == pytest.approx(1 - first)
        assert summary["contributions"][name]["only_second"] == round(40 * (1 - first))
    assert summary["controls"]["other_audio"]["accuracy"]["value"] < 0.7
    orders = summary["permutations"]
    assert (orders["k"], orders["mean"]["value"], orders["worst"]["value"], orders["all_k"]["value"]) == (3, 1, 1, 1)
    assert (orders["std"], orders["consistency"]["value"], orders["consistency"]["n"]) == (0, 1, 40)
    assert "the same option in every order" in shown
    asked = {row.id: set() for row in rows}
    for row in rows:
        if row.control == "shuffled_options":
            asked[row.id].add(tuple(row.choices))
    assert all(len(orders) == 3 for orders in asked.values())
    manifest = predictions.read_manifest(out)
    assert manifest["benchmark"] == "mmau"
    digest = hashlib.sha256((data / "mmau-test-mini.json").read_bytes()).hexdigest()
    assert manifest["data_sha256"] == [digest]


def test_permutations_punish_a_habit_of_place() -> None:
    golds = ["dog"] * 6
    rows = []
    for number, gold in enumerate(golds):
        item = Item(f"i{number}", "?", ["dog", "rain", "bell"], gold, "sound", "t", "c")
        for sample in range(5):
            asked = controls.shuffled_options(item, 0, sample)
            assert asked is not None
            fields = dict(id=item.id, question_type="sound", format="t", question="?", choices=asked.choices, gold=gold)
            rows.append(Prediction(**fields, raw="(A)", control="shuffled_options", sample=sample))
        assert controls.shuffled_options(item, 0, 5) is None  # 3! orders, one of them its own
    found = permutations(score_rows(rows, OptionResolution()))
    assert found is not None and found.k == 5
    assert found.mean.value == pytest.approx(1 / 5)  # dog stands first in 2 of 6 orders, one of them its own
    assert found.all_k.value == 0 and found.worst.value <= found.mean.value
    orders = [np.mean([entry.choices[0] == "dog" for entry in rows if entry.sample == sample]) for sample in range(5)]
    assert found.std == pytest.approx(np.std(orders)) and found.std > 0
    assert found.consistency.value == 0  # every option stands first in some order


def test_consistent_is_who_stays_with_an_option_right_or_wrong() -> None:
    """The question's own order counts too, and no answer is no option."""
    said = {"right": ["(B)", "(A)"], "wrong": ["rain", "rain"], "moves": ["dog", "rain"], "mute": ["", ""]}
    orders = [["rain", "dog"], ["dog", "rain"]]
    own, shuffled = (
        [
            Prediction(name, "x", "t", "?", orders[number], "dog", raw=raws[number], control=control)
            for name, raws in said.items()
        ]
        for number, control in enumerate(("", "shuffled_options"))
    )
    found = permutations(score_rows(shuffled, OptionResolution()), own=score_rows(own, OptionResolution()))
    assert found is not None and found.consistency.value == 0.5 and found.consistency.n == 4
    assert (found.k, found.std, found.all_k.value) == (1, 0.0, 0.25)
    alone = permutations(score_rows(shuffled, OptionResolution()))
    assert alone is not None and alone.consistency.value == 0.75  # a single order can contradict nothing


def test_rescoring_gives_the_same_files_to_the_last_digit(finished, tmp_path: Path, capsys) -> None:
    _, out = finished
    before = [(out / name).read_bytes() for name in ("scores.json", "scores.jsonl")]
    (out / "scores.json").unlink()
    assert main(["rescore", str(out)]) == 0
    assert [(out / name).read_bytes() for name in ("scores.json", "scores.jsonl")] == before
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("option-resolution", "mmau-official", "letter", "tag-exact"))
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert all(set(score) >= {"scorer", "version", "id", "value", "answer", "explanation"} for score in scores)
    assert {score["scorer"] for score in scores} == set(get_benchmark("mmau").scorers)


def test_a_submission_is_what_the_official_rule_reads(finished, tmp_path: Path) -> None:
    data, out = finished
    assert main(["rescore", str(out), "--submission", str(tmp_path)]) == 0
    official = json.loads((data / "mmau-test-mini.json").read_text())
    sent = json.loads((tmp_path / "submission.json").read_text())
    assert [{name: value for name, value in record.items() if name != "model_output"} for record in sent] == official
    report = official_report(sent)
    assert (report.right, report.total, report.left_out) == (40, 40, 0)
    assert main(["rescore", str(tmp_path / "submission.json")]) == 0
    assert main(["rescore", str(out), "--submission", str(tmp_path), "--option", "form=rw"]) == 2


@pytest.mark.parametrize("verb", ["rescore", "report", "compare"])
def test_figures_are_of_whole_runs_or_say_so(tmp_path: Path, capsys, verb: str) -> None:
    """Rows that were cut from a finished run are asked for; of one that goes on, the answers so far are counted."""
    run = tmp_path / "run"
    with predictions.PredictionWriter(run / "predictions.jsonl") as writer:
        writer.write([Prediction(f"{n}", "x", "choice", "?", ["a", "b"], "b", "B") for n in range(4)])
    arguments = {
        "rescore": ["rescore", str(run)],
        "report": ["report", str(run), "--out", str(tmp_path / "page.html")],
        "compare": ["compare", str(run), str(run)],
    }[verb]
    manifest = {"finished": True, "rows": 6, "command": "audio-llm eval M D --out R"}
    (run / "run.json").write_text(json.dumps(manifest))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "the 6 answers of its run.json, found 4. Repeat its own command (audio-llm eval M D --out R)" in told
    (run / "run.json").write_text(json.dumps(manifest | {"finished": False}))
    assert main(arguments) == 0
    assert "has not finished; its figures are of the 4 answers so far" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"limit": 5}, "items": 5}, "the 5 questions of --limit 5"),
        ({"finished": False}, "5 answers of a run that has not finished. Finish it by its own command (audio-llm eval"),
        ({"items": 6}, "expected answers to its 6 questions, found 5"),
        ({"options": {"duplicates": "drop"}}, "--option duplicates=drop, which leaves some out"),
        ({"items": 5}, "1 of 5 that could not be asked, the first '3' (no such file)"),
        (None, "5 answers without the run.json"),
    ],
)
@pytest.mark.parametrize("benchmark", ["mmau", "dcase_aqa", "spatial_sound_qa"])
def test_a_submission_without_all_answers_is_refused(
    tmp_path: Path, capsys, benchmark: str, change: dict | None, message: str
) -> None:
    """Every question once, or the reason why not and what to do; whatever the benchmark."""
    run, sent = tmp_path / "run", tmp_path / "sent"
    with predictions.PredictionWriter(run / "predictions.jsonl") as writer:
        for number in range(5):
            meta = {"options": ["A. a", "B. b"], "stem": f"q{number}", "file": "f"}
            row = Prediction(str(number), "x", benchmark, "?", ["a", "b"], "b", "B", temperature=1.0, meta=meta)
            row.error = "no such file" if number == 3 and "could not be asked" in message else ""
            writer.write([row])
    if change is not None:
        manifest = {
            "benchmark": benchmark,
            "finished": True,
            "items": 5,
            "command": "audio-llm eval M D",
            "options": {},
        }
        (run / "run.json").write_text(json.dumps(manifest | change))
    arguments = ["rescore", str(run), "--benchmark", benchmark, "--submission", str(sent)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "--incomplete" in error and not sent.exists()
    assert main([*arguments, "--incomplete"]) == 0
    assert message in capsys.readouterr().err
    counts = {"mmau": 5, "dcase_aqa": 5, "spatial_sound_qa": 5 - ("could not be asked" in message)}
    written = {"mmau": "submission.json", "dcase_aqa": "Surname_INST_task5_1.output.csv", "spatial_sound_qa": "f_pred"}
    text = (sent / written[benchmark]).read_text()
    told = len(json.loads(text)) if benchmark == "mmau" else len(text.splitlines()) - (benchmark == "dcase_aqa")
    assert told == counts[benchmark]


def test_a_limited_run_is_no_submission(finished, tmp_path: Path, capsys) -> None:
    data, _ = finished
    with serving(Hearing) as address:
        assert main(command(data, tmp_path / "run", address, "--limit", "5", "--controls", "none")) == 0
        assert main(command(data, tmp_path / "all", address, "--limit", "50", "--controls", "none")) == 0
    assert main(["rescore", str(tmp_path / "run"), "--submission", str(tmp_path / "sent")]) == 2
    assert "the 5 questions of --limit 5" in capsys.readouterr().err
    assert main(["rescore", str(tmp_path / "all"), "--submission", str(tmp_path / "sent")]) == 0
    assert main(["rescore", str(tmp_path / "all"), "--incomplete"]) == 2


def test_a_hidden_test_is_asked_and_not_scored(tmp_path: Path, capsys) -> None:
    data, out = make_mmau(tmp_path / "data", 12, hidden=True), tmp_path / "run"
    with serving(Hearing) as address:
        assert main(command(data, out, address, "--controls", "none")) == 0
    assert predictions.read_manifest(out)["counts"] == {"answer hidden": 12}
    assert (out / "scores.jsonl").read_text() == ""
    assert main(["rescore", str(out), "--submission", str(tmp_path / "sent")]) == 0
    sent = json.loads((tmp_path / "sent" / "submission.json").read_text())
    assert len(sent) == 12 and all(record["model_output"] in SOUNDS and "answer" not in record for record in sent)


def test_one_item_with_corrupt_audio_changes_its_own_row_and_the_counts(finished, tmp_path: Path, capsys) -> None:
    whole, out = finished
    data = make_mmau(tmp_path / "data", 40)
    records = json.loads((data / "mmau-test-mini.json").read_text())
    for name, place in (("corrupt", 5), ("missing", 17)):
        records.insert(place, records[0] | {"id": name, "audio_id": f"./audios/{name}.wav"})
    (data / "audios" / "corrupt.wav").write_bytes(b"RIFF no sound in here")
    (data / "mmau-test-mini.json").write_text(json.dumps(records))
    with serving(Hearing) as address:
        assert main(command(data, tmp_path / "run", address, "--controls", "all", "--permutations", "3")) == 0
    shown = capsys.readouterr().out
    after = lines(tmp_path / "run")
    assert [row for row in after if row["id"] not in ("corrupt", "missing")] == lines(out)
    errors = {row["id"]: row["error"] for row in after if row["error"]}
    assert set(errors) == {"corrupt", "missing"}
    assert "no such file" in errors["missing"] and "item 'corrupt'" in errors["corrupt"]
    ours, theirs = (json.loads((run / "scores.json").read_text())["summary"] for run in (out, tmp_path / "run"))
    assert theirs["greedy"] == ours["greedy"] | {"errors": 2}
    for name, cell in ours["controls"].items():
        assert theirs["controls"][name] == cell | {"errors": 6 if name == "shuffled_options" else 2}
    assert theirs["contributions"] == ours["contributions"]
    assert "n 40" in shown and "errors 2 left out" in shown and "40 of 42 questions were asked" in shown
    manifest = predictions.read_manifest(tmp_path / "run")
    assert (manifest["items"], manifest["asked"], manifest["counts"]) == (42, 40, {"audio missing": 1})
    assert manifest["errors"] == len([row for row in after if row["error"]]) == 14


def test_too_many_missing_clips_stop_a_run_each_time_until_it_may_do_without(tmp_path: Path, capsys) -> None:
    data, out = make_mmau(tmp_path / "data", 150), tmp_path / "run"
    for number in range(60, 90):
        (data / "audios" / f"{number}.wav").unlink()
    for number in (10, 20, 30):
        (data / "audios" / f"{number}.wav").write_bytes(b"no sound")
    with serving(Hearing) as address:
        asked = command(data, out, address, "--controls", "none", "--batch-size", "1")
        for _ in range(3):
            assert main(asked) == 2
            error = capsys.readouterr().err
            assert "21 of 150 questions could not be asked, where 10 % may be" in error and "--max-errors" in error
            assert predictions.read_manifest(out)["finished"] is False
        assert main([*asked, "--max-errors", "0.2"]) == 2
        assert "31 of 150 questions could not be asked, where 20 % may be" in capsys.readouterr().err
        assert main([*asked, "--max-errors", "0.25"]) == 0
        assert "117 of 150 questions were asked with their sound" in capsys.readouterr().out
        manifest = predictions.read_manifest(out)
        counted = {name: manifest[name] for name in ("items", "asked", "rows", "errors")}
        assert counted == {"items": 150, "asked": 117, "rows": 150, "errors": 33}
        assert sum(bool(row["error"]) for row in lines(out)) == 33
        assert main([*asked, "--max-errors", "1.5"]) == 2
        assert "--max-errors: expected a share from 0 to 1, found 1.5" in capsys.readouterr().err
        # A share that is given is taken by its word, in a small run as well.
        asked = command(data, tmp_path / "none", address, "--controls", "none", "--max-errors", "0")
        assert main(asked) == 2
        assert "1 of 150 questions could not be asked, where 0 % may be" in capsys.readouterr().err


def test_what_a_sound_has_no_mirror_or_other_for_is_left_out(tmp_path: Path) -> None:
    data, out = make_mmau(tmp_path / "data", 30), tmp_path / "run"
    records = json.loads((data / "mmau-test-mini.json").read_text())
    for record in records:  # 25 clips of one channel and 5 of two
        record |= {"question": "On which side is the tone?", "choices": ["left", "right"], "answer": "left"}
    (data / "mmau-test-mini.json").write_text(json.dumps(records))
    for number in range(25, 30):
        samples, rate = soundfile.read(data / "audios" / f"{number}.wav")
        soundfile.write(data / "audios" / f"{number}.wav", np.stack([samples, 0 * samples], 1), rate)

    class Sided(Listener):
        def heard(self, text: str, samples: np.ndarray | None) -> str:
            return "left" if samples is None or samples.shape[1] == 1 else super().heard(text, samples)

    with serving(Sided) as address:
        assert main(command(data, out, address, "--controls", "swap")) == 0
        rows = [row for row in lines(out) if row["control"] == "swap"]
        assert {row["id"] for row in rows} == {f"q{number}" for number in range(25, 30)}
        assert {(row["gold"], "right" in row["raw"], row["error"]) for row in rows} == {("right", True, "")}
        manifest = predictions.read_manifest(out)
        assert (manifest["rows"], manifest["errors"]) == (35, 0)
        for record in records:
            record["audio_id"] = "./audios/0.wav"
        (data / "mmau-test-mini.json").write_text(json.dumps(records))
        assert main(command(data, tmp_path / "one", address, "--controls", "other_audio")) == 0
    assert {row["control"] for row in lines(tmp_path / "one")} == {""}
    assert main(command(data, tmp_path / "one", address, "--controls", "other_audio")) == 0  # finished: not asked again


def test_a_run_is_not_continued_by_an_engine_of_another_kind(finished, capsys) -> None:
    data, out = finished
    asked = command(data, out, "http://127.0.0.1:9", "--controls", "all", "--permutations", "3")
    before = (out / "predictions.jsonl").read_bytes()
    assert main(asked) == 0  # another address is the same kind
    manifest = predictions.read_manifest(out)
    for finished_before in (True, False):
        (out / "run.json").write_text(json.dumps(manifest | {"engine": "vllm", "finished": finished_before}))
        capsys.readouterr()
        assert main(asked) == 2
        error = capsys.readouterr().err
        assert "another run: engine is http here and vllm there" in error and "--engine vllm" in error
    (out / "run.json").write_text(json.dumps(manifest))
    assert main([*asked, "--limit", "7", "--max-tokens", "9"]) == 2  # what differs is named, and nothing else
    error = capsys.readouterr().err
    assert "max_tokens is 9 here and 256 there; limit is 7 here and None there. " in error and "seed" not in error
    assert (out / "predictions.jsonl").read_bytes() == before


def test_an_endpoint_that_drops_the_sound_is_noticed(finished, tmp_path: Path, capsys) -> None:
    """The listener of these tests says 20 prompt tokens whatever it is asked."""

    class Counting(Hearing):
        def reply(self, code: int, tree: dict) -> None:
            if "usage" in tree:
                tree["usage"]["prompt_tokens"] += self.sounds
            super().reply(code, tree)

        def heard(self, text: str, samples: np.ndarray | None) -> str:
            self.sounds = 0 if samples is None else 25
            return super().heard(text, samples)

    data, out = finished
    warning = "as many prompt tokens with the sound as without, in all 40 questions"
    assert warning in json.loads((out / "scores.json").read_text())["warning"]
    assert warning in predictions.read_manifest(out)["warning"]
    with serving(Counting) as address:
        assert main(command(data, tmp_path / "run", address, "--controls", "text_only")) == 0
    assert "warning" not in capsys.readouterr().out
    assert "warning" not in json.loads((tmp_path / "run" / "scores.json").read_text())
    assert "warning" not in predictions.read_manifest(tmp_path / "run")


def test_a_run_of_500_questions_killed_at_a_random_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    data = make_mmau(tmp_path / "data", 500)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with serving(Hearing, pause=0.02) as address:  # slow enough to be killed between two answers
        call = [sys.executable, "-m", "audio_llm", *command(data, killed, address, "--controls", "none")]
        call += ["--batch-size", "4"]
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path, deadline = killed / "predictions.jsonl", time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline and not (path.exists() and path.stat().st_size):
            time.sleep(0.01)
        time.sleep(random.random() / 2)
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = len(predictions.mend(killed / "predictions.jsonl"))
    assert 0 < kept < 500
    with serving(Hearing) as address:
        assert main(command(data, killed, address, "--controls", "none")) == 0
        assert main(command(data, whole, address, "--controls", "none")) == 0
    assert lines(killed) == lines(whole)
    assert len({row["id"] for row in lines(killed)}) == len(lines(killed)) == 500


def test_overwriting_begins_when_the_new_run_can(tmp_path: Path, capsys) -> None:
    data, out = make_mmau(tmp_path / "data", 4), tmp_path / "run"
    with serving(Hearing) as address:
        assert main(command(data, out, address, "--controls", "none")) == 0
    kept = lines(out)
    for more in (
        ["--limit", "0"],
        ["--option", "audio=nowhere"],
        ["--engine", "vlm"],
        ["--engine", "http://127.0.0.1:9"],
    ):
        assert main([*command(data, out, address), "--overwrite", *more]) == 2
        assert lines(out) == kept
    with serving(Hearing) as address:
        assert main(command(data, out, address, "--controls", "none", "--seed", "1", "--overwrite")) == 0
    assert {row["id"] for row in lines(out)} == {row["id"] for row in kept} and lines(out) != kept
    (out / "run.json").unlink()
    capsys.readouterr()
    assert main(command(data, out, address, "--controls", "none")) == 2
    assert "expected a run.json that says whose answers lie there, found none" in capsys.readouterr().err


def test_a_full_disk_is_what_is_told_and_nothing_is_written_twice(tmp_path: Path, monkeypatch) -> None:
    from eval import runner

    class FullOnce(predictions.PredictionWriter):
        full = True

        def write(self, rows) -> None:
            written.extend(row.id for row in rows)
            if self.full:
                self.full = False
                raise OSError(errno.ENOSPC, "No space left on device")

    written: list[str] = []
    monkeypatch.setattr(runner, "FLUSH_ROWS", 2)
    found = open_benchmark("mmau", make_mmau(tmp_path / "data", 10))
    with serving(Hearing) as address:
        engine = open_engine(address, "listener", batch_size=1)
        work = runner.Work(found, runner.EvalSettings(), engine, set())
        with FullOnce(tmp_path / "p.jsonl") as writer, pytest.raises(OSError, match="No space left"):
            runner._answer_all(engine, work, writer, False)
    assert written and len(written) == len(set(written))


def test_two_runs_are_compared_question_by_question(finished, tmp_path: Path, capsys) -> None:
    _, out = finished
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    worse = tmp_path / "worse"
    worse.mkdir()
    plain = [row for row in rows if not row["control"]]
    for row in plain[:10]:
        row["raw"] = next(choice for choice in row["choices"] if choice != row["gold"])
    (worse / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain[:38]))
    assert main(["compare", str(worse), str(out), "--by", "difficulty"]) == 0
    shown = capsys.readouterr().out
    assert "better only before 0, only after 10, p 0.00" in shown  # chance, silence (asked of one run alone) beside it
    assert "chance 25.0, silence – and 50.0" in shown
    assert "n 38" in shown and "easy" in shown
    assert "answered by one run alone and left out: 0 and 2" in shown
    assert main(["compare", str(worse), str(out), "--by", "dificulty"]) == 2
    assert "did you mean 'difficulty'" in capsys.readouterr().err
    (worse / "predictions.jsonl").write_text("".join(json.dumps(row | {"error": "x"}) + "\n" for row in plain))
    assert main(["compare", str(worse), str(out)]) == 2
    assert "scorer 'option-resolution' can score, found none among 40, of which 40 errors" in capsys.readouterr().err
    for change, message in (({"question": "Which animal?"}, "question"), ({"gold": "dog!"}, "answer")):
        (worse / "predictions.jsonl").write_text(json.dumps(plain[0] | change) + "\n")
        assert main(["compare", str(worse), str(out)]) == 2
        assert f"item 'q0', {message}" in capsys.readouterr().err
    assert main(["compare", str(worse), str(out), "--answers", "gredy"]) == 2
    assert "did you mean 'greedy'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_benchmark_keeps_the_contract(name: str) -> None:
    benchmark = get_benchmark(name)
    assert benchmark.name == name and benchmark.title and isinstance(benchmark.groups, tuple)
    assert benchmark.scorers and set(benchmark.scorers) <= set(SCORERS)
    assert all(scorer.version and scorer.title for scorer in SCORERS.values())


def item(**changes) -> dict:
    record = {"id": "a", "audio_id": "a.wav", "question": "?", "choices": ["x", "y"], "answer": "x", "task": "sound"}
    return record | {"difficulty": "easy"} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"valid JSON, found .* at line 1"),
        ('{"a": 1}\n{"a": 2}', "a file that ends in .jsonl"),
        ('{"a": 1}', "expected 'id', found a"),
        ('["a"]', r"\[0\]: expected an object, found str"),
        ("[]", "at least one question"),
        (
            json.dumps([{key: value for key, value in item().items() if key != "choices"}]),
            "expected 'choices', found id",
        ),
        (json.dumps([item(choices="x")]), "'choices': expected a list of texts"),
        (json.dumps([item(), item()]), "item 'a': expected an id that occurs once"),
        (json.dumps([item(id=[5])]), "'id': expected a text, found \\[5"),
        (json.dumps([item(audio_id=["a"])]), "'audio_id': expected a text"),
        (json.dumps([item(question=" ")]), "'question': expected a text, found ' '"),
        (json.dumps([item(task="sounds")]), r"did you mean 'sound'"),
        (json.dumps([item(answer=3)]), "'answer': expected a text, found 3"),
        (json.dumps([item()]), "--option audio=FOLDER"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mmau-test-mini.json"
    path.write_text(content)
    with pytest.raises(AudioLLMError, match=message):
        open_benchmark("mmau", path)


def test_bad_arguments_of_the_verbs_are_one_line(finished, tmp_path: Path, capsys) -> None:
    data, out = finished
    base = ["eval", "m", str(data), "--out", str(tmp_path / "new"), "--engine", "transformers"]
    for arguments, message in [
        ([*base, "--benchmark", "mmua"], "did you mean 'mmau'"),
        ([*base, "--benchmark", "mmau", "--option", "audios=x"], "did you mean 'audio'"),
        ([*base, "--benchmark", "mmau", "--option", "audio"], "expected KEY=VALUE"),
        ([*base, "--benchmark", "mmau", "--with", "letter.a=b"], "takes no settings"),
        ([*base, "--benchmark", "mmau", "--option", "audio=nowhere"], "a folder of MMAU's audio"),
        (["eval", "m", str(tmp_path), "--benchmark", "mmau", "--out", str(tmp_path / "new")], "one mmau*.json"),
        (["rescore"], "expected a run folder"),
        (["rescore", str(tmp_path / "nothing")], "a predictions file"),
        (["rescore", str(out), "--scorers", "letters"], "did you mean 'letter'"),
        (["rescore", str(out), "--scorers", ","], "names with commas"),
        (["rescore", str(out), "--option", "form=raw"], "--submission FOLDER"),
        (["rescore", str(out), "--with", "letter"], "SCORER.KEY=VALUE"),
        (["rescore", str(out), "--with", "letter.a=b"], "takes no settings"),
        (["rescore", str(out), str(out), "--submission", str(tmp_path / "sent")], "expected one run"),
        (["compare", str(out), str(tmp_path)], "a predictions file"),
        (["compare", str(out), str(out), "--with", "letter=b"], "SCORER.KEY=VALUE"),
        (["report", str(out), "--with", "lettre.a=b"], "did you mean 'letter'"),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, (arguments, error)


PREDICTION = {
    "id": "a",
    "question_type": "x",
    "format": "mmau",
    "question": "?",
    "choices": ["b"],
    "gold": "b",
    "raw": "b",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ["a"]}, "'id': expected a value of type str, found ['a']"),
        ({"raw": None}, "'raw': expected a value of type str, found None"),
        ({"choices": "b"}, "'choices': expected a value of type list[str], found 'b'"),
        ({"choices": [1]}, "'choices': expected a value of type list[str]"),
        ({"temperature": "warm"}, "'temperature': expected a value of type float"),
        ({"sample": 0.5}, "'sample': expected a value of type int"),
        ({"meta": [1]}, "'meta': expected a value of type dict[str, Any]"),
        ({"events": ["x"]}, "'events': expected a value of type list[dict[str, Any]]"),
    ],
)
@pytest.mark.parametrize("verb", ["rescore", "report", "compare"])
def test_mistyped_predictions_are_named_by_line_and_key(
    finished, tmp_path: Path, capsys, verb: str, change: dict, message: str
) -> None:
    rows = [PREDICTION, PREDICTION | {"id": "c"} | change]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"rescore": [], "report": ["--out", str(tmp_path / "r.html")], "compare": [str(finished[1])]}[verb]
    assert main([verb, str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert f"predictions.jsonl line 2: {message}" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("[]", "expected a JSON object, found list"),
        ("{", "expected a JSON object, found something else"),
        ('{"scorer": "letter"}', "'scorer': expected a value of type dict, found 'letter'"),
        ('{"data": null}', "'data': expected a value of type list[str], found None"),
        ('{"benchmark": 5}', "'benchmark': expected a value of type str"),
    ],
)
def test_a_run_json_that_is_none_is_named(tmp_path: Path, capsys, manifest: str, message: str) -> None:
    (tmp_path / "predictions.jsonl").write_text(json.dumps(PREDICTION) + "\n")
    (tmp_path / "run.json").write_text(manifest)
    for verb, *more in (("rescore",), ("report", "--out", str(tmp_path / "r.html"))):
        assert main([verb, str(tmp_path), *more]) == 2
        assert f"run.json: {message}" in capsys.readouterr().err


def test_a_run_without_a_row_has_no_scores(tmp_path: Path, capsys) -> None:
    (tmp_path / "predictions.jsonl").write_text("\n")
    for verb, *more in (("rescore",), ("report", "--out", str(tmp_path / "r.html"))):
        assert main([verb, str(tmp_path), *more]) == 2
        assert "expected predictions, found none" in capsys.readouterr().err


def test_the_benchmark_in_the_documentation_works_and_has_at_most_40_lines(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending" / "benchmark.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    names: dict = {}
    exec(compile(code, "clip_quiz.py", "exec"), names)
    benchmark = names["BENCHMARK"]
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(400), 8000)
    table = tmp_path / "quiz.csv"
    table.write_text("clip,question,options,answer\na.wav,Which?,rain|dog,dog\nb.wav,Which?,rain|dog,rain\n")
    opened = benchmark.open(table)
    assert [(item.choices, item.gold) for item in opened.items] == [(["rain", "dog"], "dog"), (["rain", "dog"], "rain")]
    assert opened.waveform(0).samples.shape == (1, 400) and list(opened.errors) == [opened.items[1].id]
    assert set(benchmark.scorers) <= set(SCORERS)
    table.write_text("clip,question,options\na.wav,Which?,rain|dog\n")
    with pytest.raises(BenchmarkError, match="row 2: expected a value for 'answer'"):
        benchmark.open(table)
    with pytest.raises(BenchmarkError, match="expected a CSV file"):
        benchmark.open(tmp_path / "none.csv")
