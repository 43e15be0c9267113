"""Prompts and replies: what is written can be read back, nothing is guessed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.language.prompts import STYLES, TURN_MARKERS, chat_template, conversation, question_text, target_text
from audio_llm.language.replies import normalise, read_key, read_letter, read_reply, resolve_option, strip_letters
from tests.language.mmau import PATH, asked, filled, of_a_quarter_or_all, questions

DOGS = ["A cat meowing", "A dog barking", "A dog growling", "Rain"]


RESOLVED = [
    ("A dog barking", 1),
    ("a dog barking.", 1),
    ("B", 1),
    ("b", 1),
    ("(B)", 1),
    ("Option B", 1),
    ("The answer is B.", 1),
    ("B. A dog barking", 1),
    ("**B) A dog barking**", 1),
    ("The sound is a dog barking.", 1),
    ("It is a dog barking, not a cat meowing.", 1),
    ("<think>Could be rain, but no.</think><answer>A dog barking</answer>", 1),
    ("Answer: (D) Rain", 3),
    ("A dog growling", 2),
    ("(B) rain", None),  # letter and text contradict
    ("B. Rain", None),
    ("not a dog barking", None),
    ("It is not rain.", None),
    ("rain or a dog barking", None),
    ("(A) dog", None),
    ("E", None),
    ("(E) a dog barking", None),  # no such option, whatever the words say
    ("E. A dog barking", None),
    ("[E] a dog barking", None),
    ("Answer: E, a dog barking", None),
    ("I hear a dog barking", 1),
    ("I, for one, hear a dog barking", 1),
    ("i.e. a dog barking", 1),
    ("The dog(s): a dog barking", 1),
    ("", None),
    ("<think>First, I listen to the rain", None),  # cut before an answer
    ("<answer>Rain</answer><answer>A dog barking</answer>", None),
    ("<answer>Rain</answer><answer>(D)</answer>", 3),
    ("A and B", None),
]


@dataclass
class Item:
    question: str = "Which sound is heard?"
    choices: list[str] = field(default_factory=lambda: list(DOGS))
    answer: str | None = "A dog barking"
    thinking: str | None = "Short barks."
    semantic_elements: dict[str, Any] | None = field(default_factory=lambda: {"who": ["dog"], "how": "barks"})


@pytest.mark.parametrize(("text", "expected"), RESOLVED)
def test_replies_resolve_to_the_option_they_name(text: str, expected: int | None) -> None:
    assert read_reply(text, DOGS).choice == expected


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("the horn of a car", ("car", "car horn"), "car horn"),
        ("It is the horn of an old car.", ("car", "car horn"), "car horn"),
        ("a car's horn", ("car", "car horn"), "car horn"),
        ("The horns of cars", ("truck horn", "car horn"), "car horn"),
        ("the barking of a dog", ("dog", "dog barking", "rain"), "dog barking"),
        ("a dog barking", ("rain", "barking of a dog"), "barking of a dog"),
        ("the ringing of church bells", ("church bell", "church bell ringing"), "church bell ringing"),
        ("the horn of a car", ("car", "dog"), "car"),  # as "a car horn" is: only one of them has to do with a car
        ("the sound of a car", ("car", "car horn"), "car"),
        ("not the horn of a car", ("car", "car horn"), None),
        ("the horn of a car", ("car", "horn"), None),
        ("a horn of a car or truck", ("car horn", "truck horn"), None),
        ("a fusion of jazz and hip-hop", ("jazz fusion", "rock"), None),
        ("The car left", ("left of the car", "right of the car"), None),
        ("horn. Of a car", ("car horn", "dog"), None),
    ],
)
def test_a_genitive_names_the_whole_thing(text: str, choices: tuple[str, ...], expected: str | None) -> None:
    choice = read_reply(text, choices).choice
    assert (None if choice is None else choices[choice]) == expected


def test_keys_and_initials_are_texts_before_they_are_labels() -> None:
    assert resolve_option("C", ["G", "D", "E", "C"]).index == 3
    assert resolve_option("B", ["A major", "B minor"]).index == 1
    assert resolve_option("F# minor", ["F minor", "F# minor"]).index == 1
    assert resolve_option("No", ["Yes", "No"]).index == 1
    assert resolve_option("twenty-one", ["twenty", "twenty-one"]).index == 1


@pytest.mark.parametrize("label", ["(E)", "[e]", "E)", "E.", "**E:**", "The answer is (E)", "Option E:"])
def test_a_label_beyond_the_options_is_no_answer(label: str) -> None:
    found = resolve_option(f"{label} dog barking", ["rain", "dog barking", "siren", "bell"])
    assert found.index is None and found.problem == "letter E beyond the 4 options"


RIGHT = [  # {g} the gold text, {G} its letter
    *(
        "{g}",
        "{g}.",
        "{G}. {g}",
        "{G}. {g}.",
        "({G}) {g}",
        "[{G}] {g}",
        "{G}: {g}",
        "{G} - {g}",
        "**{G}**: {g}",
        "({G})",
    ),
    *("Option {G}", "<answer>{g}</answer>", "<answer>({G}) {g}</answer>", "<answer>({G})</answer>", '"{g}"', "**{g}**"),
    *("The answer is {g}", "The answer is {g}.", "Answer: {g}", "The correct option is {G}: {g}", "{G} {g}"),
    *("<think>It could be {w}.</think>\n<answer>{g}</answer>", "The answer is ({G}) {g}."),
]
WRONG = [  # {w} a wrong option, {W} its letter
    *("", "<answer></answer>", "{w}", "({W})", "({G}) {w}", "({W}) {g}", "{W}. {g}", "The answer is {W}: {g}"),
    *("not {g}", "Not {g}.", "It is not {g}", "It isn't {g}.", "<answer>not {g}</answer>", "not ({G}) {g}", "not {G}"),
    *(
        "anything but {g}",
        "{g} is not the answer",
        "{g} is incorrect.",
        "neither {g} nor {w}",
        "The answer is not {g}.",
    ),
    *("({G}) is not correct", "({G}) is not the answer", "Not ({G}).", "Never ({G})", "Not option {G}", "NOT {g}"),
    *("Neither ({G}) nor ({W})", "neither {g}, {w} nor anything", "none of {g}, {w}", "I doubt it is {g}", "{g}? No."),
    *("I don't think it is {g}", "wrong answer: {g}", "not the sound of {g}", "not likely to be {g}"),
    *("The {g} cannot be heard", "{g} can be ruled out", "{g} does not fit", "{g} (no)", "{g}, which is wrong"),
    *("The answer isn't ({G})", "({G}) {g} is not correct", "{G}. {g} is wrong", "({G})? No.", "Is it {g}? Not {g}."),
    *("{g} or {w}", "{g}; {w}", "{g}\n{w}", "(Z) {g}", "<answer>{g}</answer><answer>{w}</answer>", "<think>{g}"),
]


@of_a_quarter_or_all
@pytest.mark.shared(PATH)
@pytest.mark.parametrize("form", [*RIGHT, "upper", "lower"])
def test_every_way_of_giving_the_right_answer_counts_on_mmau(form: str, of: str) -> None:
    for choices, gold, wrong in asked(form, of):
        plain = form in ("upper", "lower")
        text = getattr(choices[gold], form)() if plain else filled(form, choices, gold, wrong)
        choice = read_reply(text, choices).choice
        assert choice is not None and choices[choice] == choices[gold], (text, choices)


@pytest.mark.shared(PATH)
@pytest.mark.parametrize("form", ["{G}", "{G}.", "<answer>{G}</answer>"])
def test_a_bare_letter_is_a_label_unless_it_is_itself_an_option(form: str) -> None:
    """Where "C" is both the label of the third option and the text of another one, the text is meant."""
    both = 0
    for choices, gold, wrong in questions():
        letter = ascii_uppercase[gold]
        choice = read_reply(filled(form, choices, gold, wrong), choices).choice
        own = [place for place, option in enumerate(choices) if normalise(option) == letter.casefold()]
        assert choice is not None and choices[choice] == choices[own[0] if own else gold], (letter, choices)
        both += bool(own) and choices[own[0]] != choices[gold]
    assert both == 2


@of_a_quarter_or_all
@pytest.mark.shared(PATH)
@pytest.mark.parametrize("form", ["{G}", "{G}.", "({G})", "<answer>{G}</answer>", "Answer: {G}", "{G}. {g}", "{g}"])
def test_where_letters_were_asked_for_every_letter_is_one_on_mmau(form: str, of: str) -> None:
    for choices, gold, wrong in asked(form, of):
        if form == "{g}" and len(normalise(choices[gold])) == 1:
            continue  # asked for its letter, a chord named "C" is answered by its letter
        choice = read_reply(filled(form, choices, gold, wrong), choices, "letter").choice
        assert choice is not None and choices[choice] == choices[gold], choices


def test_a_letter_beyond_the_labels_is_an_option_text_even_where_letters_were_asked_for() -> None:
    chords = ["G", "D", "E", "C"]
    assert resolve_option("E", chords, "letter").index == 2
    assert resolve_option("C", chords, "letter").index == 2 and resolve_option("C", chords).index == 3
    assert resolve_option("The answer is C.", chords, "letter").index == 2
    assert resolve_option("F", chords, "letter").problem == "letter F beyond the 4 options"


@of_a_quarter_or_all
@pytest.mark.shared(PATH)
@pytest.mark.parametrize("form", WRONG)
def test_contradictions_denials_and_silence_earn_nothing_on_mmau(form: str, of: str) -> None:
    for choices, gold, wrong in asked(form, of):
        text = filled(form, choices, gold, wrong)
        choice = read_reply(text, choices).choice
        assert choice is None or choices[choice] != choices[gold], (text, choices)


@of_a_quarter_or_all
@pytest.mark.shared(PATH)
@pytest.mark.parametrize(
    "form",
    [
        *("It is {g}, not {w}", "It is not {w}, it is {g}", "It is not {w} but {g}", "not {w}; {g}", "{g} without {w}"),
        *("{g} rather than {w}", "instead of {w}, I hear {g}", "I can't be sure, but {g}", "Nothing but {g}"),
        *("It is {g} because {w} cannot be heard", "It can't be {w}. It must be {g}.", "not {w}\nbut\n{g}"),
    ],
)
def test_what_a_denial_does_not_reach_is_an_answer_on_mmau(form: str, of: str) -> None:
    for choices, gold, wrong in asked(form, of):
        choice = read_reply(filled(form, choices, gold, wrong), choices).choice
        assert choice is not None and choices[choice] == choices[gold], (form, choices)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            ("not (B) but (C)", "C"),
            ("(B) rain is not heard", None),
            ("(B) dog. Wrong.", None),
            ("Neither (B) nor (C)", None),
        ),
        *(("(B) rain, not (C)", "B"), ("The answer isn't (B)", None), ("B. rain", "B")),
    ],
)
def test_letters_that_are_denied_are_none(text: str, letter: str | None) -> None:
    assert read_letter(text, ["dog", "rain", "wind"]) == letter
    assert resolve_option(text, ["dog", "rain", "wind"]).index in (
        None if letter is None else "ABC".index(letter),
        None,
    )


@pytest.mark.shared(PATH)
def test_options_that_are_single_letters_are_never_eaten() -> None:
    letters = 0
    for choices, _, _ in questions():
        for option in choices:
            if len(normalise(option)) == 1:
                for text in (option, f"<answer>{option}</answer>", f"The answer is {option}.", option.upper()):
                    choice = read_reply(text, choices).choice
                    assert choice is not None and normalise(choices[choice]) == normalise(option), (text, choices)
                letters += 1
    assert letters >= 30


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("(b) rain", "B"), ("B. A dog", "B"), ("The answer is B.", "B"), ("Option C", "C")),
        *(("A dog barking", None), ("I hear rain", None), ("", None), ("(A) or (B)", None), ("E minor", None)),
    ],
)
def test_letters_are_read_where_they_are_labels(text: str, letter: str | None) -> None:
    assert read_letter(text) == letter


def test_a_target_is_read_back_as_it_was_meant() -> None:
    for style in STYLES:
        reply = read_reply(target_text(Item(), style), DOGS)
        problem = "no answer tag" if style == "plain" else None  # a note: the words count as they are
        assert (reply.choice, reply.how, reply.problem) == (1, "text", problem)
        assert (reply.thinking is None) == (style in ("answer", "plain"))
        assert (reply.semantic_elements is None) == (style != "think_semantics")


WORDS = st.text(alphabet="abcdefghij KLMNOP", min_size=3, max_size=20).map(normalise).filter(lambda text: len(text) > 2)


@given(st.lists(WORDS, min_size=2, max_size=6, unique=True), st.data())
def test_round_trip_of_any_choice(choices: list[str], data) -> None:
    gold = data.draw(st.integers(0, len(choices) - 1))
    item = Item(choices=choices, answer=choices[gold])
    assert read_reply(target_text(item, "think"), choices).choice == gold
    assert f"({ascii_uppercase[gold]}) {choices[gold]}" in question_text(item.question, choices)


@given(st.text(max_size=60), st.lists(st.text(max_size=10), max_size=5))
def test_reading_never_fails(text: str, choices: list[str]) -> None:
    choice = read_reply(text, choices).choice
    assert choice is None or 0 <= choice < len(choices)


@pytest.mark.parametrize("tag", ["think", "semantic_elements", "answer"])
def test_a_tag_repeated_for_ever_is_read_in_one_pass(tag: str) -> None:
    started = time.process_time()
    assert read_reply(f"<{tag}>" * 50_000).problem  # minutes, where every tag is searched to the end
    assert time.process_time() - started < 5


@pytest.mark.parametrize("marker", list(TURN_MARKERS))
def test_template_removes_a_typed_placeholder_and_opens_the_turn(marker: str) -> None:
    from jinja2 import Environment

    template = Environment().from_string(chat_template(marker))
    messages = conversation(Item(question="Is <|audio|> this?"), audios=2)
    prompt = template.render(messages=messages, add_generation_prompt=True)
    assert prompt.count("<|audio|>") == 2
    full = template.render(messages=conversation(Item(question="Is <|audio|> this?"), audios=2, style="think"))
    assert full.startswith(prompt), "the prompt must be a prefix of prompt and reply, or the loss mask is wrong"


@pytest.mark.parametrize(
    ("said", "index", "note"),
    [
        ("A. C major", 0, ""),
        ("C major", 0, ""),
        ("(B) a", 1, ""),
        ("a", 1, ""),  # the text of the second choice, not the letter of the first
        ("C", 2, "letter alone"),
        ("c) THE sea .", 2, "punctuation"),
        ("D", None, "none of the options"),
        ("A. a", None, "none of the options"),
        ("A, B, C", None, "none of the options"),
        ("C major and a", None, "none of the options"),
    ],
)
def test_answer_keys(said: str, index: int | None, note: str) -> None:
    found, why = read_key(said, ("C major", "a", "the sea"))
    assert found == index
    assert (note in why) if note else why == ""


@given(st.lists(st.text("abc xyz", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=6, unique=True))
def test_letters_come_off_and_go_on_again(texts: list[str]) -> None:
    lettered = [f"{chr(65 + place)}. {text}" for place, text in enumerate(texts)]
    assert strip_letters(lettered) == tuple(texts)
    assert [read_key(option, texts)[0] for option in lettered] == list(range(len(texts)))
    assert strip_letters(lettered[::-1]) == tuple(lettered[::-1])
