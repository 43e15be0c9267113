"""DCASE 2025 task 5, audio question answering (Yang et al. 2025); its files: :mod:`audio_llm.datasets.dcase_aqa`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from audio_llm.config import read as read_yaml
from audio_llm.datasets.dcase_aqa import (
    Answered,
    AnswerForm,
    Key,
    Question,
    heard_in_both,
    read,
    validate_submission,
    write_submission,
)
from audio_llm.errors import describe
from eval.benchmarks.base import NAME_SOUNDS, BenchmarkError, Collection, Item, check_options, one_of
from eval.predictions import Prediction
from eval.scorers.dcase_aqa import chosen


class DcaseAqa:
    """A folder of question files, or one file of them.

    Options: ``audio``, the folder of the sound files where they do not lie as the questions say; ``train``, the
    training questions, to count clips that are, byte for byte, in both (``duplicates=drop`` leaves them out);
    ``train_audio``, their sound files. A question whose answer key is broken is an item with an error.
    """

    name = "dcase_aqa"
    title = "DCASE 2025 task 5"
    scorers = ("dcase-aqa", "option-resolution")
    groups = ("part", "question_type")

    def open(self, data: Path, **options: str) -> Collection:
        """Items of `data`. Raises :class:`DataError` naming file and key."""
        check_options(self.name, options, ("audio", "train", "train_audio", "duplicates"))
        drop = one_of(options, "duplicates", ("keep", "drop")) == "drop"
        if drop and "train" not in options:
            raise BenchmarkError(describe("option duplicates=drop", "train=FOLDER to compare with", "none"))
        found = read(data, options.get("audio"))
        counts = Counter(found.counts)
        twice = len(found.rows) - len(set(found.contents))
        if twice:
            counts["questions about a clip that an earlier question has"] = twice
        known: set[int] = set()
        if "train" in options:
            known = set(heard_in_both(read(options["train"], options.get("train_audio")), found))
            counts["clip also in the training questions"] = len(known)
        rows = [n for n in range(len(found.rows)) if not (drop and n in known)]
        if not rows:
            raise BenchmarkError(describe(str(data), "a question whose clip is not in the training data", "none"))
        questions = [found.rows[n] for n in rows]
        items = [item_of(question, found.contents[n]) for question, n in zip(questions, rows, strict=True)]
        errors = {question.id: why for question in questions if (why := _unusable(question))}
        sounds = [question.audio for question in questions]
        if not any(sound.is_file() if isinstance(sound, Path) else sound for sound in sounds):
            raise BenchmarkError(describe(str(data), f"sounds such as {sounds[0]}", "none of them", NAME_SOUNDS))
        return Collection(items, errors, dict(counts), [found.fingerprint], lambda index: questions[index].waveform())

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """The official files. Options: ``label`` (Surname_INST_task5_1), ``key`` (id or stem), ``answer`` (text or
        letter), ``meta`` (a YAML file that fills DCASE's blocks). Unanswered questions stay empty and are told."""
        check_options(self.name, options, ("label", "key", "answer", "meta"))
        key: Key = one_of(options, "key", ("id", "stem"))
        form: AnswerForm = one_of(options, "answer", ("text", "letter"))
        answered = [_answered(row) for row in rows]
        meta = read_yaml(options["meta"]) if "meta" in options else {}
        label = options.get("label", "Surname_INST_task5_1")
        paths = write_submission(answered, out, label=label, key=key, answer=form, meta=meta)
        problems = validate_submission(paths[-1], answered, key=key, answer=form, unanswered=True)
        if problems:
            raise BenchmarkError(problems[0])
        empty = sum(row.choice is None for row in answered)
        if empty:
            print(f"{paths[0]}: no answer to {empty} of {len(answered)} questions, left empty.", file=sys.stderr)
        return paths


def item_of(question: Question, content: str) -> Item:
    """A question as an item; clips of equal bytes are one clip."""
    return Item(
        id=question.id,
        question=question.question,
        choices=list(question.choices),
        gold=question.gold,
        question_type=question.question_type,
        format="dcase_aqa",
        clip=content,
        meta={"part": question.part, "stem": question.stem, "options": list(question.options)},
    )


def _unusable(question: Question) -> str:
    if question.problem:
        return f"question '{question.id}': {question.problem}."
    if isinstance(question.audio, Path) and not question.audio.is_file():
        return describe(str(question.audio), "an audio file", "no such file")
    return ""


def _answered(row: Prediction) -> Answered:
    options = row.meta.get("options")
    if not isinstance(options, list) or len(options) != len(row.choices):
        raise BenchmarkError(describe(f"prediction '{row.id}'", "the options of a DCASE question in its meta", "none"))
    index = None if row.error else chosen(row)[0]
    return Answered(row.id, str(row.meta.get("stem") or row.id), tuple(options), index)


BENCHMARK = DcaseAqa()
