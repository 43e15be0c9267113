"""Rewards pay what scorers score: both have the same reading of every reply of the battery."""

from __future__ import annotations

from typing import Any

import pytest

from audio_llm.language.directions import great_circle, read_direction
from audio_llm.language.quantities import read_distance
from audio_llm.training import rewards
from eval.scorers import SCORERS
from tests.replies import PARTS, battery, prediction

KINDS = ("choice", "yes_no", "labels", "distance", "direction", "place")


def rows(kind: str) -> list[dict[str, Any]]:
    return [row for part in PARTS for row in battery(part) if row["kind"] == kind]


def paid(reward: rewards.RewardFunction, row: dict[str, Any], **options: Any) -> float | None:
    columns = {"answer": [row["gold"]], "choices": [row["options"] or None]}
    return reward(["?"], [row["reply"]], **columns, **options)[0]


@pytest.mark.parametrize("kind", ["choice", "yes_no", "labels"])
def test_accuracy_is_paid_where_it_is_scored(kind: str) -> None:
    assert len(rows(kind)) >= 50
    for row in rows(kind):
        score = SCORERS["option-resolution"].score(prediction(row))
        assert score is not None and paid(rewards.answer_accuracy, row) == score.value, row


@pytest.mark.parametrize("kind", ["distance", "place"])
def test_a_distance_is_paid_by_the_value_that_is_scored(kind: str) -> None:
    """The reward at half a metre off is 0.5 where `zero_at` is one metre: the scorer's tolerance."""
    for row in rows(kind):
        score = SCORERS["spatial-sound-qa"].score(prediction(row))
        reward, truth = paid(rewards.distance, row, zero_at=1.0), read_distance(row["gold"])
        assert score is not None and reward is not None and truth is not None
        right = score.parts["distance"] if kind == "place" else score.value
        assert (reward >= 0.5 - 1e-9) == (right == 1.0), row
        if kind == "distance":
            said = read_distance(score.answer) if score.answer else None
            assert reward == pytest.approx(0.0 if said is None else max(0.0, 1 - abs(said - truth)), abs=1e-5), row


@pytest.mark.parametrize("kind", ["direction", "place"])
def test_a_direction_is_paid_in_full_where_it_is_scored_as_right(kind: str) -> None:
    """In between the reward is the angle between the words, where the scorer counts axes."""
    for row in rows(kind):
        score = SCORERS["spatial-sound-qa"].score(prediction(row))
        reward, truth = paid(rewards.direction, row), read_direction(row["gold"])
        assert score is not None and reward is not None and truth is not None
        assert (reward > 1 - 1e-9) == (score.value == 1.0), row
        said = read_direction((score.answer or "").split(";")[0]) if score.parsed else None
        if said is None:
            assert reward == 0.0, row
        elif reward:  # nothing is paid for an axis named both ways, whose other axes may be right
            assert reward == pytest.approx(1 - great_circle(said, truth) / 180, abs=1e-9), row
