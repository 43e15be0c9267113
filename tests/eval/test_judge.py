"""The judge: asked once, kept on disk, read strictly, and no score where it talks nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.errors import AudioLLMError, ConfigError
from eval.predictions import Prediction
from eval.scorers import SCORERS, Scorer, get_scorers
from eval.scorers.judge import BINARY, GRADED, read_rating
from tests.servers import ChatServer, serving


class JudgeServer(ChatServer):
    """A judge that rates by how many words of the reference it sees in the answer, or says `says`."""

    served = "wise"
    asked: list[dict]
    says = ""

    def chat(self, body: dict) -> None:
        self.asked.append(body)
        text = body["messages"][0]["content"]
        reference, answer = (text.split(f"\n{name}:\n")[1].split("\n\n")[0].split() for name in ("Reference", "Answer"))
        if answer == ["refuse"]:
            return self.reply(400, {"error": {"message": "no such thing"}})
        rating = round(5 * len(set(answer) & set(reference)) / len(reference))
        return self.answer(self.says or f"They share words.\nRating: {rating}")


@contextmanager
def judge_server(says: str = "") -> Iterator[tuple[str, list[dict]]]:
    asked: list[dict] = []
    with serving(JudgeServer, asked=asked, says=says) as url:
        yield url, asked


def row(number: int, raw: str, gold: str = "rain on roof") -> Prediction:
    return Prediction(f"x{number}", "question", "audiobench", "What is heard?", [], gold, raw=raw)


def judge(name: str = "judge", **settings: str) -> Scorer:
    return get_scorers([name], {name: settings} if settings else None)[0]


ROWS = [
    row(0, "<think>hail? no</think><answer>rain on roof</answer>"),
    row(1, "rain"),
    row(2, "hail"),
    row(3, "<think>rain on roof"),
    row(4, "<answer></answer>"),
]


def test_answers_are_rated_once_and_kept(tmp_path: Path) -> None:
    cache = str(tmp_path / "deep" / "judge.jsonl")
    with judge_server() as (url, asked):
        scorer = judge(url=url, cache=cache)
        scorer.prepare(ROWS)  # type: ignore[attr-defined]
        scores = [scorer.score(entry) for entry in ROWS]
        assert [score and score.value for score in scores] == [1.0, 0.4, 0.0, 0.0, 0.0]
        assert [score and score.parsed for score in scores] == [True, True, True, False, False]
        assert "rated 2 of 5 by wise" in str(scores[1])
        assert len(asked) == 3, "nobody is asked about an answer that is not there"
        assert all(body["temperature"] == 0 and "hail? no" not in str(body) for body in asked)
        again = judge(url=url, cache=cache)
        again.prepare(ROWS)  # type: ignore[attr-defined]
        assert [again.score(entry) for entry in ROWS] == scores and len(asked) == 3
    alone = judge(model="wise", cache=cache)  # the judge is gone
    assert [alone.score(entry) for entry in ROWS] == scores
    assert alone.score(row(5, "thunder")) is None
    assert list(alone.problems.values()) == ["not judged yet"]  # type: ignore[attr-defined]
    assert judge(model="other", cache=cache).score(ROWS[0]) is None


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("I would give it a four.", "no line 'Rating: N'"),
        ("Rating: 4\nRating: 5", "2 ratings"),
        ("Rating: 4\nThat is my view.", "words after one"),
        ("Well.\nRating: 6", "'6' is none of 0 to 5"),
        ("Well.\nRating: 4.5", "'4.5' is none"),
        ("Well.\nRating: five", "'five' is none"),
        ("Well.\nRating: 4/5", "'4/5' is none"),
    ],
)
def test_nonsense_is_no_score_with_its_reason(tmp_path: Path, says: str, why: str) -> None:
    with judge_server(says) as (url, asked):
        scorer = judge(url=url, cache=str(tmp_path / "c.jsonl"))
        scorer.prepare(ROWS[:3])  # type: ignore[attr-defined]
        assert [scorer.score(entry) for entry in ROWS[:3]] == [None] * 3
        problems = scorer.problems  # type: ignore[attr-defined]
        assert set(problems) == {entry.key for entry in ROWS[:3]} and all(why in text for text in problems.values())
        assert len(asked) == 3
        assert scorer.score(ROWS[4]) is not None


def test_a_refusal_is_that_rows_alone_and_a_dead_judge_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    cache = str(tmp_path / "c.jsonl")
    with judge_server() as (url, asked):
        scorer = judge(url=url, cache=cache)
        rows = [row(0, "rain"), row(1, "refuse"), row(2, "roof"), row(4, "refuse")]
        scorer.prepare(rows)  # type: ignore[attr-defined]
        assert [scorer.score(entry) is not None for entry in rows] == [True, False, True, False]
        assert len(asked) == 3, "who refuses is not asked again, not by another table and not for an equal answer"
        assert "no such thing" in scorer.problems[rows[1].key]  # type: ignore[attr-defined]
    with pytest.raises(AudioLLMError, match="/chat/completions: expected a reply"):
        scorer.prepare([row(3, "thunder")])  # type: ignore[attr-defined]
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 2, "what it said before is kept"


def test_nobody_is_asked_where_replies_cannot_be_kept_or_no_model_is_served(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with judge_server() as (url, asked):
        for cache in (tmp_path, tmp_path / "file" / "c.jsonl"):
            with pytest.raises(OSError):
                judge(url=url, cache=str(cache))
        assert not asked
    nameless = serving(JudgeServer, do_GET=lambda self: self.reply(200, {"data": []}))
    with nameless as url, pytest.raises(ConfigError, match=r"a served model, found none .* judge\.model=NAME"):
        judge(url=url)


def test_several_references_stand_in_one_question(tmp_path: Path) -> None:
    entry = row(0, "drops")
    entry.meta["references"] = ["drops fall"]
    with judge_server() as (url, asked):
        judge(url=url, cache=str(tmp_path / "c.jsonl")).score(entry)
    assert "Reference:\nrain on roof\ndrops fall\n" in asked[0]["messages"][0]["content"]


def test_without_settings_it_does_not_apply_and_wrong_ones_are_named() -> None:
    assert [SCORERS["judge"].score(entry) for entry in ROWS] == [None] * 5
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        judge(modle="x")
    with pytest.raises(ConfigError, match="expected url"):
        judge(cache="x")


@given(st.integers(0, 5), st.text(alphabet="abc .:\n*", max_size=40))
def test_a_rating_on_a_line_of_its_own_is_read(rating: int, before: str) -> None:
    assert read_rating(f"{before}\nRating: {rating}\n", GRADED.best) == (rating, "")
    assert read_rating(f"{before}\n**Rating: {rating}**", GRADED.best) == (rating, "")
    assert (read_rating(f"{before}\nrating:  {rating}", BINARY.best)[0] is None) == (rating > 1)


def test_report_and_compare_judge_from_kept_replies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the judge said once is in the page and decides between runs, with nobody there to ask."""
    from audio_llm.cli import main
    from eval.predictions import FILE_NAME, MANIFEST_NAME, PredictionWriter

    runs = [tmp_path / name for name in ("before", "after")]
    for run, raws in zip(runs, (("rain", "hail", "hail"), ("rain on roof", "rain", "")), strict=True):
        with PredictionWriter(run / FILE_NAME) as writer:
            writer.write(row(number, raw) for number, raw in enumerate(raws))
        manifest = {"benchmark": "audiobench", "scorer": {"name": "audiobench"}, "data": [], "options": {}}
        (run / MANIFEST_NAME).write_text(json.dumps(manifest))
    paths, kept = [str(run) for run in runs], ["--with", f"judge.cache={tmp_path / 'c.jsonl'}"]
    compare, report = ["compare", *paths, "--scorer", "judge"], ["report", *paths, "--out", str(tmp_path / "page.html")]
    assert main(compare) == 2
    assert "Set it up: --with judge.KEY=VALUE" in capsys.readouterr().err
    offline = [*kept, "--with", "judge.model=wise"]
    assert main([*compare, *offline]) == 2
    assert "not judged yet" in capsys.readouterr().err
    with judge_server() as (url, asked):
        assert main([*compare, *kept, "--with", f"judge.url={url}"]) == 0
        assert len(asked) == 3, "an answer that both runs give is judged once, an empty one never"
    first = capsys.readouterr().out
    assert main([*compare, *offline]) == 0
    assert capsys.readouterr().out == first and "scorer judge 1" in first and "difference" in first
    assert main([*report, *offline]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Judge, 0 to 5 (wise)" in page and "Judge, right or wrong" not in page and "no score" not in page
    assert main([*report, *offline, "--with", "judge.modle=x"]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err
    assert main(["compare", *paths, *offline]) == 2
    assert "Add --scorer judge." in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text("".join((tmp_path / "c.jsonl").read_text().splitlines(keepends=True)[:2]))
    assert main([*report, *offline]) == 0
    assert "answers have no score; the first" in (tmp_path / "page.html").read_text()


def test_rescoring_shows_what_has_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from audio_llm.cli import main
    from eval.predictions import FILE_NAME, PredictionWriter

    with PredictionWriter(tmp_path / "run" / FILE_NAME) as writer:
        writer.write(ROWS)
    settings = ["--with", f"judge.cache={tmp_path / 'c.jsonl'}", "--scorers", "string-contains,judge"]
    with judge_server("maybe") as (url, asked):
        assert main(["rescore", str(tmp_path / "run"), *settings, "--with", f"judge.url={url}"]) == 0
    assert len(asked) == 3
    shown = capsys.readouterr().out
    assert "3 answers have no score; the first, 'x0' by judge: no score: no line 'Rating: N'" in shown
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines if line["scorer"] == "judge"].count(None) == 3
