"""How much of a score is audio: the questions that models cannot answer without their sound, and what is right of them.

From runs of several models over the same questions, each with the controls ``silence`` and ``text_only``. These are
the first two of the four steps of DCASE 2026 task 5's audio-dependency filtering, whose models and thresholds are not
published in a form that could be read: the threshold here is our own (:attr:`Rules.right_without`). Its other steps are
perplexities of the options and people. The split of AudioMCQ into weak and strong audio contribution has a published
threshold: strong where at least two models answer wrongly in silence (:attr:`Rules.wrong_in_silence`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from audio_llm.errors import ConfigError, describe
from eval.controls import unheard_by_count
from eval.figures.comparing import refuse_other_question
from eval.figures.estimates import Comparison, Estimate, share
from eval.figures.runs import Run
from eval.figures.scores import Cell, Scored, compare, item_values, summarise
from eval.figures.tables import percent
from eval.predictions import PredictionsError

_WITHOUT = ("silence", "text_only")  # the controls


@dataclass(frozen=True)
class Rules:
    """A question is not audio-dependent where `right_without` models or more are right in silence, or as many with the
    text only. It is strong where at least `wrong_in_silence` models are wrong in silence, else weak."""

    right_without: int = 1
    wrong_in_silence: int = 2


@dataclass(frozen=True)
class Question:
    """Which models are right about it without its sound, and what follows from that."""

    id: str
    right_in_silence: tuple[str, ...]
    right_text_only: tuple[str, ...]
    audio_dependent: bool
    contribution: str  # weak or strong


@dataclass(frozen=True)
class Part:
    """One model on some of the questions: with their sound, without it, and what the sound adds over silence."""

    name: str
    with_sound: Cell
    silence: Cell
    text_only: Cell
    sound_adds: Comparison


@dataclass(frozen=True)
class Model:
    """One model on every part that has questions; of its right answers the share that is to audio-dependent ones."""

    name: str
    parts: list[Part]
    right_and_dependent: Estimate
    warning: str


@dataclass(frozen=True)
class Dependency:
    """All models; `left_out` counts questions without a score for every model, with and without their sound."""

    scorer: str
    rules: Rules
    questions: list[Question]
    left_out: int
    models: list[Model]


def audio_dependency(runs: Sequence[Run], answers: str = "greedy", rules: Rules | None = None) -> Dependency:
    """The filter over `runs`, whose pass `answers` is the one with the sound, under the first scorer of the first run.

    Of several replies to a question half must be right for it to count as right. Raises :class:`ConfigError` for
    thresholds that so many runs cannot meet, :class:`PredictionsError` for runs that are unfinished, lack a control or
    were asked other questions.
    """
    rules = rules or Rules()
    if len(runs) < 2:
        raise ConfigError(describe("--audio-dependent", "the runs of two models or more", f"{len(runs)}"))
    for flag, value in (("right-without", rules.right_without), ("wrong-in-silence", rules.wrong_in_silence)):
        if not 1 <= value <= len(runs):
            raise ConfigError(describe(f"--{flag}", f"1 to {len(runs)}, the number of runs", f"{value}"))
    scorer = runs[0].headline
    for run in runs:
        _refuse_unusable(run, answers)
    passes = [{name: run.scored(name, scorer) for name in (answers, *_WITHOUT)} for run in runs]
    _refuse_others(runs, passes, answers)
    values = [{name: item_values(found) for name, found in each.items()} for each in passes]
    asked = [*dict.fromkeys(entry.row.id for entry in passes[0][answers])]
    kept = [item for item in asked if all(item in found for each in values for found in each.values())]
    if not kept:
        expected = f"questions that scorer '{scorer.name}' can score for every run, with and without their sound"
        raise PredictionsError(describe(_names(runs), expected, f"none of {len(asked)}"))
    right = [
        {name: _right(entry for entry in found if entry.score is not None) for name, found in each.items()}
        for each in passes
    ]
    questions = []
    for item in kept:
        silent, text = (
            tuple(run.name for run, of in zip(runs, right, strict=True) if item in of[control]) for control in _WITHOUT
        )
        dependent = _dependent(silent, text, rules.right_without)
        strong = len(runs) - len(silent) >= rules.wrong_in_silence
        questions.append(Question(item, silent, text, dependent, "strong" if strong else "weak"))
    models = []
    for run, each in zip(runs, passes, strict=True):
        parts = _parts(run.name, each, questions, rules.right_without, len(runs) - 1)
        models.append(Model(run.name, parts, _share(each[answers], questions), unheard_by_count(run.rows)))
    return Dependency(f"{scorer.name} {scorer.version}", rules, questions, len(asked) - len(kept), models)


def _names(runs: Sequence[Run]) -> str:
    return f"runs {', '.join(run.name for run in runs)}"


def _refuse_unusable(run: Run, answers: str) -> None:
    """Raises where the run has not ended, or lacks a pass."""
    name = f"run {run.name}"
    again = f"Repeat its own command ({run.manifest.get('command', 'audio-llm eval …')})."
    if run.manifest and not run.manifest.get("finished"):
        raise PredictionsError(describe(name, "a run that has finished", f"{len(run.rows)} answers of one", again))
    if answers not in run.passes:
        raise PredictionsError(describe(name, f"answers '{answers}'", f"only {', '.join(run.passes)}"))
    if run.passes[answers][0].control:
        raise PredictionsError(describe("--answers", "answers to the sound, greedy or sampled", f"'{answers}'"))
    if missing := [control for control in _WITHOUT if control not in run.passes]:
        cure = "Ask again, into another --out, with --controls silence,text_only."
        found = f"{', '.join(run.passes)} without {' and '.join(missing)}"
        raise PredictionsError(describe(name, f"the controls {' and '.join(_WITHOUT)}", found, cure))
    warmth = {pass_: run.passes[pass_][0].temperature for pass_ in (answers, *_WITHOUT)}
    if len(set(warmth.values())) > 1:
        found = ", ".join(f"{pass_} at {value:g}" for pass_, value in warmth.items())
        raise PredictionsError(describe(name, "controls at the temperature of the answers", found))


def _refuse_others(runs: Sequence[Run], passes: Sequence[Mapping[str, list[Scored]]], answers: str) -> None:
    """Raises where a run, or a control of one, was asked other questions than the first run."""
    first = {entry.row.id: entry.row for entry in passes[0][answers]}
    for run, each in zip(runs, passes, strict=True):
        for name, found in each.items():
            rows = {entry.row.id: entry.row for entry in found}
            if rows.keys() != first.keys():
                other = sorted(rows.keys() ^ first.keys())[0]
                having = f"'{other}' in one of them ({len(rows)} and {len(first)} questions)"
                expected = f"the questions of run {runs[0].name}, {answers}"
                cure = "All runs must be over the same questions: the same data, --limit and --seed."
                raise PredictionsError(describe(f"run {run.name}, {name}", expected, having, cure))
            for item, row in rows.items():
                refuse_other_question(item, first[item], row, f" in run {runs[0].name} and in run {run.name}, {name}")


def _right(scored: Iterable[Scored]) -> set[str]:
    """The questions of which at least half of the replies are right."""
    values: dict[str, list[bool]] = {}
    for entry in scored:
        values.setdefault(entry.row.id, []).append(entry.score is not None and entry.score.value == 1.0)
    return {item for item, found in values.items() if 2 * sum(found) >= len(found)}


def _dependent(silent: Sequence[str], text: Sequence[str], limit: int) -> bool:
    return len(silent) < limit and len(text) < limit


def _parts(
    model: str, passes: Mapping[str, list[Scored]], questions: Sequence[Question], limit: int, others: int
) -> list[Part]:
    def by_others(one: Question) -> bool:
        if limit > others:  # they never reach it: of no question can they say that it needs no sound
            return False
        silent, text = (
            [name for name in found if name != model] for found in (one.right_in_silence, one.right_text_only)
        )
        return _dependent(silent, text, limit)

    chosen = {
        "all": {one.id for one in questions},
        "audio-dependent": {one.id for one in questions if one.audio_dependent},
        "the rest": {one.id for one in questions if not one.audio_dependent},
        "audio-dependent for the other models": {one.id for one in questions if by_others(one)},
        "strong": {one.id for one in questions if one.contribution == "strong"},
        "weak": {one.id for one in questions if one.contribution == "weak"},
    }
    parts = []
    for name, ids in chosen.items():
        if ids:
            loud, silent, text = ([entry for entry in found if entry.row.id in ids] for found in passes.values())
            parts.append(Part(name, summarise(loud), summarise(silent), summarise(text), compare(silent, loud)))
    return parts


def _share(scored: Sequence[Scored], questions: Sequence[Question]) -> Estimate:
    """Of what is right of `questions`, the share of the audio-dependent ones, over clusters."""
    values, clusters = item_values(scored), {entry.row.id: entry.row.cluster for entry in scored}
    right = np.array([values[one.id] for one in questions])
    dependent = np.array([one.audio_dependent for one in questions], dtype=np.float64)
    return share(right * dependent, right, np.array([clusters[one.id] for one in questions]))


def table(found: Dependency) -> str:
    """The filter and every model's figures as text."""
    rules, total = found.rules, len(found.questions)
    dependent = sum(one.audio_dependent for one in found.questions)
    strong = sum(one.contribution == "strong" for one in found.questions)
    lines = [
        f"{total} questions, {len(found.models)} models: accuracy in percent [95 % interval], scorer {found.scorer}",
        f"  audio-dependent {dependent}: fewer than {rules.right_without} of the models right in silence, and fewer "
        f"than {rules.right_without} with the text only",
        f"  strong {strong}, weak {total - strong}: strong where at least {rules.wrong_in_silence} models are wrong in "
        "silence",
    ]
    if found.left_out:
        lines.append(f"  without a score for every model, with and without sound, and left out: {found.left_out}")
    width = max(len(part.name) for model in found.models for part in model.parts)
    for model in found.models:
        lines.append(f"{model.name}")
        for part in model.parts:
            loud, adds = part.with_sound, part.sound_adds
            lines.append(
                f"  {part.name:<{width}}  n {loud.accuracy.n:<5} {loud.accuracy!s:>18}  chance {percent(loud.chance)}, "
                f"silence {percent(part.silence.accuracy.value)}, text only {percent(part.text_only.accuracy.value)}; "
                f"the sound adds {adds.difference} (p {adds.p_value:.2g})"
            )
        figure = model.right_and_dependent
        told = f"of its right answers {figure} % are to audio-dependent questions"
        lines.append(f"  {told if math.isfinite(figure.value) else 'none is right'}")
        lines += [f"  warning: {model.warning}"] if model.warning else []
    return "\n".join(lines)
