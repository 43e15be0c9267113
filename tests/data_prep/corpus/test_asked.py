"""What code alone finds wrong with a generated question, against a table of 80 made by hand: 40 good, 40 bad."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audio_llm.shards.schema import Sample
from data_prep.corpus import facts
from data_prep.corpus.asked import REASONS, Asked, Rules, fault, shuffled

LINES = (Path(__file__).parents[2] / "data" / "corpus" / "questions.jsonl").read_text().splitlines()
TABLE = [json.loads(line) for line in LINES]
RULES = Rules(thinking_words=(5, 120), elements="nine", evidence=True)
HEARD = [{"id": "f0", "kind": "label", "value": "dog"}]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['reason'] or 'good'}-{row['question'][:20]}")
def test_each_of_the_80_is_kept_or_rejected_for_its_reason(row: dict[str, Any]) -> None:
    reason, detail = fault(row, RULES, facts.read(row.get("facts", HEARD)))
    assert reason == row["reason"], detail
    assert bool(reason) == bool(detail)


CHOICE = {"form": "choice", "question": "Which of these is heard first?"}


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (["a dog", "the dog", "a cat"], "equal_options"),
        (["an air-conditioner", "air conditioner", "a tap"], "equal_options"),
        (["A", "B", "C"], ""),  # notes
        (["A minor", "C major"], ""),
        (
            ["a rooster", "a large flock of birds that takes off", "an old engine on a wooden bridge"],
            "answer_stands_out",
        ),
        (["yes", "no, it gets louder"], ""),
        (["a brown dog", "a cat"], "visual"),
        (["a black bear", "a brown bear"], "visual"),  # a listener knows the bear, not its coat
        (["white noise", "pink noise", "brown noise"], ""),
        (["a blue jay", "a red fox", "a black-capped chickadee"], ""),
    ],
)
def test_options_that_no_listener_tells_apart_or_that_give_the_answer_away(choices: list[str], reason: str) -> None:
    assert fault(CHOICE | {"choices": choices, "answer": choices[0]}, Rules())[0] == reason


@pytest.mark.parametrize("said", ["From the facts provided, it barks.", "Based on the facts, it barks."])
def test_thinking_that_speaks_of_what_it_was_given(said: str) -> None:
    asked = {"form": "open", "question": "What is heard?", "answer": "a dog", "thinking": said}
    assert fault(asked, Rules())[0] == "banned_phrase"


def test_the_article_of_the_thinking_is_no_note() -> None:
    asked = CHOICE | {"choices": ["A", "B", "C"], "answer": "C", "thinking": "I hear a tone. It has a bright colour."}
    assert fault(asked, Rules(visual=False)) == ("", "")
    assert fault(asked | {"thinking": "I hear a tone, so it is the note A."}, Rules())[0] == "thinking_elsewhere"


def test_the_table_has_forty_of_each_and_every_reason() -> None:
    counts = Counter(row["reason"] for row in TABLE)
    assert counts[""] == 40 and len(TABLE) == 80 and set(counts) == {"", *REASONS}


def test_good_questions_are_samples() -> None:
    for number, row in enumerate(TABLE):
        asked = Asked.read(row)
        if row["reason"] == "" and isinstance(asked, Asked):
            keys = ("question", "choices", "answer", "thinking", "semantic_elements")
            Sample(id=f"q-{number}", task="choice", **{key: getattr(asked, key) for key in keys}).validate()


def test_each_place_of_the_answer_is_as_likely_and_the_order_is_the_seeds() -> None:
    asked = Asked("choice", "Which?", "DOG.", ["dog", "cat", "cow", "frog"])
    drawn = [shuffled(asked, 0, f"item-{n}") for n in range(4000)]
    assert all(one.answer == "dog" and sorted(one.choices) == sorted(asked.choices) for one in drawn)
    places = Counter(one.choices.index("dog") for one in drawn)
    assert all(abs(count - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for count in places.values())
    assert shuffled(asked, 0, "item-7") == drawn[7] != shuffled(asked, 1, "item-7")


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = ("form", "question", "answer", "choices", "thinking", "semantic_elements", "skill", "evidence")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), st.one_of(VALUES, st.sampled_from(["choice", "What is it?"]))))
def test_whatever_a_model_writes_has_a_reason_or_is_good(tree: dict[str, Any]) -> None:
    reason, _ = fault(tree, RULES)
    assert reason in ("", *REASONS)
