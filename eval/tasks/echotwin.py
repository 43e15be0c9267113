"""EchoTwin-QA as an engine of ``audio-llm eval``, and the table that says whether it listens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from audio_llm.errors import AudioLLMError, ConfigError, DataError, NothingHeardError, describe
from audio_llm.files import write_lines
from audio_llm.tasks.echotwin.engine import EchoTwinEngine
from eval.benchmarks.base import as_asked
from eval.benchmarks.dcase_aqa import item_of
from eval.figures import runs
from eval.figures.scores import Cell, Permutations, Scored, by, compare, score_rows, summarise
from eval.figures.tables import line, percent
from eval.predictions import Prediction
from eval.scorers.dcase_aqa import DcaseAqa

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
    if not any(answer.scores for answer in found.values()):
        first = next((answer.problem for answer in found.values()), "no questions")
        raise NothingHeardError(describe(str(data), "questions that can be asked", f"none: {first}"))
    return list(found.values())


def dev_table(answers: Sequence[Answered]) -> str:
    """Accuracy in all, by part and by type of question, with counts; what could not be scored is counted by reason."""
    usable = [row for row in answers if row.scores and row.question.answer is not None]
    scored = score_rows([_prediction(row) for row in usable], DcaseAqa())
    parts = {f"part {part}": cell for part, cell in sorted(by(scored, "part").items())}
    groups = {"overall": summarise(scored), **parts, **by(scored, "question_type")}
    lines = [f"{name:<24} {line(cell)}" for name, cell in groups.items()]
    lines.insert(1, f"{'mean of the parts':<24} {100 * _mean(parts):.1f}")
    reasons = Counter("no usable answer" if row.scores else row.problem for row in answers if row not in usable)
    return "\n".join([*lines, *(f"left out: {count} × {reason}" for reason, count in reasons.items())])


def _prediction(row: Answered) -> Prediction:
    """As a run of evaluation stores it."""
    asked = as_asked(item_of(row.question, str(row.question.audio)))
    return Prediction(**asked, raw=row.question.choices[row.choice or 0])


def _mean(cells: Mapping[str, Cell]) -> float:
    """Unweighted mean over the parts: the challenge's domain average."""
    return float(np.mean([cell.accuracy.value for cell in cells.values()])) if cells else math.nan


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
    """A model's answers with their own sound, scored as every table of a run is; `orders` of those that were asked with
    their options permuted, `permutable` how many have another order, `silence` of those asked in silence."""

    name: str
    scored: list[Scored]
    orders: Permutations | None = None
    silence: Cell | None = None
    permutable: int = 0

    @property
    def usable(self) -> set[str]:
        """The questions whose right answer is known and whose sound could be heard."""
        return {entry.row.id for entry in self.scored if entry.score is not None}

    @property
    def parts(self) -> dict[str, Cell]:
        return dict(sorted(by(self.scored, "part").items()))

    @property
    def moved(self) -> float:
        """Share of questions whose choice moves when the options are permuted."""
        return 1 - self.orders.consistency.value if self.orders else 0.0


def row_of(name: str, folder: str | Path) -> Row:
    """The row of a run folder."""
    run = runs.load(folder, name=name, scorers=DcaseAqa.name)
    asked = {entry.row.id for entry in run.main if entry.score is not None and len(set(entry.row.choices)) > 1}
    return Row(name, run.main, run.summary.permutations, run.silent().get(""), len(asked))


def majority_letter(model: Row, training: Sequence[str]) -> Row:
    """The letter that is most often right in `training` (paths of questions), for every question of `model`."""
    from audio_llm.datasets import dcase_aqa

    places = [row.answer for path in training for row in dcase_aqa.read(path).rows if row.answer is not None]
    if not places:
        raise DataError(describe(", ".join(training), "questions with their right answers", "none"))
    letter = int(np.bincount(places).argmax())
    asked = [entry.row for entry in model.scored if entry.score is not None]
    rows = [replace(row, raw=row.choices[min(letter, len(row.choices) - 1)]) for row in asked]
    return Row(f"majority letter ({chr(65 + letter)})", score_rows(rows, DcaseAqa()))


@dataclass(frozen=True)
class Table:
    """Markdown, and what is not as it should be, a sentence each: see :func:`table`."""

    text: str
    failures: tuple[str, ...]


def table(models: Mapping[str, str], baselines: Mapping[str, str], training: Sequence[str]) -> Table:
    """Run folders by name: `models`, best first, `baselines`, and the majority letter of the `training` questions.

    Each model is compared with the next one and with every baseline, on the items that all runs could be asked, and
    should be ahead with the whole interval of the difference; the best model's choice should never move when the
    options are permuted. Raises :class:`AudioLLMError` where no items are common.
    """
    found = [row_of(name, run) for name, run in {**models, **baselines}.items()]
    asked = {entry.row.id for row in found for entry in row.scored}
    found.append(majority_letter(found[0], training))
    keys = set.intersection(*(row.usable for row in found))
    if not keys:
        raise AudioLLMError(describe("runs", "answers to the same questions", "none in common"))
    lines = table_lines(found)
    failures = steadiness(found[0])
    for place, first in enumerate(found[: len(models)]):
        for second in found[place + 1 : place + 2] + found[max(place + 2, len(models)) :]:
            one, other = ([entry for entry in row.scored if entry.row.id in keys] for row in (first, second))
            gain = compare(other, one)
            if not gain.difference.low > 0:
                expected = "a gain beyond its interval"
                failures.append(describe(f"{first.name} over {second.name}", expected, str(gain.difference)))
            lines.append(f"{first.name} over {second.name}: {gain.difference} points, p = {gain.p_value:.2g}")
    left_out = len(asked - keys)
    reason = "; no right answer is known, or not every model could be asked" if left_out else ""
    lines.append(f"({len(keys)} questions, {left_out} left out{reason})")
    return Table("\n".join(lines), tuple(failures))


def steadiness(row: Row) -> list[str]:
    """What speaks against a model's choice being the same in every order of the options."""
    where = f"{row.name}, options permuted"
    asked = row.orders.consistency.n if row.orders else 0
    if not asked or asked < row.permutable:
        cure = "Evaluate it with --controls shuffled_options."
        return [describe(where, f"answers to {row.permutable} questions", str(asked), cure)]
    found = f"{round(row.moved * asked)} of {asked}"
    return [describe(where, "a choice that never moves", found)] if row.moved else []


def table_lines(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, and an empty line."""
    parts = sorted({part for row in rows for part in row.parts})
    lines = [
        f"| model | accuracy, 95 % interval | chance | silence | {' | '.join(f'part {part}' for part in parts)} "
        "| mean of parts | choice moves when options are permuted |",
        f"|---|---|---|---|{'---|' * len(parts)}---|---|",
    ]
    for row in rows:
        found = row.parts
        cells = [f"{100 * found[part].accuracy.value:.1f}" if part in found else "–" for part in parts]
        moved = f"{100 * row.moved:.1f} % of {row.orders.consistency.n}" if row.orders else ""
        whole = summarise(row.scored)
        given = f"{percent(whole.chance)} | {percent(row.silence.accuracy.value) if row.silence else '–'}"
        lines.append(
            f"| {row.name} | {whole.accuracy} | {given} | {' | '.join(cells)} | {100 * _mean(found):.1f} | {moved} |"
        )
    return [*lines, ""]
