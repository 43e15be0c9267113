"""Is a text a sound? Our own classifier on texts that it was not fitted on, and the table that it is fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from audio_llm.errors import DataError
from data_prep.corpus.text_classifier import BUCKETS, EXAMPLES, TextClassifier, grams, read_examples

TABLE = read_examples(EXAMPLES)


def test_over_five_folds_it_is_far_better_than_the_more_frequent_answer() -> None:
    order = np.random.default_rng(0).permutation(len(TABLE))
    right = 0
    for fold in range(5):
        held = set(order[fold::5].tolist())
        fitted = TextClassifier.fitted([row for number, row in enumerate(TABLE) if number not in held])
        right += sum((fitted.probability(TABLE[number][0]) > 0.5) == TABLE[number][1] for number in held)
    most = max(sum(mark for _, mark in TABLE), sum(not mark for _, mark in TABLE))
    assert right / len(TABLE) > 0.78 > most / len(TABLE) + 0.2


def test_it_is_the_same_whatever_order_the_examples_have() -> None:
    one, other = TextClassifier.fitted(TABLE), TextClassifier.fitted(TABLE[::-1])
    for text in ("a dog barks", "the man who sold the world", "", "♪"):
        assert one.probability(text) == pytest.approx(other.probability(text), abs=2e-6)
        assert 0 <= one.probability(text) <= 1


def test_the_optimum_is_one() -> None:
    """The gradient of the penalised likelihood is zero there, by differences."""
    examples = TABLE[:30] + TABLE[-30:]
    fitted = TextClassifier.fitted(examples)
    from data_prep.corpus.text_classifier import PENALTY, _matrix

    rows = np.concatenate((_matrix([text for text, _ in examples]), np.ones((60, 1))), axis=1)
    weights, wanted = np.append(fitted.weights, fitted.bias), np.array([mark for _, mark in examples], float)
    chance = 1 / (1 + np.exp(-(rows @ weights)))
    assert np.abs(rows.T @ (chance - wanted) + PENALTY * 60 * weights).max() < 1e-6


def test_no_text_is_there_twice_and_grams_are_buckets() -> None:
    assert len({text.lower() for text, _ in TABLE}) == len(TABLE) >= 400
    assert all(0 <= bucket < BUCKETS for bucket in grams("a dog barks")) and grams("") == grams(" ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text,sound\ndog,1\n", "of both kinds"),
        ("text,sound\ndog,maybe\n", "line 2: expected columns text and sound"),
        ("word\ndog\n", "expected columns text and sound"),
    ],
)
def test_tables_that_are_none_are_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_examples(tmp_path / "a.csv")
    with pytest.raises(DataError, match="a CSV file"):
        read_examples(tmp_path / "none.csv")
