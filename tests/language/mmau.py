"""The 1,000 questions of MMAU test-mini, on which forms of replies are tried: each on another quarter, or on all."""

from __future__ import annotations

import json
from functools import cache
from string import ascii_uppercase
from zlib import crc32

import pytest

from audio_llm.language.replies import normalise
from tests.paths import SHARED

PATH = "data/mmau/mmau-test-mini.json"
Question = tuple[list[str], int, int]
of_a_quarter_or_all = pytest.mark.parametrize("of", ["a quarter", pytest.param("all", marks=pytest.mark.slow)])


@cache
def questions() -> tuple[Question, ...]:
    """Choices, place of the gold answer and of a wrong one."""
    found = []
    for item in json.loads((SHARED / PATH).read_text()):
        gold = item["choices"].index(item["answer"])
        wrong = next(i for i, choice in enumerate(item["choices"]) if normalise(choice) != normalise(item["answer"]))
        found.append((item["choices"], gold, wrong))
    return tuple(found)


def asked(form: str, of: str) -> tuple[Question, ...]:
    """The questions that `form` is tried on."""
    return questions() if of == "all" else questions()[crc32(form.encode()) % 4 :: 4]


def filled(form: str, choices: list[str], gold: int, wrong: int) -> str:
    """`form` with the gold text for {g} and a wrong one for {w}, and their letters for {G} and {W}."""
    letters = {"G": ascii_uppercase[gold], "W": ascii_uppercase[wrong]}
    return form.format(g=choices[gold], w=choices[wrong], **letters)
