"""The battery of replies: what a fair reader makes of them, and what ours and the scorers do."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from audio_llm.language.quantities import read_time
from audio_llm.language.replies import read_reply
from eval.predictions import Prediction
from eval.scorers import SCORERS
from eval.scorers.text import contains

# `replies.jsonl` was written before the reader; the others after it, of shapes that it was not made for.
PARTS = ("replies.jsonl", "replies_unseen.jsonl", "replies_unseen_again.jsonl", "replies_unseen_third.jsonl")
# The question type of SpatialSoundQA that is answered with each kind of open answer.
TYPES = {
    "yes_no": "MIXUP_DIRECTION", "direction": "MIXUP_NONBINARY_DIRECTION", "place": "DOA",
    "distance": "MIXUP_NONBINARY_DISTANCE", "labels": "CLASSIFICATION",
}  # fmt: skip


@cache
def battery(part: str) -> tuple[dict[str, Any], ...]:
    """Rows ``{kind, reply, options, gold, right}``, some with the ``why`` of a verdict that could be doubted."""
    text = (Path(__file__).parent / "data" / part).read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def prediction(row: dict[str, Any], reply: str | None = None) -> Prediction:
    kind = TYPES.get(row["kind"], row["kind"])
    return Prediction("a", kind, "f", "?", row["options"], row["gold"], row["reply"] if reply is None else reply)


def read_as_gold(row: dict[str, Any], reply: str | None = None) -> bool:
    """Whether the reply of a row (or `reply` in its place) is read as its gold answer."""
    stored = prediction(row, reply)
    if row["kind"] == "time":
        said, truth = read_time(read_reply(stored.raw).said), read_time(row["gold"])
        return said is not None and truth is not None and abs(said - truth) < 0.011
    if row["kind"] == "contains":
        return bool(contains(stored.reply().said, row["gold"])[0])
    score = SCORERS["option-resolution"].score(stored)
    return score is not None and score.value == 1.0
