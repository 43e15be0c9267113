"""Rewards pay what scorers score: both have the same reading of every reply."""

from __future__ import annotations

import pytest

from audio_llm.language.quantities import read_distance
from audio_llm.training import rewards
from eval.predictions import Prediction
from eval.scorers import SCORERS
from tests.language.test_prompts import DOGS, RESOLVED

OPEN = {
    "labels": ["car; vehicle", "Vehicle; car", "car", "car, vehicle", "no car", ""],
    "yes_no": ["Yes", "yes, it is", "Yes, it is not further", "not yes", "no, yes is wrong", "yes and no", "No."],
    "distance": ["2m", "2.5 metres", "80 cm", "2 m, 2 metres", "not 2m", "-2m", "1-2m", "between 1m and 3m", "far"],
    "direction": ["left", "left, not right", "overhead", "up", "neither left nor right", "left or right", "?"],
}  # fmt: skip
GOLD = {"labels": "car; vehicle", "yes_no": "Yes", "distance": "2m", "direction": "left"}


def both(reward, text: str, gold: str, choices: list[str], kind: str = "free", **options):
    """What a reward pays for a reply, and the score that the default scorer gives it."""
    columns = {"answer": [gold], "choices": [choices or None]}
    row = Prediction("a", kind, "mmau", "?", choices, gold, text)
    return reward(["?"], [text], **columns, **options)[0], SCORERS["option-resolution"].score(row)


@pytest.mark.parametrize("text", [text for text, _ in RESOLVED])
@pytest.mark.parametrize("gold", DOGS)
def test_options(text: str, gold: str) -> None:
    paid, score = both(rewards.answer_accuracy, text, gold, DOGS)
    assert paid == score.value


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind in ("labels", "yes_no") for text in OPEN[kind]])
def test_words(kind: str, text: str) -> None:
    paid, score = both(rewards.answer_accuracy, text, GOLD[kind], [])
    assert paid == score.value


@pytest.mark.parametrize("text", OPEN["distance"])
def test_distances(text: str) -> None:
    paid, score = both(rewards.distance, f"<answer>{text}</answer>", "2m", [], zero_at=4.0)
    assert paid == (1 - abs(read_distance(score.answer) - 2) / 4 if score.parsed else 0.0)


@pytest.mark.parametrize("text", OPEN["direction"])
def test_directions(text: str) -> None:
    paid, score = both(rewards.direction, text, "left", [])
    assert paid == (both(rewards.direction, score.answer, "left", [])[0] if score.parsed else 0.0)
