"""A small classifier of short texts: logistic regression over hashed n-grams, the same to the bit in every process.

It is made for one question, whether a cue describes a sound, and is fitted in a second from a table of examples. The
table that comes with it is our own (``cue_examples.csv``); a recipe may name another.
"""

from __future__ import annotations

import csv
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_llm.errors import DataError, describe

EXAMPLES = Path(__file__).with_name("cue_examples.csv")
BUCKETS = 2**13  # of the hash: more than the n-grams of some thousand short texts need
PENALTY = 0.0002  # of the squared weights, per example: the best of five over folds of our own examples
_YES, _NO = ("1", "true", "yes", "sound"), ("0", "false", "no", "other")


def read_examples(path: Path) -> list[tuple[str, bool]]:
    """Rows of a CSV file with the columns ``text`` and ``sound`` (1 or 0). Raises :class:`DataError`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(describe(f"examples {path}", "a CSV file", str(error))) from error
    found = []
    for number, row in enumerate(rows, 2):
        text, mark = (row.get("text") or "").strip(), (row.get("sound") or "").strip().lower()
        if not text or mark not in (*_YES, *_NO):
            expected = "columns text and sound, which is 1 or 0"
            raise DataError(describe(f"examples {path}, line {number}", expected, f"{text!r:.40} and '{mark}'"))
        found.append((text, mark in _YES))
    if len({mark for _, mark in found}) < 2:
        raise DataError(describe(f"examples {path}", "examples of both kinds", f"{len(found)} of at most one"))
    return found


def grams(text: str) -> Counter[int]:
    """Buckets of the words, pairs of words and pieces of 3 to 5 letters of `text`, with their counts."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    plain = f" {' '.join(words)} "
    parts = [f"w {word}" for word in words] + [f"p {a} {b}" for a, b in zip(words, words[1:], strict=False)]
    parts += [plain[start : start + size] for size in (3, 4, 5) for start in range(len(plain) - size + 1)]
    return Counter(zlib.crc32(part.encode()) % BUCKETS for part in parts)


def _matrix(texts: Sequence[str]) -> np.ndarray:
    """(texts, buckets) float64 of unit rows."""
    rows = np.zeros((len(texts), BUCKETS))
    for place, text in enumerate(texts):
        for bucket, count in grams(text).items():
            rows[place, bucket] = 1 + math.log(count)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class TextClassifier:
    """`weights` (buckets,) and `bias`: the log-odds that a text is of the kind."""

    weights: np.ndarray
    bias: float

    @classmethod
    def fitted(cls, examples: Sequence[tuple[str, bool]]) -> TextClassifier:
        """By Newton's method in the dual, which has a row an example: exact, and without a random start."""
        rows = _matrix([text for text, _ in examples])
        rows = np.concatenate((rows, np.ones((len(rows), 1))), axis=1)  # the last column is the bias
        wanted = np.array([mark for _, mark in examples], dtype=np.float64)
        kernel = rows @ rows.T  # (examples, examples)
        alpha = np.zeros(len(rows))  # weights = rows.T @ alpha
        penalty = PENALTY * len(rows)
        for _ in range(50):
            chance = 1 / (1 + np.exp(-(kernel @ alpha)))
            slope = np.maximum(chance * (1 - chance), 1e-9)
            # Weighted least squares of the working response: (K + penalty / slope) alpha = K alpha + (y − p) / slope
            target = kernel @ alpha + (wanted - chance) / slope
            fresh = np.linalg.solve(kernel + np.diag(penalty / slope), target)
            moved = float(np.abs(fresh - alpha).max())
            alpha = fresh
            if moved < 1e-10:
                break
        weights = np.round(rows.T @ alpha, 9)  # what differs beyond is the processor's
        return cls(weights[:-1], float(weights[-1]))

    def probability(self, text: str) -> float:
        """That `text` is of the kind, to six digits."""
        (row,) = _matrix([text])
        return round(1 / (1 + math.exp(-float(row @ self.weights) - self.bias)), 6)
