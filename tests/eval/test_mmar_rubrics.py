"""MMAR-Rubrics against a judge by a script: known grades, bad replies, servers that go away, runs that are killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm import config
from audio_llm.cli import main
from audio_llm.errors import AudioLLMError
from eval.benchmarks.declared import Declaration
from eval.figures.estimates import proportion
from eval.predictions import FILE_NAME, MANIFEST_NAME, Prediction, PredictionWriter
from eval.scorers import SCORERS, get_scorers
from eval.scorers.kept_replies import Said
from eval.scorers.mmar_rubrics import LONGEST, Criterion, MMARRubrics, Rubric, read_grades
from tests.eval.test_declared import mmar_match
from tests.paths import ROOT, SHARED
from tests.servers import ChatServer, serving

MMAR = SHARED / "data" / "mmar" / "MMAR-meta.jsonl"
CRITERIA = [{"name": f"c{n}", "scoring_point": f"rule {n}", "note": "hidden", "choices": [0, 1]} for n in range(5)]


class Judge(ChatServer):
    """Says what `script` makes of a request and of how many times it was asked before: a text, a text that was cut
    (``Cut``), or a status. `seen` holds every body, `lock` keeps the counts of its threads together."""

    served = "wise"
    seen: list[dict]
    times: Counter[str]
    lock: Any
    script: Callable[[str, int], str | int]
    pause = 0.0

    def chat(self, body: dict) -> None:
        said = body["messages"][-1]["content"]
        with self.lock:
            number = self.times[said]
            self.times[said] += 1
            self.seen.append(body)
        time.sleep(self.pause)
        reply = type(self).script(said, number)
        if isinstance(reply, int):
            return self.reply(reply, {"error": {"message": f"by the script {reply}"}})
        if isinstance(reply, Cut):
            message = {"role": "assistant", "content": str(reply)}
            return self.reply(200, {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]})
        return self.answer(reply)


class Cut(str):
    """A reply that ends for its length."""


def judging(script: Callable[[str, int], str | int], **more: Any) -> Any:
    attributes = {"script": staticmethod(script), "seen": [], "times": Counter(), "lock": threading.Lock(), **more}
    return serving(Judge, **attributes), attributes


def grades(points: list[int], **more: Any) -> str:
    listed = [{"name": f"c{n}", "score": point, "justification": "so"} for n, point in enumerate(points)]
    return "Here it is:\n```json\n" + json.dumps(listed, indent=1) + "\n```"


def some(count: int) -> list[int]:
    return [1] * count + [0] * (5 - count)


def rubrics(path: Path, rows: int = 4, **more: Any) -> Path:
    """A list of invented questions, of which the second choice is right."""
    base = {"question": "How many doors close?", "choices": ["One", "Two"], "answer": "Two", "thinking": "Two thuds."}
    lines = [{"id": f"q{n}", **base, "cue": ["Thud"], "rubric": CRITERIA, **more} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def row(number: int, said: str = "Two", thought: str = "two thuds", **more: Any) -> Prediction:
    raw = f"<think>{thought} {number}</think><answer>{said}</answer>"
    asked = (f"q{number}", "Perception Layer", "mmar", "How many doors close?", ["One", "Two"], "Two")
    return Prediction(*asked, raw=raw, **more)


def scorer(url: str, folder: Path, **more: str) -> MMARRubrics:
    listed = folder / "list.jsonl"
    settings = {"url": url, "cache": str(folder / "kept.jsonl"), "rubrics": str(listed), **more}
    if not listed.exists():
        rubrics(listed)
    (found,) = get_scorers(["mmar-rubrics"], {"mmar-rubrics": settings})
    assert isinstance(found, MMARRubrics)
    return found


def test_five_raters_of_one_answer(tmp_path: Path) -> None:
    """The specification's case: 1, .8, .8, .6, 0 is .7333; a wrong answer is 0 without a request."""
    server, judge = judging(lambda said, number: grades(some([5, 4, 4, 3, 0][number])))
    with server as url:
        found = scorer(url, tmp_path)
        rows = [row(0), row(1, "One"), row(2, "One", control="swap"), row(3, error="corrupt")]
        found.prepare(rows)
        scores = [found.score(entry) for entry in rows]
    assert scores[0] is not None and round(scores[0].value, 4) == 0.7333 and scores[0].answer == "Two"
    assert scores[1] is not None and scores[1].value == 0 and "nobody is asked" in scores[1].explanation
    assert scores[2:] == [None, None] and not found.problems
    assert len(judge["seen"]) == 5 and len({json.dumps(body) for body in judge["seen"]}) == 1
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == 5
    body = judge["seen"][0]
    assert (body["model"], body["temperature"], body["seed"]) == ("wise", 0, 42)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    text = body["messages"][1]["content"]
    order = [
        "How many doors close?",
        "Two",
        "Two thuds.",
        "c0",
        "rule 0",
        "[0, 1]",
        "c4",
        "JSON",
        "two thuds 0",
        "is: Two",
    ]
    places = [text.find(part) for part in order]
    assert -1 not in places and places == sorted(places)
    assert not any(hidden in text for hidden in ("Thud\n", '"Thud"', "hidden", "<think>", "<answer>"))
    assert not any(line.startswith(" ") for line in text.split("\n"))


@pytest.mark.shared("data/mmar/MMAR-meta.jsonl")
def test_mmars_own_rubrics_to_the_digit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run over MMAR's own rows, by the command line: its figures by a calculation of its own, in fractions."""
    draw, meta = random.Random(0), [json.loads(line) for line in MMAR.read_text().splitlines()[:90]]
    points: dict[str, list[int]] = {}
    rows, expected, clips, met = [], [], [], list[bool]()
    for number, entry in enumerate(meta):
        choices = [one for one in entry["choices"] if one]
        said = draw.choice([entry["answer"], *choices])
        met.append(mmar_match(entry["answer"], said, choices))
        asked = (entry["id"], entry["category"], "mmar", entry["question"], choices, entry["answer"])
        clip = f"clip{number // 2}"
        more = {"raw": f"<think>thought {number}.</think><answer>{said}</answer>", "clip": clip}
        rows.append(Prediction(*asked, **more, meta={"modality": entry["modality"]}))
        points[f"thought {number}."] = [draw.randint(0, 5) for _ in range(5)]
        middle = sorted(points[f"thought {number}."])[1:4]
        expected.append(Fraction(sum(middle), 15) if met[-1] else Fraction(0))
        clips.append(clip)
    run = tmp_path / "run"
    with PredictionWriter(run / FILE_NAME) as writer:
        writer.write([*rows, *(Prediction(*_asked(one), raw="?", control="silence") for one in rows)])
    (run / MANIFEST_NAME).write_text(json.dumps({"benchmark": "mmar", "options": {}, "data": []}))

    def script(said: str, number: int) -> str:
        return grades(some(points["thought" + said.split("\nthought")[1].split("\n")[0]][number]))

    server, judge = judging(script)
    kept = ["--with", f"mmar-rubrics.cache={tmp_path / 'kept'}", "--with", f"mmar-rubrics.rubrics={MMAR}"]
    with server as url:
        assert main(["rescore", str(run), *kept, "--with", f"mmar-rubrics.url={url}"]) == 0
        right = sum(met)
        assert len(judge["seen"]) == 5 * right
        shown = capsys.readouterr().out
        assert main(["rescore", str(run), *kept, "--with", f"mmar-rubrics.url={url}"]) == 0
        assert len(judge["seen"]) == 5 * right and capsys.readouterr().out == shown
    tree = json.loads((run / "scores.json").read_text())
    named = {entry["title"]: entry for entry in tree["spectrum"]["greedy"]}
    figure, figures = named["MMAR-Rubrics (wise)"], named["MMAR-Rubrics (wise)"]["figures"]
    values = np.array([float(one) for one in expected])
    assert figure["cell"]["accuracy"]["value"] == pytest.approx(float(sum(expected) / 90), abs=1e-15)
    interval = proportion(values, np.array(clips))
    assert (figure["cell"]["accuracy"]["low"], figure["cell"]["accuracy"]["high"]) == pytest.approx(
        (interval.low, interval.high), abs=1e-12
    )
    assert figure["cell"]["accuracy"]["clusters"] == 45 and figure["cell"]["chance"] is None
    assert figures["rubric score of right answers"] == pytest.approx(float(sum(expected) / right), abs=1e-15)
    assert figures["answers right by the official match"] == pytest.approx(right / 90)
    assert "MMAU's rule, whole reply" in named and "mmar-rubrics" in shown and "mmau-official" in shown
    (silent,) = (one for one in tree["spectrum"]["silence"] if one["title"].startswith("MMAR-Rubrics"))
    assert silent["cell"]["accuracy"]["value"] == 0
    page = tmp_path / "page.html"
    assert main(["report", str(run), *kept, "--with", "mmar-rubrics.model=wise", "--out", str(page)]) == 0
    assert "MMAR-Rubrics (wise)" in page.read_text() and "rubric score of right answers" in page.read_text()


def _asked(one: Prediction) -> tuple[str, str, str, str, list[str], str]:
    return one.id, one.question_type, one.format, one.question, one.choices, one.gold


BAD: dict[str, str] = {
    "no JSON list": "I would give it three points.",
    "empty": " ",
    "cut for its length": Cut('[{"name": "c0", "score": 1, "justifi'),
    "another number of criteria": grades([1, 1, 1, 1]),
    "an entry without name or score": grades(some(3)).replace('"score"', '"points"'),
    "a score that its criterion does not have": grades([1, 1, 1, 1, 2]),
}


def kind_of(said: str) -> str:
    """The kind of bad reply that the answer of row N gets: the Nth."""
    return list(BAD)[int(said.split("two thuds ")[1].split("\n")[0])]


def test_bad_replies_are_asked_again_and_counted(tmp_path: Path) -> None:
    """One kind for each question: every first reply of a rater."""
    server, judge = judging(lambda said, number: BAD[kind_of(said)] if number < 5 else grades(some(4)))
    rubrics(tmp_path / "list.jsonl", rows=len(BAD))
    rows = [row(number) for number in range(len(BAD))]
    with server as url:
        found = scorer(url, tmp_path)
        found.prepare(rows)
        scores = [score for entry in rows if (score := found.score(entry))]
    assert [score.value for score in scores] == pytest.approx([0.8] * len(BAD)) and not found.problems
    assert set(judge["times"].values()) == {10}
    figures = found.aggregate(rows, scores)
    assert {name: figures[f"replies of the judge: {name}"] for name in BAD} == dict.fromkeys(BAD, 5)
    assert figures["rated by fewer than 5"] == 0


def test_a_judge_that_is_never_understood_gives_no_figure(tmp_path: Path) -> None:
    server, judge = judging(lambda said, number: BAD[kind_of(said)])
    rubrics(tmp_path / "list.jsonl", rows=len(BAD))
    rows = [row(number) for number in range(len(BAD))]
    with server as url:
        for _ in range(2):  # a bad reply is not asked for twice either
            found = scorer(url, tmp_path, tries="3")
            found.prepare(rows)
            assert [found.score(entry) for entry in rows] == [None] * len(BAD)
            assert set(judge["times"].values()) == {15} and len(judge["times"]) == len(BAD)
            told = [found.problems[entry.key] for entry in rows]
            assert told == [f"no reply of the judge could be read: 15 x {why}" for why in BAD]


@pytest.mark.parametrize(("readable", "expected"), [(3, 0.8), (2, 0.6)])
def test_fewer_than_five_raters_are_told(tmp_path: Path, readable: int, expected: float) -> None:
    """Of three the middle one counts, of two the plain mean."""
    server, _ = judging(lambda said, number: grades(some([1, 5, 4][number])) if number < readable else "no")
    with server as url:
        found = scorer(url, tmp_path, tries="1")
        found.prepare([row(0)])
        score = found.score(row(0))
    assert score is not None and score.value == pytest.approx(expected)
    figures = found.aggregate([row(0)], [score])
    assert figures["rated by fewer than 5"] == 1 and figures["replies of the judge: no JSON list"] == 5 - readable


def test_what_passes_by_itself_is_waited_for_and_a_refusal_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server, judge = judging(
        lambda said, number: 400 if "thuds 1" in said else [429, 503][number] if number < 2 else grades(some(5))
    )
    with server as url:
        found = scorer(url, tmp_path)
        found.prepare([row(0), row(1)])
        score = found.score(row(0))
        assert score is not None and score.value == 1 and found.score(row(1)) is None
        assert "the judge refuses: HTTP 400: by the script 400" in found.problems[row(1).key]
    assert sorted(judge["times"].values()) == [5, 7]


def test_a_judge_that_goes_away_leaves_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    rubrics(tmp_path / "list.jsonl", rows=20)
    rows = [row(number) for number in range(20)]
    served: Counter[str] = Counter()
    until = [33]

    def script(said: str, number: int) -> str | int:
        if sum(served.values()) >= until[0]:
            return 503
        served[said] += 1
        return grades(some(3))

    server, _ = judging(script)
    with server as url:
        with pytest.raises(AudioLLMError, match="/chat/completions: expected a reply in JSON, found HTTP 503"):
            scorer(url, tmp_path).prepare(rows)
        half = sum(served.values())
        assert 33 <= half < 100 and len((tmp_path / "kept.jsonl").read_text().splitlines()) == half
        until[0] = 1000
        found = scorer(url, tmp_path)
        found.prepare(rows)
        assert [score.value for entry in rows if (score := found.score(entry))] == pytest.approx([0.6] * 20)
    assert set(served.values()) == {5} and len(served) == 20


def test_a_killed_run_asks_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, listed = tmp_path / "run", rubrics(tmp_path / "list.jsonl", rows=40)
    with PredictionWriter(run / FILE_NAME) as writer:
        writer.write(row(number) for number in range(40))
    (run / MANIFEST_NAME).write_text(json.dumps({"benchmark": "mmar", "options": {}, "data": []}))
    kept = tmp_path / "kept.jsonl"
    offline = ["mmar-rubrics.model=wise", f"mmar-rubrics.cache={kept}", f"mmar-rubrics.rubrics={listed}"]
    assert main(["rescore", str(run), *(part for one in offline for part in ("--with", one))]) == 0
    shown = capsys.readouterr().out
    assert "40 answers have no score; the first, 'q0' by mmar-rubrics: no score: not judged yet" in shown
    assert "40 x no score: not judged yet" in shown
    server, judge = judging(lambda said, number: grades(some(4)), pause=0.05)
    with server as url:
        settings = [f"mmar-rubrics.{one}" for one in (f"url={url}", f"cache={kept}", f"rubrics={listed}")]
        command = ["rescore", str(run), *(part for one in settings for part in ("--with", one))]
        program = [sys.executable, "-c", "import sys; from audio_llm.cli import main; sys.exit(main(sys.argv[1:]))"]
        process = subprocess.Popen([*program, *command], stderr=subprocess.DEVNULL, cwd=ROOT, env=os.environ)
        try:
            until = time.monotonic() + 60
            while len(judge["seen"]) < 60 and time.monotonic() < until and process.poll() is None:
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.2)  # requests that were in flight
        there, before = len(kept.read_text().splitlines()), len(judge["seen"])
        assert 40 < there <= before < 200
        assert main(command) == 0
        assert len(judge["seen"]) - before == 200 - there
    shown = capsys.readouterr().out
    assert re.search(r"mmar-rubrics +80\.0 \[", shown) and "have no score" not in shown


def test_the_list_of_rubrics_is_checked_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    def settings(**more: str) -> dict[str, dict[str, str]]:
        return {"mmar-rubrics": {"model": "wise", "cache": str(tmp_path / "none"), **more}}

    def refused(match: str, **more: str) -> None:
        with pytest.raises(AudioLLMError, match=match):
            get_scorers(["mmar-rubrics"], settings(**more))

    listed = rubrics(tmp_path / "list.jsonl")
    refused(r"expected rubrics, found none\. Name MMAR's own list of questions: mmar-rubrics\.rubrics=")
    refused("did you mean 'rubrics'", rubric=str(listed))
    refused(
        "expected a data file, found no such file.*did you mean 'list.jsonl'", rubrics=str(tmp_path / "lists.jsonl")
    )
    refused("tries: expected a number from 1 to 999, found '0'", rubrics=str(listed), tries="0")
    refused("rows with 'rubric'.*found 4 rows without", rubrics=str(rubrics(tmp_path / "a.jsonl", rubric=None)))
    for number, (odd, why) in enumerate(
        {
            "many": "'rubric': expected a list",
            1: r"rubric\[1\]: expected an object",
            "name": r"rubric\[0\]: expected a value of 'name'",
            "scoring_point": r"rubric\[0\]: expected a value of 'scoring_point'",
            "choices": r"rubric\[0\]: 'choices': expected scores, the best above 0",
        }.items()
    ):
        told: Any = odd if odd == "many" else [CRITERIA[0], odd] if odd == 1 else [{**CRITERIA[0], odd: None}]
        refused(why, rubrics=str(rubrics(tmp_path / f"b{number}.jsonl", rubric=told)))
    (tmp_path / "c.jsonl").write_text(listed.read_text() * 2)
    refused("'id': expected every id once", rubrics=str(tmp_path / "c.jsonl"))
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    del lines[0]["rubric"]
    lines[1]["answer"] = "Two."
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = get_scorers(["mmar-rubrics"], settings(rubrics=str(listed)))
    assert isinstance(found, MMARRubrics)
    assert [found.score(row(number)) for number in (0, 1, 2, 9)] == [None] * 4
    told = [found.problems[row(number).key] for number in (0, 1, 2, 9)]
    assert told[0].endswith("list.jsonl has none for it") and told[3].endswith("has no such id")
    assert "'Two.' for the right answer, the run 'Two'" in told[1] and told[2] == "not judged yet"
    assert SCORERS["mmar-rubrics"].score(row(0)) is None, "without settings it does not apply"


def test_reasoning_is_that_of_a_submission(tmp_path: Path) -> None:
    declared = config.load(Declaration, ROOT / "eval" / "benchmarks" / "mmar.yaml")
    assert declared.submission["rubrics"].longest == LONGEST
    server, judge = judging(lambda said, number: grades(some(5)))
    with server as url:
        found = scorer(url, tmp_path)
        long = row(0, thought="x" * 12_000)
        bare = row(1)
        bare.raw = "Two"
        found.prepare(rows := [long, bare])
        scores = [score for entry in rows if (score := found.score(entry))]
    texts = sorted((body["messages"][1]["content"] for body in judge["seen"]), key=len)
    assert texts[-1].count("x" * LONGEST) == 1 and "x" * (LONGEST + 1) not in texts[-1]
    assert texts[0].endswith("Reasoning to grade:\n\nThe answer is: Two")
    figures = found.aggregate(rows, scores)
    assert figures["right answers without reasoning"] == 1 and figures[f"reasoning cut at {LONGEST} characters"] == 1


@given(
    st.lists(st.sampled_from([0, 1, 0.5]), min_size=5, max_size=5),
    st.text(alphabet="ab c.\n{}\"'", max_size=30),
    st.booleans(),
)
def test_a_list_among_words_is_read(points: list[float], words: str, named: bool) -> None:
    rubric = Rubric("Two", "", tuple(Criterion(f"c{n}", "r", (0, 1, 0.5)) for n in range(5)))
    listed = [{"name": f"c{n}" if named else "?", "score": point} for n, point in enumerate(points)]
    share, why = read_grades(Said(words + json.dumps(listed) + words), rubric)
    assert share == pytest.approx(float(sum(map(Fraction, points)) / 5)) and why == ""
    for odd in ("1", True, None, float("nan"), -1, 7):
        assert read_grades(Said(json.dumps([{**listed[0], "score": odd}, *listed[1:]])), rubric)[0] is None
