"""EchoTwin-QA as an engine of ``audio-llm eval``, and the table that says whether it listens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from audio_llm.errors import AudioLLMError, ConfigError, DataError, describe
from audio_llm.files import write_lines
from audio_llm.tasks.echotwin.engine import EchoTwinEngine
from eval import predictions
from eval.figures import estimates
from eval.predictions import Prediction
from eval.scorers.dcase_aqa import chosen as read_choice

if TYPE_CHECKING:
    from audio_llm.datasets import dcase_aqa
    from audio_llm.datasets.dcase_aqa import Question


# --------------------------------------------------------------------------------------- by the flags of the original


@dataclass(frozen=True)
class Answered:
    """A question with the log-probabilities of its choices; without them, `problem` says why."""

    question: Question
    scores: tuple[float, ...] = ()
    problem: str = ""

    @property
    def choice(self) -> int | None:
        from audio_llm.tasks.echotwin.data import best_choice

        return best_choice(self.scores, self.question.choices) if self.scores else None


def open_model(checkpoint: str, beats: str | None, text: str | None, batch_size: int) -> EchoTwinEngine:
    """A run folder of training, or an original file together with the checkpoints of its towers."""
    from audio_llm.tasks.echotwin.folder import load_echotwin, load_original

    if Path(checkpoint).is_dir():
        return EchoTwinEngine(*load_echotwin(checkpoint), batch_size)
    if beats is None or text is None:
        raise ConfigError(describe(f"checkpoint {checkpoint}", "--beats_ckpt and --hf_text_dir beside it", "none"))
    return EchoTwinEngine(*load_original(checkpoint, beats, text), batch_size)


def answer(engine: EchoTwinEngine, data: str | Path, sounds: str | Path | None = None) -> list[Answered]:
    """Answers to all questions of `data`, in order; one whose recording cannot be heard has its `problem` instead."""
    from tqdm import tqdm

    from audio_llm.datasets import dcase_aqa

    rows = dcase_aqa.read(data, sounds).rows
    engine.listener.listen(rows)
    found = {row.id: Answered(row, (), engine.listener.rejects.get(row.audio, "")) for row in rows}
    able = [row for row in rows if not found[row.id].problem]
    for start in tqdm(range(0, len(able), engine.batch_size), desc="answer", leave=False):
        batch = able[start : start + engine.batch_size]
        for row, scores in zip(batch, engine.score([engine.listener.ask(row) for row in batch]), strict=True):
            found[row.id] = Answered(row, problem=scores) if isinstance(scores, str) else Answered(row, tuple(scores))
    return list(found.values())


def dev_table(answers: Sequence[Answered]) -> str:
    """Accuracy in all, by part and by type of question, with counts; what could not be scored is counted by reason."""
    usable = [row for row in answers if row.scores and row.question.answer is not None]
    groups: dict[str, list[bool]] = {"overall": []}
    for row in usable:
        right = row.choice == row.question.answer
        for name in ("overall", f"part {row.question.part}", row.question.question_type):
            groups.setdefault(name, []).append(right)
    lines = [f"{name:<24} {estimates.wilson(sum(rows), len(rows))} ({len(rows)})" for name, rows in groups.items()]
    parts = [float(np.mean(rows)) for name, rows in groups.items() if name.startswith("part ")]
    lines.insert(1, f"{'mean of the parts':<24} {100 * float(np.mean(parts)) if parts else float('nan'):.1f}")
    reasons = Counter("no usable answer" if row.scores else row.problem for row in answers if row not in usable)
    return "\n".join([*lines, *(f"left out: {count} × {reason}" for reason, count in reasons.items())])


def write_submission(answers: Sequence[Answered], path: str | Path, key: dcase_aqa.Key) -> list[str]:
    """Write and validate the CSV, with ``scores.jsonl`` beside it; returns lines that say what was done.

    Raises :class:`DataError` for a file that could not be handed in.
    """
    from audio_llm.datasets import dcase_aqa

    path = Path(path)
    rows = [dcase_aqa.Answered(row.question.id, row.question.stem, row.question.options, row.choice) for row in answers]
    dcase_aqa.write_csv(rows, path, key=key)
    problems = dcase_aqa.validate_submission(path, [row.question for row in answers], key=key, unanswered=True)
    if problems:
        raise DataError(problems[0])
    scores = path.with_name(f"{path.stem}.scores.jsonl")
    records = []
    for row in answers:
        chances = {
            choice: round(math.exp(value), 6) for choice, value in zip(row.question.choices, row.scores, strict=False)
        }
        records.append({"id": row.question.id, "choices": chances} | ({"problem": row.problem} if row.problem else {}))
    write_lines(scores, records)
    empty = [row for row in answers if row.choice is None]
    lines = [f"{path}: {len(answers)} questions, valid; probabilities in {scores}"]
    return lines + [f"left empty: {row.question.id}: {row.problem}" for row in empty]


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """A model's accuracy with its 95 % interval, and how often its choice changes when the options are permuted.

    `moved` is None where no item was asked so; `permutable` counts those whose options have another order.
    """

    name: str
    accuracy: estimates.Estimate
    parts: dict[str, float]
    moved: estimates.Estimate | None = None
    permutable: int = 0

    @property
    def macro(self) -> float:
        """Unweighted mean over the parts: the challenge's domain average."""
        return float(np.mean(list(self.parts.values()))) if self.parts else float("nan")


def chosen(row: Prediction) -> str:
    """The option that a row answered with, of whatever model it is; "" where it answered with none."""
    if row.raw in row.choices:  # EchoTwin's own: the text itself, to the letter
        return row.raw
    index, _ = read_choice(row)
    return "" if index is None else row.choices[index]


def usable(rows: Iterable[Prediction]) -> list[Prediction]:
    """Rows whose right answer is known and whose sound could be heard; the same items for every run."""
    return [row for row in rows if row.gold and not row.error]


def plain_answers(everything: Sequence[Prediction]) -> dict[str, Prediction]:
    """The answer to every usable item with its own sound, by id; of several samples the first."""
    found: dict[str, Prediction] = {}
    for row in usable(row for row in everything if not row.control):
        found.setdefault(row.id, row)
    return found


def moves(everything: Sequence[Prediction], plain: Mapping[str, Prediction]) -> list[bool]:
    """For every item that was asked with its options in other orders, whether the choice moves in any of them."""
    moved: dict[str, bool] = {}
    for row in usable(row for row in everything if row.control == "shuffled_options"):
        if row.id in plain:
            moved[row.id] = moved.get(row.id, False) or chosen(row) != chosen(plain[row.id])
    return list(moved.values())


def row_of(name: str, run: str | Path) -> tuple[Row, dict[str, bool]]:
    """A run's row, and which items it has right."""
    everything = predictions.read(run)
    plain = plain_answers(everything)
    right = {key: chosen(row) == row.gold for key, row in plain.items()}
    moved = moves(everything, plain)
    share = estimates.wilson(sum(moved), len(moved)) if moved else None
    accuracy = estimates.wilson(sum(right.values()), len(right))
    permutable = sum(len(set(row.choices)) > 1 for row in plain.values())
    return Row(name, accuracy, by_part(plain, right), share, permutable), right


def by_part(rows: Mapping[str, Prediction], right: Mapping[str, bool]) -> dict[str, float]:
    parts: dict[str, list[bool]] = {}
    for key, row in rows.items():
        parts.setdefault(str(row.meta.get("part", "all")), []).append(right[key])
    return {part: float(np.mean(values)) for part, values in sorted(parts.items())}


def majority_letter(run: str | Path, training: Sequence[str]) -> tuple[Row, dict[str, bool]]:
    """The letter that is most often right in `training` (paths of questions), for every item of a run."""
    from audio_llm.datasets import dcase_aqa

    places = [row.answer for path in training for row in dcase_aqa.read(path).rows if row.answer is not None]
    if not places:
        raise DataError(describe(", ".join(training), "questions with their right answers", "none"))
    letter = int(np.bincount(places).argmax())
    rows = plain_answers(predictions.read(run))
    for row in rows.values():
        if not row.choices:
            raise DataError(describe(f"run {run}, item '{row.id}'", "choices", "none"))
    right = {key: row.choices[min(letter, len(row.choices) - 1)] == row.gold for key, row in rows.items()}
    accuracy = estimates.wilson(sum(right.values()), len(right))
    return Row(f"majority letter ({chr(65 + letter)})", accuracy, by_part(rows, right)), right


@dataclass(frozen=True)
class Table:
    """Markdown, and what is not as it should be, a sentence each: see :func:`compare`."""

    text: str
    failures: tuple[str, ...]


def compare(models: Mapping[str, str], baselines: Mapping[str, str], training: Sequence[str]) -> Table:
    """Run folders by name: `models`, best first, `baselines`, and the majority letter of the `training` questions.

    Each model is compared with the next one and with every baseline, on the items that all runs could be asked, and
    should be ahead with the whole interval of the difference; the best model's choice should never move when the
    options are permuted. Raises :class:`AudioLLMError` where no items are common.
    """
    runs = {**models, **baselines}
    found = [row_of(name, run) for name, run in runs.items()]
    found.append(majority_letter(next(iter(runs.values())), training))
    keys = sorted(set.intersection(*(set(right) for _, right in found)))
    if not keys:
        raise AudioLLMError(describe("runs", "answers to the same questions", "none in common"))
    lines = table_lines([row for row, _ in found])
    failures = steadiness(found[0][0])
    for place, (first, a) in enumerate(found[: len(models)]):
        for second, b in found[place + 1 : place + 2] + found[max(place + 2, len(models)) :]:
            one, other = (np.array([right[key] for key in keys], dtype=float) for right in (a, b))
            gain = estimates.paired_difference(other, one)
            if not gain.low > 0:
                failures.append(describe(f"{first.name} over {second.name}", "a gain beyond its interval", str(gain)))
            p = estimates.mcnemar(other, one).p_value
            lines.append(f"{first.name} over {second.name}: {gain} points, McNemar p = {p:.2g}")
    left_out = len({row.id for run in runs.values() for row in predictions.read(run)} - set(keys))
    reason = "; no right answer is known, or not every model could be asked" if left_out else ""
    lines.append(f"({len(keys)} questions, {left_out} left out{reason})")
    return Table("\n".join(lines), tuple(failures))


def steadiness(row: Row) -> list[str]:
    """What speaks against a model's choice being the same in every order of the options."""
    where = f"{row.name}, options permuted"
    asked = row.moved.n if row.moved else 0
    if not asked or asked < row.permutable:
        cure = "Evaluate it with --controls shuffled_options."
        return [describe(where, f"answers to {row.permutable} questions", str(asked), cure)]
    share = row.moved.value if row.moved else 0.0
    moved = f"{round(share * asked)} of {asked}"
    return [describe(where, "a choice that never moves", moved)] if share else []


def table_lines(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, and an empty line."""
    parts = sorted({part for row in rows for part in row.parts})
    lines = [
        f"| model | accuracy, 95 % interval | {' | '.join(f'part {part}' for part in parts)} | mean of parts "
        "| choice moves when options are permuted |",
        f"|---|---|{'---|' * len(parts)}---|---|",
    ]
    for row in rows:
        cells = [f"{100 * row.parts.get(part, float('nan')):.1f}" for part in parts]
        moved = "" if row.moved is None else f"{100 * row.moved.value:.1f} % of {row.moved.n}"
        lines.append(f"| {row.name} | {row.accuracy} | {' | '.join(cells)} | {100 * row.macro:.1f} | {moved} |")
    return [*lines, ""]
