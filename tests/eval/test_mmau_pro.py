"""MMAU-Pro: rows of its layout with every defect that is told of them, its three rules against transcriptions of what
their script does, the total, the table that is handed in."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.audio import decode
from audio_llm.cli import main
from audio_llm.errors import ConfigError
from eval.benchmarks import get_benchmark, open_benchmark
from eval.benchmarks.base import Collection
from eval.benchmarks.declared import LeftOut
from eval.embedders import CharacterNgrams
from eval.predictions import FILE_NAME, MANIFEST_NAME, Prediction, PredictionWriter
from eval.scorers import SCORERS, Scorer, get_scorers
from eval.scorers.instructions import CHECKS, count_sentences
from eval.scorers.mmau_pro import read_grades
from tests.eval.test_declared import answer, by_id, noise
from tests.servers import ChatServer, serving

pyarrow = pytest.importorskip("pyarrow")
ARGUMENTS = ("N", "N1", "N2", "keyword", "keywords", "forbidden_words", "section_splitter", "postscript_marker")
ARGUMENTS += ("start_phrase", "end_phrase")


@pytest.fixture
def mmau_pro(tmp_path: Path) -> Path:
    """Thirty rows of all categories: several clips, open questions with and without choices, instructions known and
    unknown and without their arguments, one choice alone, an answer that is none of them, eleven choices, lists as
    texts, a sound that is missing."""
    rows: list[dict[str, Any]] = []
    for number in range(30):
        row = {"id": f"p{number}", "audio_path": [f"data/{number}.wav"], "question": "Which is it?"}
        row |= {"choices": ["dog", "cat", "cow"], "answer": "cat", "category": "sound", "length_type": "short"}
        row |= {"perceptual_skills": '["Loudness"]' if number == 9 else "", "reasoning_skills": "[]", "sub-cat": "x"}
        rows.append(row | {"task_identifier": None, "kwargs": None})
    for number in (0, 1, 2):
        rows[number] |= {"category": "multi", "audio_path": [f"data/{number}.wav", "data/7.wav"]}
    rows[3] |= {"audio_path": ["data/3.wav", "data/4.wav", "data/5.wav"], "category": "music"}  # not only in multi
    rows[4] |= {"category": "open", "choices": [], "answer": "A dog barks at a cat."}
    rows[5] |= {"category": "open"}  # open, though it has choices
    told = {"category": "instruction following", "choices": [], "answer": None}
    rows[6] |= told | {"task_identifier": "Title"}
    rows[7] |= {"choices": ["dog"], "answer": "dog"}
    rows[8] |= {"choices": []}
    rows[10] |= {"answer": "horse"}
    rows[11] |= {"choices": [f"sound {one}" for one in range(11)], "answer": "sound 10", "category": "voice_chat"}
    rows[12] |= told | {"task_identifier": "Number Bullets", "kwargs": {"N": 2}}
    rows[13] |= told | {"task_identifier": "Number Bullets"}  # without its number
    rows[14] |= told | {"task_identifier": "Number Rhymes", "kwargs": {"N": 2}}
    rows[15] |= told | {"task_identifier": "No Commas", "audio_path": ["data/15.wav", "data/16.wav"]}
    for row in rows:  # a struct of Parquet has all its fields in every row
        row["kwargs"] = {name: (row["kwargs"] or {}).get(name) for name in ARGUMENTS}
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    noise(*(tmp_path / "data" / f"{number}.wav" for number in range(29)))
    return tmp_path


def test_its_closed_part_is_asked_and_the_rest_counted(mmau_pro: Path) -> None:
    found = open_benchmark("mmau_pro", mmau_pro)
    assert found.left_out == {LeftOut.SEVERAL: 4, LeftOut.OTHER_PART: 7, LeftOut.NO_CHOICES: 2}
    assert (len(found.items), found.total) == (17, 30)
    assert found.counts.pop("answer is none of the options") == found.counts.pop("audio missing") == 1
    assert found.counts == {"a list written as a text": 17}
    assert set(found.errors) == {"p10", "p29"}
    items = by_id(found)
    assert items["p9"].meta["perceptual_skills"] == ["Loudness"] and items["p16"].meta["perceptual_skills"] == []
    assert (len(items["p11"].choices), items["p11"].gold, items["p11"].clip) == (11, "sound 10", "data/11.wav")
    first = open_benchmark("mmau_pro", mmau_pro, several="first")
    assert first.counts["several recordings, of which the first is heard"] == 4
    assert len(first.items) == 21 and by_id(first)["p3"].clip == "data/3.wav"
    every = open_benchmark("mmau_pro", mmau_pro, several="all")
    assert len(every.items) == 21 and "several recordings, of which the first is heard" not in every.counts
    asked = by_id(every)
    assert [asked[f"p{number}"].audios for number in (0, 3, 9)] == [2, 3, 1]
    assert (asked["p3"].clip, asked["p9"].clip) == ("data/3.wav+data/4.wav+data/5.wav", "data/9.wav")
    place = every.items.index(asked["p3"])
    heard = [wave.samples for wave in every.waveforms(place)]
    stored = [decode(mmau_pro / "data" / f"{number}.wav").samples for number in (3, 4, 5)]
    assert all(np.array_equal(one, other) for one, other in zip(heard, stored, strict=True))
    (mmau_pro / "data" / "5.wav").unlink()
    assert "its audio data/5.wav under" in open_benchmark("mmau_pro", mmau_pro, several="all").errors["p3"]
    with pytest.raises(ConfigError, match="option several: expected skip, first, all"):
        open_benchmark("mmau_pro", mmau_pro, several="join")


def whole(folder: Path) -> Collection:
    return open_benchmark("mmau_pro", folder, several="all", open="ask")


def test_open_questions_and_instructions_are_asked_without_choices(mmau_pro: Path) -> None:
    found = whole(mmau_pro)
    assert found.left_out == {LeftOut.NO_CHOICES: 2} and len(found.items) == 28
    assert found.counts["an instruction without its N"] == 1
    assert found.counts["an unknown kind of instruction, 'Number Rhymes'"] == 1
    assert "answer hidden" not in found.counts
    items = by_id(found)
    assert [items[name].choices for name in ("p4", "p5", "p6")] == [[], [], []]
    assert items["p5"].gold == "cat" and items["p5"].meta["choices"] == ["dog", "cat", "cow"]
    assert items["p15"].audios == 2 and items["p12"].meta["kwargs"]["N"] == 2
    with pytest.raises(ConfigError, match="option open: expected skip, ask, found 'yes'"):
        open_benchmark("mmau_pro", mmau_pro, open="yes")
    # No rule of another benchmark speaks of open answers: "cat" is no label of SpatialSoundQA's.
    said = answer(items["p5"], "cat")
    applied = [name for name in get_benchmark("mmau_pro").scorers if SCORERS[name].score(said) is not None]
    assert applied == []


def test_what_is_handed_in_is_the_table_that_the_script_reads(mmau_pro: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = [answer(item, "<think>well</think>cat, * a\n* b") for item in whole(mmau_pro).items]
    (path,) = get_benchmark("mmau_pro").submission(rows, tmp_path)
    assert path.name == "submission.parquet"
    table, given = parquet.read_table(path).to_pylist(), parquet.read_table(mmau_pro / "test.parquet").to_pylist()
    original = {row["id"]: row for row in given}
    assert len(table) == 28
    for row in table:
        for key in ("category", "question", "choices", "task_identifier", "kwargs", "audio_path"):
            assert row[key] == original[row["id"]][key], key
        if row["id"] not in ("p10",):
            assert row["answer"] == original[row["id"]]["answer"]
    said = {row["id"]: row["model_output"] for row in table}
    assert said["p9"] == "cat" and said["p12"] == "cat, * a\n* b"  # the option, or the words as they were said
    with pytest.raises(ConfigError, match="option form: expected model_output"):
        get_benchmark("mmau_pro").submission(rows, tmp_path, form="jsonl")


# ------------------------------------------------------------------------------------------------ instructions


def instruction(kind: str | None, raw: str, kwargs: Any = None, question: str = "Say it.") -> Prediction:
    meta = {"task_identifier": kind, "kwargs": kwargs, "references": []}
    return Prediction("x", "instruction following", "mmau_pro", question, [], "", raw=raw, meta=meta)


# For each kind: its arguments, a reply that holds to them, one that does not.
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "Include Keywords": ({"keywords": "rain, roof"}, "Rainfall on the ROOF", "rain on it"),
    "Forbidden Words": ({"forbidden_words": "rain, roof"}, "hail on it", "a Roofer"),
    "Keyword Frequency": ({"keyword": "rain", "N": 2}, "Rain, rain. Rainfall.", "rain"),
    "Number Paragraphs": ({"N": 2}, "one\n***\ntwo\n***\n ", "one\n\ntwo"),
    "Number Words (at least)": ({"N": 3}, "one two three", "one two"),
    "Number Words (at most)": ({"N": 3.0}, "one two three", "one two three four"),
    "Number Words (range)": ({"N1": 2, "N2": 3}, "one two", "one"),
    "Number Sentences (at least)": ({"N": 2}, "It rains. Dr. Who hears it!", "It rains at Dr. Who's."),
    "Number Sentences (at most)": ({"N": 1}, "At 3.5 m it rains.", "It rains. It does?"),
    "Number Sentences (range)": ({"N1": 1, "N2": 2}, "It rains. Yes", "One. Two. Three."),
    "Number Bullets": ({"N": 2}, "Here:\n* one\n  * two", "* one * two"),
    "Minimum Number Highlighted Section": ({"N": 2}, "*a* and *b* and *c*", "*a* and b"),
    "Number Placeholder": ({"N": 2}, "[name] of [place]", "[name] of []"),
    "Multiple Sections": ({"N": 2, "section_splitter": "§ (1)"}, "§ (1) one § (1) two", "§ (2) one § (2) two"),
    "Title": ({}, "<<Rain>> It rains.", "<Rain> It rains."),
    "Postscript": ({"postscript_marker": "P.S."}, "It rains. p s: bring a coat", "It rains"),
    "Start Checker": ({"start_phrase": "To begin,"}, "to begin: it rains", "It rains, to begin"),
    "End Checker": ({"end_phrase": "That is all."}, "It rains. That is ALL!", "That is all. It rains"),
    "Two Responses": ({}, "rain ****** hail", "rain ****** Rain "),
    "Repeat Prompt": ({}, " say it. It rains", "It rains. Say it."),
    "All Uppercase": ({}, "IT RAINS 2 M AWAY.", "IT rains"),
    "All Lowercase": ({}, "it rains", "It rains"),
    "All-capital Words (at least)": ({"N": 2}, "LOUD RAIN here", "LOUD rain"),
    "All-capital Words (at most)": ({"N": 1}, "LOUD rain", "LOUD RAIN"),
    "All-capital Words (range)": ({"N1": 1, "N2": 2}, "LOUD rain", "rain"),
    "Quotation": ({}, ' "It rains" ', '"It rains'),
    "No Commas": ({}, "It rains; it pours", "It rains, it pours"),
}
RULES = SCORERS["mmau-pro-rules"]


def test_every_kind_of_instruction_has_replies_that_hold_and_that_do_not() -> None:
    assert set(KINDS) == set(CHECKS) and len(CHECKS) == 27
    for kind, (kwargs, held, broken) in KINDS.items():
        filled = {name: kwargs.get(name) for name in ARGUMENTS}
        scores = [RULES.score(instruction(kind, raw, filled)) for raw in (held, broken, f"<think>x</think>{held}")]
        assert [score and score.value for score in scores] == [1.0, 0.0, 1.0], kind
        needed = [name for name in CHECKS[kind][0] if name != "question"]
        for name in needed:
            row = instruction(kind, held, filled | {name: None})
            assert RULES.score(row) is None and RULES.problems[row.key] == f"an instruction without its {name}"
    assert RULES.score(instruction("Title", "<<a>>", None, "")) is not None  # it needs nothing
    assert RULES.score(instruction(None, "x")) is None


def bullets(text: str) -> int:
    """Asterisks first in their line, with white space behind, which takes the next line's beginning along."""
    place = count = 0
    while place < len(text):
        at = place
        if place == 0 or text[place] == "\n":
            while at < len(text) and text[at].isspace():
                at += 1
            if text[at : at + 1] == "*" and text[at + 1 : at + 2].isspace():
                at += 1
                while at < len(text) and text[at].isspace():
                    at += 1
                count, place = count + 1, at
                continue
        place += 1
    return count


def transcribed(kind: str, text: str, told: dict[str, Any]) -> bool:
    """What the script does for the kinds that count, in other words."""
    count = {
        "Number Paragraphs": lambda: len([part for part in re.split(r"\*\*\*", text) if part.split()]),
        "Number Words (at least)": lambda: len(text.split()),
        "Number Bullets": lambda: bullets(text),
        "Minimum Number Highlighted Section": lambda: len(re.findall(r"\*([^*]+)\*", text)),
        "Number Placeholder": lambda: sum(1 for _ in re.finditer(r"\[([^\]]+)\]", text)),
        "All-capital Words (at most)": lambda: sum(one == one.upper() != one.lower() for one in text.split()),
        "Keyword Frequency": lambda: len(re.findall(r"(?<!\w)rain(?!\w)", text, re.I)),
    }[kind]()
    least = "at least" in kind or kind.startswith("Minimum") or kind == "Number Placeholder"
    return count >= told["N"] if least else count <= told["N"] if "at most" in kind else count == told["N"]


def test_the_kinds_that_count_agree_with_a_transcription() -> None:
    draw = random.Random(4)
    pieces = ["rain", "Rain", "RAIN", " ", "\n", "* ", "*", "***", "[a]", "[", "]", "a.", "B", "rainy", "2"]
    kinds = ["Number Paragraphs", "Number Words (at least)", "Number Bullets", "Minimum Number Highlighted Section"]
    kinds += ["Number Placeholder", "All-capital Words (at most)", "Keyword Frequency"]
    for _ in range(20_000):
        kind, text = draw.choice(kinds), "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 12))).strip()
        told = {"N": draw.randrange(4), "keyword": "rain"}
        score = RULES.score(instruction(kind, text, told))
        assert score is not None and score.value == transcribed(kind, text, told), (kind, text, told)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("one", 1),
        ("One. Two", 2),
        ('"Yes?" she said. No!', 3),
        ("e.g. rain. J. Doe left.", 2),
        ("Hm... so", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


# --------------------------------------------------------------------------------------------- nearest option

CHOICES = ["a dog barking", "a cat", "rain on a roof", "a dog"]


def closed(raw: str, gold: str = "a dog", choices: list[str] = CHOICES) -> Prediction:
    return Prediction("c", "sound", "mmau_pro", "Which?", choices, gold, raw=raw)


@given(st.text("adogcti rn", max_size=30), st.sampled_from(CHOICES))
def test_the_nearest_option_is_that_of_the_highest_cosine(raw: str, gold: str) -> None:
    score = SCORERS["mmau-pro-embedding"].score(closed(raw, gold))
    vectors = CharacterNgrams()([*CHOICES, closed(raw).reply().answer])
    with np.errstate(invalid="ignore"):
        cosines = [one @ vectors[-1] for one in vectors[:-1]]
    best = [choice for choice, value in zip(CHOICES, cosines, strict=True) if value >= max(cosines) - 1e-9]
    assert score is not None and score.value == best.count(gold) / len(best)


def test_embedders_by_name_and_questions_that_have_no_nearest_option(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(json.dumps({"x": [1, 0], "y": [0, 1], "said": [0.1, 0.9]}))
    settings = {"mmau-pro-embedding": {"embedder": str(tmp_path / "given.json")}}
    (rule,) = get_scorers(["mmau-pro-embedding"], settings)
    row = closed("<think>x</think>said", "y", ["x", "y"])
    rule.prepare([row])  # type: ignore[attr-defined]
    assert rule.title == "Nearest option by table given.json" and (score := rule.score(row)) and score.value == 1
    with pytest.raises(ConfigError, match="expected a vector for 'other'"):
        rule.score(closed("other", "y", ["x", "y"]))
    silent = SCORERS["mmau-pro-embedding"].score(closed(""))
    assert silent is not None and silent.value == 0.25 and silent.parsed  # near to all of them alike
    assert SCORERS["mmau-pro-embedding"].score(closed("a dog", "a horse")) is None
    assert SCORERS["mmau-pro-embedding"].score(closed("a dog", "a dog", ["a dog"])) is None
    for settings, says in (({"embedder": "nowhere"}, "'characters' or a folder"), ({"embeder": "x"}, "did you mean")):
        with pytest.raises(ConfigError, match=says):
            get_scorers(["mmau-pro-embedding"], {"mmau-pro-embedding": settings})


# ------------------------------------------------------------------------------------------- four grades, total


def graded(*grades: float, overall: float = 4) -> str:
    names = ("CORRECTNESS", "RELEVANCE", "COMPLETENESS", "CLARITY")
    return "\n".join([f"{name}: {grade:g} - so" for name, grade in zip(names, grades, strict=True)]) + (
        f"\n\nOVERALL: {overall:g} - so"
    )


@pytest.mark.parametrize(
    ("says", "grade"),
    [
        (graded(5, 4, 3, 4), 4),
        (graded(1, 1, 1, 5, overall=3), 2),  # an overall grade of exactly 3 is the mean of the four
        (graded(1, 1, 1, 5, overall=3.5), 3.5),
        ("**CORRECTNESS**: 5\n" + graded(5, 5, 5, 5, overall=5).split("\n", 1)[1], 5),
        (graded(5, 4, 3, 6), None),
        (graded(5, 4, 3.5, 4), None),
        (graded(5, 4, 3, 4, overall=0), None),
        (graded(5, 4, 3, 4) + "\nOVERALL: 5", None),
        (graded(5, 4, 3, 4).replace("RELEVANCE", "REVERENCE"), None),
        ("4", None),
        ("", None),
    ],
)
def test_grades_are_read_strictly(says: str, grade: float | None) -> None:
    found, why = read_grades(says)
    assert found == grade and bool(why) is (grade is None)


class Grader(ChatServer):
    """Gives the grade of `grades` by the reference, or says it is no number."""

    served = "wise"
    asked: list[dict]

    def chat(self, body: dict) -> None:
        self.asked.append(body)
        text = body["messages"][0]["content"]
        bad = "shy" in text.split("Answer:\n")[1]
        self.answer("I would rather not." if bad else graded(2, 2, 4, 4, overall=3 if "A dog barks" in text else 5))


@pytest.fixture
def run(mmau_pro: Path) -> Iterator[Path]:
    """A run over all that can be asked: closed questions answered with words near to an option, open ones in words."""
    folder = mmau_pro / "run"
    said = {"sound": "it is a cat", "multi": "dog", "music": "(B) cat", "voice_chat": "sound 10", "open": "A dog."}
    found = whole(mmau_pro)
    with PredictionWriter(folder / FILE_NAME) as writer:
        for item in found.items:
            raw = said.get(item.question_type, "* one <<Title>>\n* two")
            why = found.errors.get(item.id, "")
            writer.write([answer(item, "" if why else raw, error=why)])
    options = {"several": "all", "open": "ask"}
    manifest = {"benchmark": "mmau_pro", "options": options, "data": [str(mmau_pro / "test.parquet")]}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    yield folder


def test_the_total_weighs_every_category_by_its_questions(run: Path, tmp_path: Path, capsys) -> None:
    cache, asked = tmp_path / "kept.jsonl", list[dict]()
    with serving(Grader, asked=asked) as url:
        settings = [f"mmau-pro-official.url={url}", f"mmau-pro-official.cache={cache}"]
        command = ["rescore", str(run), *(part for one in settings for part in ("--with", one))]
        assert main(command) == 0
        first = capsys.readouterr().out
        assert len(asked) == 2  # the open questions, once each
        assert all("cow" not in str(body) for body in asked)
    assert "open, graded by wise, of 1" in first and "nan" not in first
    entries = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    entries = [one for one in entries if one["scorer"] == "mmau-pro-official" and one["value"] is not None]
    value = {entry["id"]: entry["value"] for entry in entries}
    # Of 21 closed ones p10 has no gold option and p29 no sound; of five instructions two cannot be checked.
    by_category = {
        "sound": [1.0] * (len(value) - 5 - 2 - 3),
        "multi": [0.0] * 3,
        "music": [1.0],
        "voice_chat": [1.0],
        "open": [3 / 5, 5 / 5],  # p4: overall 3 is the mean of 2, 2, 4, 4
        "instruction following": [1.0, 1.0, 1.0],  # a title, two bullets, no comma
    }
    total = sum(sum(values) for values in by_category.values()) / len(value)
    assert len(value) == 24 and f"{100 * total:.1f} [" in first
    figures = dict(re.findall(r"^      (\S.*?) +([0-9.]+)(?: \[.*)?$", first, re.M))
    assert float(figures["total, weighted by questions"]) == pytest.approx(total, abs=1e-4)
    assert figures["open, graded by wise, of 1"] == "0.8000" and figures["category multi"] == "0.0000"
    assert figures["instruction following, by checks"] == "1.0000"
    assert "4 answers have no score; the first, 'p13' by mmau-pro-rules" in first  # two, by two scorers
    # Kept replies are enough the next time; without a judge there is no total.
    assert main(["rescore", str(run), "--with", "mmau-pro-official.model=wise", "--with", settings[1]]) == 0
    assert "total, weighted" in capsys.readouterr().out
    assert main(["rescore", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "accuracy by character n-grams 3-5" in shown and "total, weighted" not in shown


def test_a_judge_that_will_not_grade_gives_no_score(tmp_path: Path) -> None:
    rows = [Prediction(f"o{n}", "open", "mmau_pro", "What?", [], "rain", raw=raw) for n, raw in enumerate(("shy", ""))]
    with serving(Grader, asked=[]) as url:
        settings = {"mmau-pro-judge": {"url": url, "cache": str(tmp_path / "kept.jsonl")}}
        judge: Scorer
        (judge,) = get_scorers(["mmau-pro-judge"], settings)
        judge.prepare(rows)  # type: ignore[attr-defined]
        assert judge.score(rows[0]) is None
        assert list(judge.problems.values()) == ["no lines 'CORRECTNESS: number' in the judge's reply"]  # type: ignore[attr-defined]
        empty = judge.score(rows[1])
    assert empty is not None and (empty.value, empty.parsed) == (0.2, False)
    with pytest.raises(ConfigError, match="url .or the model"):
        get_scorers(["mmau-pro-judge"], {"mmau-pro-judge": {"cache": "x"}})
