"""EchoTwin-QA as an engine of ``audio-llm eval``, and the table that says whether it listens."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.errors import AudioLLMError, describe
from eval import predictions, statistics
from eval.predictions import Prediction

if TYPE_CHECKING:
    from eval.engines import Answer, Request


def is_echotwin_folder(path: str | Path) -> bool:
    """Whether a folder was written by training with ``task: echotwin``."""
    try:
        return "echotwin" in json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


class EchoTwinEngine:
    """Answers with the text of the best-scored choice. There is nothing to sample: the temperature is not read."""

    name = "echotwin"

    def __init__(self, model: str, batch_size: int = 16) -> None:
        import torch

        from audio_llm.checkpoints.echotwin import load_echotwin
        from audio_llm.training.echotwin_data import Listener

        self.model, self.tokenizer = load_echotwin(model)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.listener, self.batch_size = Listener(self.model), batch_size

    def prepare(self, waveform: Waveform, name: str) -> Waveform:
        """The audio as it is; the model makes one channel of several, as its tower wants it."""
        layouts = self.model.audio_enc.layouts
        audio.check(waveform, layouts=tuple(audio.LAYOUT_CHANNELS) if layouts == ("mono",) else layouts, name=name)
        return waveform

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        stream = iter(requests)
        while batch := list(itertools.islice(stream, self.batch_size)):
            yield from self._answer(batch)

    def _answer(self, batch: Sequence[Request]) -> list[Answer]:
        from audio_llm.training.echotwin_data import Asked, Collator, option_scores
        from eval.engines import Answer

        started = time.monotonic()
        heard = self.listener.hear([self.listener.windows(request.waveform) for request in batch])
        items = [
            Asked(request.item.question, tuple(request.item.choices), None, tokens)
            for request, tokens in zip(batch, heard, strict=True)
        ]
        reasons = [self._reason(item) for item in items]
        able = [item for item, reason in zip(items, reasons, strict=True) if not reason]
        collator = Collator(self.model, self.tokenizer, max((len(item.choices) for item in able), default=0))
        scores = iter(option_scores(self.model, collator, able) if able else [])
        seconds = (time.monotonic() - started) / len(batch)
        answers = []
        for item, reason in zip(items, reasons, strict=True):
            if reason:
                answers.append(Answer(error=reason))
                continue
            row = next(scores)
            asked = hashlib.sha256(json.dumps([item.question, item.choices]).encode()).hexdigest()[:16]
            best = item.choices[row.index(max(row))]
            answers.append(Answer(raw=best, finish_reason="stop", prompt_hash=asked, seconds=seconds))
        return answers

    def _reason(self, item: object) -> str:
        """Why an item cannot be answered, "" where it can."""
        choices = len(item.choices)  # type: ignore[attr-defined]
        if choices < 2:
            return describe("question for EchoTwin", "at least two choices", str(choices))
        config = self.model.config
        if config.head == "letters" and choices > config.num_letters:
            return describe("question for EchoTwin", f"at most {config.num_letters} choices (letters)", str(choices))
        return ""

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """A model's accuracy with its 95 % interval, and how often its choice changes when the options are permuted."""

    name: str
    accuracy: statistics.Estimate
    parts: dict[str, float]
    moved: statistics.Estimate | None

    @property
    def macro(self) -> float:
        """Unweighted mean over the parts: the challenge's domain average."""
        return float(np.mean(list(self.parts.values()))) if self.parts else float("nan")


def chosen(row: Prediction) -> str:
    """What a row answered, "" where it could not be asked."""
    return "" if row.error else row.raw


def scored(rows: Iterable[Prediction]) -> dict[str, Prediction]:
    """Rows by id whose right answer is known and whose sound could be heard; the same items for every run."""
    return {row.id: row for row in rows if row.gold and not row.error}


def row_of(name: str, run: str | Path) -> tuple[Row, dict[str, bool]]:
    """A run's row, and which items it has right."""
    everything = predictions.read(run)
    plain = scored(row for row in everything if not row.control)
    permuted = scored(row for row in everything if row.control == "shuffled_options")
    right = {key: chosen(row) == row.gold for key, row in plain.items()}
    moved = [chosen(permuted[key]) != chosen(plain[key]) for key in plain if key in permuted]
    accuracy = statistics.wilson(sum(right.values()), len(right))
    return Row(
        name, accuracy, by_part(plain, right), statistics.wilson(sum(moved), len(moved)) if moved else None
    ), right


def by_part(rows: Mapping[str, Prediction], right: Mapping[str, bool]) -> dict[str, float]:
    parts: dict[str, list[bool]] = {}
    for key, row in rows.items():
        parts.setdefault(str(row.meta.get("part", "all")), []).append(right[key])
    return {part: float(np.mean(values)) for part, values in sorted(parts.items())}


def majority_letter(run: str | Path, training: Sequence[str]) -> tuple[Row, dict[str, bool]]:
    """The letter that is most often right in `training` (paths of questions), for every item of a run."""
    from audio_llm import dcase_aqa

    places = [row.answer for path in training for row in dcase_aqa.read(path).rows if row.answer is not None]
    letter = int(np.bincount(places).argmax())
    rows = scored(row for row in predictions.read(run) if not row.control)
    right = {key: row.choices[min(letter, len(row.choices) - 1)] == row.gold for key, row in rows.items()}
    accuracy = statistics.wilson(sum(right.values()), len(right))
    return Row(f"majority letter ({chr(65 + letter)})", accuracy, by_part(rows, right), None), right


def compare(runs: Mapping[str, str], training: Sequence[str]) -> str:
    """A Markdown table of `runs` (name → run folder) and of the majority letter, then each run against the next.

    Only items that every run could be asked are compared. Raises :class:`AudioLLMError` where runs share none.
    """
    found = [row_of(name, run) for name, run in runs.items()]
    found.append(majority_letter(next(iter(runs.values())), training))
    shared = set.intersection(*(set(right) for _, right in found))
    if not shared:
        raise AudioLLMError(describe("runs", "answers to the same questions", "none in common"))
    parts = sorted({part for row, _ in found for part in row.parts})
    lines = [
        f"| model | accuracy, 95 % interval | {' | '.join(parts)} | macro | choice moves when options are permuted |",
        f"|---|---|{'---|' * len(parts)}---|---|",
    ]
    for row, _ in found:
        cells = [f"{100 * row.parts.get(part, float('nan')):.1f}" for part in parts]
        moved = "—" if row.moved is None else f"{100 * row.moved.value:.1f} % of {row.moved.n}"
        lines.append(f"| {row.name} | {row.accuracy} | {' | '.join(cells)} | {100 * row.macro:.1f} | {moved} |")
    lines.append("")
    keys = sorted(shared)
    for (first, a), (second, b) in itertools.pairwise(found):
        one, other = (np.array([right[key] for key in keys], dtype=float) for right in (a, b))
        gain = statistics.paired_difference(other, one)
        p = statistics.mcnemar(other, one).p_value
        lines.append(f"{first.name} over {second.name}: {gain} points on {len(keys)} questions (McNemar p = {p:.2g})")
    return "\n".join(lines)
