"""MMAU, massive multi-task audio understanding and reasoning (Sakshi et al., ICLR 2025): test-mini and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_llm.audio import Waveform, decode
from audio_llm.datasets.mmau import audio_file, question_file
from audio_llm.datasets.records import Record, read_records
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import content_hash, write_json
from eval.benchmarks.base import (
    BenchmarkError,
    Collection,
    Item,
    as_asked,
    check_options,
    refuse_doubles,
    with_answer,
    without_sound,
)
from eval.predictions import Prediction
from eval.scorers.mmau import DIFFICULTIES, KEY, TASKS, extracted_text, raw_text, resolved_text

REQUIRED = ("id", "audio_id", "question", "choices", "task", "difficulty")
# What the organisers' file says about an item besides question, choices and answer: kept, for tables and submissions.
FACTS = ("audio_id", "dataset", "task", "split", "category", "sub-category", "difficulty")


class Mmau:
    """The official JSON array and a folder of audio.

    `data` is the JSON file, or a folder that holds exactly one ``mmau*.json``. Option ``audio``: the folder that
    ``audio_id`` (``./test-mini-audios/ID.wav``) is relative to, or that holds the files themselves; default: where the
    JSON lies. An item without an answer belongs to the hidden test: it is asked and never scored.
    """

    name = "mmau"
    title = "MMAU"
    scorers = (
        "option-resolution",
        "mmau-official",
        "mmau-official-extracted",
        "mmau-official-resolved",
        "letter",
        "tag-exact",
        "letter-or-random",
    )
    groups = ("task", "difficulty", "sub-category")
    published_rule = "mmau-official"

    def open(self, data: Path, **options: str) -> Collection:
        """The items of `data`. Raises children of ``AudioLLMError`` for what is not MMAU's file,
        naming row and key."""
        check_options(self.name, options, ("audio",))
        path = question_file(data)
        records = questions_of(path)
        folder = Path(options["audio"]) if "audio" in options else path.parent
        if not folder.is_dir():
            raise BenchmarkError(describe(f"option audio={folder}", "a folder of MMAU's audio", "none"))
        items, counts = [], Counter[str]()
        for record in records:
            items.append(_item(record))
            counts.update(_defects(record.values))
        refuse_doubles(items, str(path))
        files = [audio_file(folder, str(record.values["audio_id"])) for record in records]
        missing = {
            item.id: str(item.meta["audio_id"]) for item, file in zip(items, files, strict=True) if not file.is_file()
        }
        errors = without_sound(missing, folder, path, len(items), counts)

        def load(index: int) -> Waveform:
            return decode(files[index], name=f"item '{items[index].id}'")

        return Collection(items, errors, dict(counts), [content_hash(path)], load)

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """``submission.json``: the official array, each answer under ``model_output``, which the official scorer reads.

        Option ``form``: ``resolved`` (default: the text of the option the reply resolves to, else its extracted
        words), ``extracted`` or ``raw``. A question that could not be asked has an empty answer, and stays in.
        """
        check_options(self.name, options, ("form",))
        form = options.get("form", "resolved")
        if form not in FORMS:
            raise ConfigError(f"option form={form}: expected one of {', '.join(FORMS)}{nearest(form, FORMS)}.")
        path = out / "submission.json"
        write_json(path, [_record(row) | {KEY: FORMS[form](row) or ""} for row in rows])
        return [path]

    def read_answers(self, path: Path, **options: str) -> list[Prediction]:
        """Predictions from a file in the official shape, ours or another harness's.

        Option ``key``: where the answers lie, ``model_output`` by default. An item without it, or with something else
        than text, becomes a row with an error: it is left out of accuracies, and counted. Raises
        :class:`BenchmarkError` where no item has the key, and for an item that occurs twice.
        """
        check_options(self.name, options, ("key",))
        key = options.get("key", KEY)
        records = questions_of(path)
        if not any(key in record.values for record in records):
            near = sorted({name for record in records for name in record.values if "model" in name or "pred" in name})
            cure = f"If that is where the answers are: --option key={near[0]}." if near else None
            raise BenchmarkError(describe(str(path), f"answers under the key '{key}'", ", ".join(near) or "none", cure))
        rows = [_answered(record, key) for record in records]
        refuse_doubles(rows, str(path))
        return rows


def _answered(record: Record, key: str) -> Prediction:
    item, said = with_answer(_item(record))[0], record.values.get(key)
    problem = "" if isinstance(said, str) else f"its '{key}' is {said!r}, not text"
    return Prediction(
        **as_asked(item),
        raw=said if isinstance(said, str) else "",
        error=problem if key in record.values else f"the file has no '{key}' for this item",
    )


def questions_of(path: Path) -> list[Record]:
    """The rows of MMAU's file. Raises children of ``AudioLLMError`` where it is malformed or holds none."""
    rows = read_records(path)
    if not rows:
        raise BenchmarkError(describe(str(path), "at least one question", "an empty array"))
    return rows


def _item(row: Record) -> Item:
    record, where = row.values, row.where
    for name in REQUIRED:
        if name not in record:
            raise row.lacks(name)
    for name, known in (("task", TASKS), ("difficulty", DIFFICULTIES)):
        if record[name] not in known:
            found = f"{record[name]!r}{nearest(str(record[name]), known)}"
            raise BenchmarkError(describe(f"{where}: {name}", f"one of {', '.join(known)}", found))
    return Item(
        id=row.identity("id"),
        question=row.text("question"),
        choices=row.texts("choices"),
        gold=row.text("answer", default=""),
        question_type=str(record["task"]),
        format="mmau",
        clip=row.text("audio_id"),
        meta={name: record[name] for name in FACTS if name in record},
    )


def _defects(record: Mapping[str, Any]) -> list[str]:
    """What is odd about an item of the published file, kept as it is and counted."""
    choices, answer = record["choices"], record.get("answer")
    found = ["repeated choices"] if len(set(choices)) < len(choices) else []
    if not answer:
        found.append("answer hidden")
    return found


def _record(row: Prediction) -> dict[str, Any]:
    facts = {name: row.meta[name] for name in FACTS if name in row.meta}
    answer = {"answer": row.gold} if row.gold else {}
    return {"id": row.id, "question": row.question, "choices": row.choices, **answer, **facts}


def _resolved_or_extracted(row: Prediction) -> str | None:
    return resolved_text(row) or extracted_text(row)


FORMS: dict[str, Callable[[Prediction], str | None]] = {
    "resolved": _resolved_or_extracted,
    "extracted": extracted_text,
    "raw": raw_text,
}

BENCHMARK = Mmau()
