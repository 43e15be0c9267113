"""Several replies to one question: pass@k, the most frequent answer, and the correction for many groups."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.cli import main
from eval.figures.runs import Run, load, scorers_for
from eval.figures.several import majority, pass_at, several
from eval.predictions import Prediction, PredictionWriter

CHOICES = ["dog", "rain", "horn"]


def row(item: str, reply: str, sample: int = 0, gold: str = "dog", kind: str = "identity") -> Prediction:
    return Prediction(
        item, kind, "mmau", "What is it?", CHOICES, gold, reply, temperature=1.0, sample=sample, seed=sample, clip=item
    )


def scored(rows: list[Prediction]):
    return Run("run", rows, scorers_for("", "option-resolution")).scored("sampled")


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_a_mean_over_all_draws(n: int, data) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    replies = [True] * right + [False] * (n - right)
    draws = [any(draw) for draw in itertools.combinations(replies, k)]
    assert pass_at(n, right, k) == pytest.approx(np.mean(draws), abs=1e-12)


@pytest.mark.parametrize(
    ("replies", "value"),
    [
        (["dog", "Dog.", "rain"], 1.0),  # one answer in two spellings
        (["rain", "rain", "dog"], 0.0),
        (["rain", "dog"], 0.5),  # as often: what drawing one of them gives
        (["rain", "dog", "horn", "no idea"], 1 / 3),
        (["no idea", "no idea", "dog"], 1.0),  # what cannot be read has no vote
        (["no idea", "hm", ""], 0.0),
    ],
)
def test_the_answer_that_most_replies_give(replies, value) -> None:
    assert majority(scored([row("a", reply, n) for n, reply in enumerate(replies)])) == pytest.approx(value)


def test_figures_of_a_pass_and_what_they_leave_out() -> None:
    rows = [row("a", reply, n) for n, reply in enumerate(["dog", "dog", "rain", "dog"])]
    rows += [row("b", reply, n) for n, reply in enumerate(["rain", "rain", "dog", "rain"])]
    rows += [row("c", "dog", n) for n in range(3)]  # its fourth could not be asked
    found = several(scored(rows))
    assert found is not None and found.n == 4 and found.majority.n == 2
    assert {k: share.value for k, share in found.pass_at.items()} == {1: 0.5, 2: 0.75, 4: 1.0}
    assert found.majority.value == 0.5 and found.majority_adds.difference.value == 0.0
    assert several(scored([row("a", "dog"), row("b", "dog")])) is None


def test_tables_scores_and_page_name_them(tmp_path, capsys) -> None:
    for name, good in (("before", 3), ("after", 7)):
        folder = tmp_path / name
        with PredictionWriter(folder / "predictions.jsonl") as writer:
            for number in range(12):
                for sample in range(3):
                    right = (number + sample) % 10 < good
                    writer.write([row(str(number), "dog" if right else "rain", sample, kind=f"kind {number % 3}")])
        assert load(folder).summary.several is not None
    assert main(["rescore", str(tmp_path / "after")]) == 0
    told = capsys.readouterr().out
    assert "most frequent answer of 3" in told and "one of 2 replies right (pass@2)" in told
    tree = json.loads((tmp_path / "after" / "scores.json").read_text())
    assert set(tree["summary"]["several"]["pass_at"]) == {"1", "2", "3"}
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "after"), "--out", str(page)]) == 0 and "one of all right" in page.read_text()
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "before"), str(tmp_path / "after"), "--answers", "sampled"]) == 0
    head, *groups = [line for line in capsys.readouterr().out.splitlines() if ", p " in line]
    assert len(groups) == 3 and ", q " not in head
    p_values, q_values = (
        [float(line.split(f", {sign} ")[1].split(";")[0].split(",")[0]) for line in groups] for sign in "pq"
    )
    # Benjamini and Hochberg's rule by hand: p times the number of groups over its rank, never above a larger one's
    order = np.argsort(p_values)
    raised = np.array(p_values)[order] * len(groups) / np.arange(1, len(groups) + 1)
    by_hand = np.minimum.accumulate(raised[::-1])[::-1].clip(max=1)
    assert np.array(q_values)[order] == pytest.approx(by_hand, rel=0.06)  # both are printed with two digits
