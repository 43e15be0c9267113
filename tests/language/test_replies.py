"""Replies as people and models write them: the battery, what changes no verdict, and traps on MMAU's questions."""

from __future__ import annotations

import json
import time
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm.language.mentions import bare_options, offered
from audio_llm.language.parts import take_apart, unwrap
from audio_llm.language.quantities import quantities, read_text
from audio_llm.language.replies import holds, mentions, normalise, read_labels, read_reply, resolve_option
from tests.language.mmau import PATH, asked, filled, of_a_quarter_or_all
from tests.paths import SHARED
from tests.replies import PARTS, battery, read_as_gold


@pytest.mark.parametrize(
    ("part", "wrongly", "missed"), list(zip(PARTS, (0.01, 0.04, 0.02, 0.09), (0.02, 0.10, 0.05, 0.17), strict=True))
)
def test_wrong_replies_are_not_read_as_right_nor_right_ones_missed(part: str, wrongly: float, missed: float) -> None:
    """At most these shares of the wrong and of the right replies; the first part is held to 1 % and 10 % by design."""
    rows = battery(part)
    wrong = [row for row in rows if not row["right"]]
    right = [row for row in rows if row["right"]]
    taken = [(row["reply"], row["gold"]) for row in wrong if read_as_gold(row)]
    lost = [(row["reply"], row["gold"]) for row in right if not read_as_gold(row)]
    assert len(taken) <= wrongly * len(wrong), taken
    assert len(lost) <= missed * len(right), lost


def test_the_battery_is_broad_and_argued() -> None:
    rows = [row for part in PARTS for row in battery(part)]
    assert len(rows) >= 3000 and len(battery(PARTS[1])) >= 150
    assert {row["kind"] for row in rows} == {
        *("choice", "yes_no", "direction", "place", "distance", "time", "labels", "contains")
    }
    assert 0.4 < sum(row["right"] for row in rows) / len(rows) < 0.6
    keys = [(row["kind"], row["reply"], tuple(row["options"]), row["gold"]) for row in rows]
    assert len(set(keys)) == len(keys)


CHANGES = {
    "nfd": lambda text: unicodedata.normalize("NFD", text),
    "curly quotes": lambda text: text.replace("'", "\u2019"),
    "non-breaking hyphens": lambda text: text.replace("-", "\u2011"),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "zero-width": lambda text: text + "\u200b",
    "spaces around": lambda text: f"\n  {text}  \n",
    "full width digits": lambda text: "".join(chr(ord(c) + 0xFEE0) if c in "0123456789" else c for c in text),
}


@pytest.mark.parametrize("change", CHANGES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_writing_the_same_otherwise_changes_no_verdict(change: str, data: Any) -> None:
    row = data.draw(st.sampled_from(battery(PARTS[0])))
    assert read_as_gold(row, CHANGES[change](row["reply"])) == read_as_gold(row)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_reply_gives_one_option(data: Any) -> None:
    row = data.draw(st.sampled_from([row for row in battery(PARTS[0]) if row["kind"] == "choice"]))
    given_options = [gold for gold in row["options"] if read_as_gold({**row, "gold": gold})]
    assert len({normalise(option) for option in given_options}) <= 1


TRAPS = [  # of a gold text with a number or a hyphen in it: none of these is that text
    *("1{g}", "-{g}", "\u2212{g}", "9,{g}", "0.{g}", "{g}/8", "{g}5", "non-{g}", "{g}-like", "half-{g}", "{g}.5"),
    *(
        "{g}\u2013{w}",
        "up to {g}",
        "more than {g}",
        "{g} or {w}",
        "between {g} and {w}",
        "anti-{g}",
        "{w}-{g}",
        "x{g}y",
    ),
]


@pytest.mark.shared("data/mmau/mmau-test-mini.json")
@pytest.mark.parametrize("form", TRAPS)
def test_a_number_or_a_compound_is_not_found_inside_another_on_mmau(form: str) -> None:
    asked = 0
    for item in json.loads((SHARED / "data/mmau/mmau-test-mini.json").read_text()):
        gold, choices = item["answer"], item["choices"]
        if not (gold[0].isdigit() and gold[-1].isdigit() or ("-" in gold and " " not in gold)):
            continue
        numeric = gold[0].isdigit()
        if not numeric and form in (
            "0.{g}",
            "9,{g}",
            "1{g}",
            "-{g}",
            "\u2212{g}",
            "{g}/8",
            "{g}.5",
            "up to {g}",
            "more than {g}",
        ):
            continue  # marks in front of words change nothing
        if form in ("up to {g}", "more than {g}") and not quantities(read_text(gold)):
            continue  # "up to 1940s-1950s"
        wrong = next(choice for choice in choices if normalise(choice) != normalise(gold))
        text = form.format(g=gold, w=wrong)
        if text in choices or (form in ("-{g}", "\u2212{g}") and gold[0] == "0"):  # minus nought is nought
            continue
        choice = read_reply(text, choices).choice
        assert choice is None or choices[choice] != gold, (text, choices)
        asked += 1
    assert asked >= 20


SAYINGS = [  # {g} the gold text, {G} its letter
    *("It is {g}.", "It's {g}", "I think it is {g}.", "I would say {g}.", "I choose ({G}).", "I choose {g}."),
    *("My answer is {g}", "Final answer: {g}", "Final answer: ({G})", "({G}) is correct.", "Option {G} is correct."),
    *("\\boxed{{{g}}}", "\\boxed{{\\text{{{g}}}}}", '{{"answer": "{g}"}}', "**Answer:** {g}", "**{G}. {g}**", "`{g}`"),
    *("<think>Hm, {w}?</think>{g}", "<Answer>{g}</Answer>", "So the answer is {g}.", "Answer - {g}", "({G}): {g}"),
    *("It is not {w} but {g}.", "{w}? No, {g}.", "{g}, not {w}"),
]


@of_a_quarter_or_all
@pytest.mark.shared(PATH)
@pytest.mark.parametrize("form", SAYINGS)
def test_ordinary_ways_of_saying_the_gold_option_count_on_mmau(form: str, of: str) -> None:
    for choices, gold, wrong in asked(form, of):
        if (form.startswith("{{") and '"' in choices[gold]) or ("? No" in form and normalise(choices[wrong]) == "no"):
            continue
        text = filled(form, choices, gold, wrong)
        choice = read_reply(text, choices).choice
        assert choice is not None and choices[choice] == choices[gold], (text, choices)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("-5", ("#-5.0",)),
        ("\u22125", ("#-5.0",)),
        ("2-3", ("#2.0", "#3.0")),
        ("1,200", ("#1200.0",)),
        ("1,2", ("#1.2",)),
        ("10:30", ("#10:30",)),
        ("twenty-three", ("#23.0",)),
        ("one hundred and five", ("#105.0",)),
        ("2½", ("#2.5",)),
        ("2nd 3B MP3", ("2nd", "3b", "mp3")),
        ("B♭ Bb B-flat", ("b♭", "b♭", "b♭")),
        ("C♯ C# C sharp", ("c#", "c#", "c#")),
        ("the right one", ("the", "right", "one")),
    ],
)
def test_tokens(text: str, keys: tuple[str, ...]) -> None:
    assert read_text(text).keys == keys


@given(st.text(max_size=60))
@settings(deadline=None)
def test_reading_any_text_ends(text: str) -> None:
    read = read_text(text)
    assert all(0 <= token.start < token.end <= len(read.folded) for token in read.tokens)
    assert all(a.end <= b.start for a, b in zip(read.tokens, read.tokens[1:], strict=False))
    assert all(0 <= one.first < one.end <= len(read.tokens) for one in quantities(read))
    assert unwrap(text) and holds(text, "dog") in (True, False) and mentions(text, "dog") in (True, False)
    assert isinstance(read_labels(text, ["dog"]), frozenset)
    for options in (["Yes", "No"], ["1. a", "2. b"], ["a dog", "5 m", "-5 m", "C"], ["A. x", "B. y"]):
        found = resolve_option(text, options)
        assert (found.index is None) == (found.problem is not None)


@given(st.text("<>/think answer=[]\u25c1\u25b7 B", max_size=80))
@settings(deadline=None)
def test_taking_apart_never_answers_from_inside_unclosed_thinking(text: str) -> None:
    parts = take_apart(f"<think>{text}")
    if parts.open:
        assert not parts.answers and not parts.rest


@pytest.mark.parametrize(
    ("text", "answers", "is_open"),
    [
        ("<think>a</think><answer>b</answer>", ["b"], False),
        ("<answer>so a.</think>\n<answer>b</answer>", ["b"], False),  # what ends with </think> was thinking
        ("<think>a<answer>x</answer></think><answer>b</answer>", ["b"], False),
        ("<think>a <answer>b</answer>", ["b"], False),
        ("<think>a <answer>b", [], True),
        ("<THINKING>a</THINKING><Answer>b", ["b"], False),
        ("a</think>b", [], False),
        ("<answer>a</answer><answer>b</answer>", ["a", "b"], False),
    ],
)
def test_taking_apart(text: str, answers: list[str], is_open: bool) -> None:
    parts = take_apart(text)
    assert (parts.answers, parts.open) == (answers, is_open)
    assert parts.rest == ("b" if text == "a</think>b" else "")


def test_options_know_their_letters_articles_and_quantities() -> None:
    assert [option.text.folded for option in offered(("A. cat", "B. dog"))] == ["cat", "dog"]
    assert [option.number for option in offered(("1. cat", "2. dog"))] == [1, 2]
    assert offered(("a guitar", "a drum"))[0].keys == ("guitar",)
    assert offered(("A minor", "C minor"))[0].keys == ("a", "minor")
    assert offered(("2 m", "up to 2 m"))[0].quantity.value == 2.0
    assert offered(("hip-hop", "rock"))[0].compact == "hiphop"


@pytest.mark.parametrize("amount", ["{}.5 s", "{}.25", "{}:30", "{}:30:15", "{}.0 m", "{}.500 kHz"])
def test_a_point_or_colon_between_digits_is_no_label(amount: str) -> None:
    """Amounts whose whole parts happen to count 1, 2, 3, … are what is offered; only the whole of one names it."""
    options = [amount.format(number) for number in range(1, 5)]
    assert bare_options(options) == (tuple(options), False)
    for place, option in enumerate(options):
        assert resolve_option(option, options).index == place
    assert resolve_option(amount.format("").lstrip(".:"), options).index is None


@pytest.mark.parametrize("label", ["{}. ", "{}.", "{}) ", "{})", "({}) ", "[{}]", "{}: ", "{}:"])
@pytest.mark.parametrize("thing", ["a dog", "5 s"])
def test_numbered_options_are_told_by_what_follows_the_number(label: str, thing: str) -> None:
    options = [f"{label.format(number)}{thing}" for number in (1, 2)]
    amount = thing[0].isdigit() and label[-1] in ".:"  # "1.5 s"
    assert bare_options(options) == (tuple(options) if amount else (thing, thing), not amount)


@pytest.mark.parametrize(
    ("reply", "options", "meant"),
    [
        ("It is a C.", "A B C D", "C"),
        ("A bright tone, in the key of C", "A B C D", "C"),
        ("The note is an A", "A B C D", "A"),
        ("A\nThe tone is low.", "C A E G", "A"),
        ("I\nThe tonic sounds.", "V I IV", "I"),
        ("I think it is IV", "I IV V", "IV"),
        ("the vowel a is sung", "a e i o", "a"),
        ("I think the vowel is o", "a e i o", "o"),
        ("I can hear a bottle", "can bottle", "bottle"),
        ("It can be a can", "can bottle", "can"),
        ("It may be June", "May June", "June"),
        ("It may well be May", "May June", "May"),
        ("The accent tells us: UK", "US UK", "UK"),
        ("The accent of the us", "US UK", "US"),
        ("I am sure it is C", "Am C", "C"),
        ("It is HR", "IT HR", "HR"),
        ("They bark at one another, two of them", "one two three", "two"),
        ("No one speaks, so the answer is three", "one two three", "three"),
    ],
)
def test_articles_pronouns_and_verbs_are_no_options_of_the_same_letters(reply: str, options: str, meant: str) -> None:
    choices = options.split()
    assert resolve_option(reply, choices).index == choices.index(meant)


@pytest.mark.parametrize(
    "text", ["(" * 20_000 + "B", "\\boxed{" * 5_000, "not " * 20_000 + "rain", "1-" * 10_000, "{" * 9_000 + "}"]
)
def test_endless_repetition_is_read_in_a_moment(text: str) -> None:
    started = time.process_time()
    read_reply(text, ["rain", "dog", "2 m", "B"])
    assert time.process_time() - started < 5
