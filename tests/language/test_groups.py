"""The nine groups of semantic elements: what they are called, printed, and read in the published shards' one text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_llm.language.groups import ELEMENT_GROUPS, GROUPS, REASONING, group_of, in_order, read_elements, unified
from audio_llm.language.prompts import target_text
from audio_llm.language.replies import read_reply

# The two sets of nine that were published: those of the captions, and those of the questions.
CAPTIONS = (
    "Sound-generating animated beings with descriptive adjectives",
    "Physical objects/substances generating sound",
    "Actions/mechanisms of sound generation",
    "Temporal context (when)",
    "Spatial context and environment",
    "Acoustic surfaces and materials",
    "Signal-level descriptors independent of source",
    "Auditory sensation attributes",
    "Subjective/emotional, non-auditory descriptors",
)
QUESTIONS = (
    *("Entities", "Objects", "Actions", "Temporal relations", "Spatial relations", "Acoustic properties"),
    *("Signal descriptors", "Auditory attributes", "Reasoning relationships"),
)
PAPER = (
    *("Sound-Generating Agents", "Physical Sound Sources", "Sound Generation Mechanisms", "Temporal Context"),
    *("Spatial Context", "Acoustic Surfaces", "Signal Descriptors", "Auditory Attributes", "Non-auditory Sensation"),
)
BULLETS = [["Musicians (playing grandly, and well)"], ["Oboes: two", "Drums"], ["blowing"], ["slow"], ["a hall"]]
BULLETS += [["wood"], ["broad band"], ["warm"], ["epic"]]
NUMBERED = "\n".join(
    f"{n}. {name}:\n" + "\n".join(f" - {word}" for word in words)
    for n, (name, words) in enumerate(zip(CAPTIONS, BULLETS, strict=True), 1)
)


@dataclass
class Item:
    semantic_elements: dict[str, Any]
    question: str = "What is heard?"
    choices: list[str] = field(default_factory=list)
    answer: str = "A dog"
    thinking: str | None = "Short barks."


@pytest.mark.parametrize("names", [CAPTIONS, PAPER, ELEMENT_GROUPS])
def test_each_of_the_published_names_is_its_group(names: tuple[str, ...]) -> None:
    assert tuple(group_of(name, loose=True) for name in names) == ELEMENT_GROUPS


def test_the_questions_have_another_ninth_group() -> None:
    found = tuple(group_of(name) for name in QUESTIONS)
    assert found == (*ELEMENT_GROUPS[:8], REASONING.name) and REASONING.name not in ELEMENT_GROUPS


def test_no_name_is_of_two_groups() -> None:
    names = [name for group in (*GROUPS, REASONING) for name in (group.name, *group.names)]
    assert len(names) == len(set(names)) and all(group_of(name) for name in names)
    for group in (*GROUPS, REASONING):
        assert group_of(group.name, loose=True) == group.name and re.search(group.words, group.name)


@pytest.mark.parametrize("name", ["agenda", "what I like", "dog", "", "signalling", "somewhere"])
def test_a_group_of_somebodys_own_stays_theirs(name: str) -> None:
    assert group_of(name, loose=True) is None


@pytest.mark.parametrize("change", [str, lambda text: text.replace("\n", " "), lambda text: text.replace("\n", "\\n")])
def test_the_published_text_is_read_with_or_without_its_line_breaks(change) -> None:
    found = read_elements(change(NUMBERED))
    assert list(found.items()) == list(zip(ELEMENT_GROUPS, BULLETS, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("who: a dog; how: it barks", {"who": "a dog", "how": "it barks"}),
        ("who: a dog; a man\nmood: glad", {"who": ["a dog", "a man"], "mood": "glad"}),
        ("- **Entities**: a dog\n- **Objects**: a ball", {"Entities": "a dog", "Objects": "a ball"}),
        (
            "Entities: a dog. Actions: barking, then running. Reasoning relationships: it plays.",
            {"Entities": "a dog.", "Actions": "barking, then running.", "Reasoning relationships": "it plays."},
        ),
        ("1. Who: a dog 2. How: barking", {ELEMENT_GROUPS[0]: "a dog", ELEMENT_GROUPS[2]: "barking"}),
        ("A dog barks at 3. It is glad: it wags.", {"description": "A dog barks at 3. It is glad: it wags."}),
        ("a dog barks", {"description": "a dog barks"}),
        (" \n; ", {}),
        ("", {}),
    ],
)
def test_elements_are_read_in_every_form(text: str, expected: dict[str, Any]) -> None:
    assert read_elements(text) == expected


def test_two_names_of_a_group_become_one_under_the_papers_name() -> None:
    found = unified({"mood": "glad", "Objects": "a ball", "Entities": ["a dog"], "who": "a man"})
    expected = {ELEMENT_GROUPS[0]: ["a dog", "a man"], ELEMENT_GROUPS[1]: "a ball", "mood": "glad"}
    assert list(found.items()) == list(expected.items())


def test_all_nine_are_printed_in_order_and_read_back() -> None:
    elements = {name: f"words {n}, more" for n, name in enumerate(ELEMENT_GROUPS)}
    backwards = dict(reversed(elements.items()))
    reply = read_reply(target_text(Item(backwards), "think_semantics"))
    assert reply.semantic_elements is not None
    assert list(read_elements(reply.semantic_elements).items()) == list(elements.items()) == in_order(backwards)


WORDS = st.text(alphabet="abc de,()", min_size=1, max_size=12).filter(lambda text: text == text.strip(" -*"))


@given(st.dictionaries(st.sampled_from([*QUESTIONS, "mood", "who"]), WORDS.filter(bool), max_size=6))
def test_what_is_printed_is_what_is_read(elements: dict[str, str]) -> None:
    reply = read_reply(target_text(Item(elements), "think_semantics"))
    assert read_elements(reply.semantic_elements or "") == elements


@given(st.text(alphabet="who: 12.-;\n*•(a)", max_size=60))
def test_reading_never_fails(text: str) -> None:
    for name, words in read_elements(text).items():
        assert name.strip() and (isinstance(words, str) or all(isinstance(word, str) for word in words))
