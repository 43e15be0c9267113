"""Files of answers in the layout that a benchmark's organisers read, written by a declaration and read back."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from audio_llm.datasets.records import NoRecord, each_line, each_record
from audio_llm.errors import describe, nearest, require
from audio_llm.files import atomic_file, write_atomically, write_json, write_lines
from eval.predictions import Prediction
from eval.scorers.mmau import answer_text

FORMS = (".csv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Layout:
    """One form of a submission: the name of its `file` (CSV, JSON, JSON lines, Parquet), and its `columns`, their
    name → what it holds: a word of :data:`TOLD` or a key that the benchmark keeps. With `whole` the organisers' row
    stands before them. `longest`: characters that reasoning may have, the rest is cut off and told; 0 for any number.
    """

    file: str
    columns: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    longest: int = 0


def _choice(row: Prediction) -> int | None:
    return None if row.error else row.reply().choice


def _option(row: Prediction) -> str:
    """The text of the option that the reply resolves to, "" where it resolves to none: nothing is guessed."""
    place = _choice(row)
    return "" if place is None else row.choices[place]


def _letter(row: Prediction) -> str:
    """The letter of that option."""
    place = _choice(row)
    if place is None:
        return ""
    return str(_letters(row)[place])


def _letters(row: Prediction) -> Sequence[str]:
    """The letters of its choices: those of the file, unless their order was drawn here."""
    own = row.meta.get("letters") if "order" not in row.meta else None
    return list(own or ascii_uppercase[: len(row.choices)])


# What a column may hold.
TOLD: dict[str, Callable[[Prediction], Any]] = {
    "id": lambda row: row.id,
    "question": lambda row: row.question,
    "choices": lambda row: row.choices,
    "answer": lambda row: row.gold,
    "order": lambda row: row.meta.get("order"),
    "option": _option,
    "letter": _letter,
    "words": answer_text,
    "raw": lambda row: row.raw,
    "thinking": lambda row: row.reply().thinking or "",
}


def check_layout(layout: Layout, where: str, known: Sequence[str]) -> None:
    """Raise ``ValueError`` for a file of another form and a column that holds nothing of `known`."""
    path = Path(layout.file)
    if path.suffix not in FORMS or path.name != layout.file:
        raise ValueError(describe(f"{where}.file", f"a name that ends in {', '.join(FORMS)}", f"'{layout.file}'"))
    if not layout.columns:
        raise ValueError(describe(f"{where}.columns", "at least one", "none"))
    for column, told in layout.columns.items():
        if told not in known:
            found = f"'{told}'{nearest(told, known)}"
            raise ValueError(describe(f"{where}.columns.{column}", f"one of {', '.join(known)}", found))


@dataclass(frozen=True)
class Form:
    """A layout with what a benchmark knows for it: `row_of`, the organisers' row of a question, and `identity`, the key
    that is known by there ("": its place)."""

    layout: Layout
    row_of: Callable[[Prediction], Mapping[str, Any]]
    identity: str

    def write(self, rows: Sequence[Prediction], out: Path) -> Path:
        """Write `rows`, one a question, into the folder `out`. How many have no answer, or a cut reasoning, is told."""
        path, entries = out / self.layout.file, self._entries(rows)
        if path.suffix == ".json":
            write_json(path, entries)
        elif path.suffix == ".jsonl":
            write_lines(path, entries)
        elif path.suffix == ".parquet":
            _write_table(path, entries)
        else:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(entries[0] if entries else self.layout.columns)
            table.writerows([_cell(value) for value in entry.values()] for entry in entries)
            write_atomically(path, text.getvalue())
        empty = sum(_choice(row) is None if row.choices else not answer_text(row) for row in rows)
        if empty:
            print(f"{path}: no option in {empty} of {len(rows)} answers.", file=sys.stderr)
        longest = self.layout.longest
        if longest and "thinking" in self.layout.columns.values():
            cut = sum(len(row.reply().thinking or "") > longest for row in rows)
            if cut:
                print(f"{path}: reasoning cut at {longest} characters in {cut} answers.", file=sys.stderr)
        return path

    def validate(self, path: Path, rows: Sequence[Prediction]) -> list[str]:
        """What keeps a file, ours or anybody's, from being a submission of the questions of `rows`, in sentences: a
        question that is missing, twice or unknown, other columns, an option or letter that its question does not have.
        """
        entries = self._entries(rows)
        expected = {self._name(entry, place): place for place, entry in enumerate(entries)}
        problems: list[str] = []
        seen: set[str] = set()
        for place, found in enumerate(each_line(path) if path.suffix == ".csv" else each_record(path)):
            if isinstance(found, NoRecord):
                problems.append(str(found))
                continue
            name = self._name(found.values, place)
            if name in seen or name not in expected:
                what = "a second answer to it" if name in seen else "a question that was not asked"
                problems.append(describe(f"{found.where}: '{name}'", "one answer to each question", what))
                continue
            seen.add(name)
            if list(found.values) != list(entries[expected[name]]):
                columns = ", ".join(entries[expected[name]])
                problems.append(describe(found.where, columns, ", ".join(found.values)))
                continue
            for column, told in self.layout.columns.items():
                may, value = _may_be(told, rows[expected[name]]), found.values[column]
                if may is not None and value not in may:
                    problems.append(describe(f"{found.where}: '{column}'", ", ".join(may[1:]), f"'{value}'"))
        missing = [name for name in expected if name not in seen]
        if missing:
            told = f"no answer to {len(missing)}: {missing[0]}"
            problems.append(describe(str(path), f"{len(expected)} questions", told))
        return problems

    def _entries(self, rows: Sequence[Prediction]) -> list[dict[str, Any]]:
        layout, entries = self.layout, []
        for row in rows:
            entry = dict(self.row_of(row)) if layout.whole else {}
            for column, told in layout.columns.items():
                value = TOLD[told](row) if told in TOLD else row.meta.get(told)
                cut = layout.longest if told == "thinking" else 0
                entry[column] = str(value)[:cut] if cut else value
            entries.append(entry)
        if layout.file.endswith(".parquet"):  # every row of a table has every column
            columns = list(dict.fromkeys(column for entry in entries for column in entry))
            entries = [{column: _storable(entry.get(column)) for column in columns} for entry in entries]
        return entries

    def _name(self, values: Mapping[str, Any], place: int) -> str:
        """What a row is known by: its id where the file has one, else its place."""
        told = (column for column, told in self.layout.columns.items() if told == "id")
        column = next(told, self.identity if self.layout.whole else "")
        return str(values.get(column)) if column else str(place)


def _storable(value: Any) -> Any:
    """A value of a table, whose texts cannot hold half of a pair of surrogates: its escape stands for it."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _write_table(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns as Parquet; a column of values that no type of Parquet holds together is JSON texts."""
    require("pyarrow", "Writing Parquet", "train")
    import pyarrow as arrow
    from pyarrow import parquet

    def column(values: list[Any]) -> Any:
        try:
            found = arrow.array(values)
            parquet.write_table(arrow.table({"column": found}), io.BytesIO())
        except (arrow.ArrowException, OverflowError, UnicodeError, TypeError):
            return arrow.array([None if value is None else json.dumps(value) for value in values], arrow.string())
        return found

    names = list(entries[0]) if entries else []
    table = arrow.table({name: column([entry[name] for entry in entries]) for name in names})
    with atomic_file(path) as temporary:
        parquet.write_table(table, temporary)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else "" if value is None else value


def _may_be(told: str, row: Prediction) -> list[str] | None:
    """All that a column may hold for a question, nothing first; None where it may hold anything."""
    return {"option": ["", *row.choices], "letter": ["", *_letters(row)]}.get(told)
