"""The contract of a format: one file of this folder, which ends with ``FORMAT = Format(…)``, or a tuple of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audio_llm.datasets.records import Record
from audio_llm.errors import ConfigError, describe, nearest
from data_prep.manifest.rows import Reason, Reject, RowError

# What a row says: the keys of `columns` in a recipe.
FIELDS = (
    *("audio", "id", "question", "choices", "answer", "thinking", "semantic_elements", "events"),
    *("start", "end", "group", "split", "kind", "places"),
)


def check_once(values: Mapping[str, Any], others: Mapping[str, Any], where: str) -> None:
    """Raise :class:`RowError` for a column that two places (`where`) say, and say differently."""
    for name in values.keys() & others.keys():
        if values[name] != others[name]:
            expected = f"'{name}' once in {where}"
            raise RowError(
                Reason.BROKEN_ROW, f"expected {expected}, found {values[name]!r:.40} and {others[name]!r:.40}."
            )


@dataclass(frozen=True)
class Place:
    """Where rows lie (`path`, a file or a folder), the folder that sounds are named under, and the format's options."""

    path: Path
    root: Path
    options: Mapping[str, Any]
    seed: int = 0


@dataclass(frozen=True)
class Format:
    """A way in which rows lie. `rows` gives a :class:`Record` each, by the names that its source has, or a
    :class:`Reject`; it raises :class:`DataError` for what is wrong with the whole source.

    The value of an audio column is a path under the root, bytes in a table, or a sound of
    :mod:`data_prep.manifest.sounds`; a list of these where a row is about several. `columns` tells what our fields are
    called where the names differ; `options` are the keys it takes under ``options`` in a recipe. `answer_as` is how its
    answers name a choice. `roots` are the folders of ``roots.json`` for sounds that can be rendered when they are read
    (:mod:`audio_llm.shards.rendering`); None where sounds are none. With `several_answers` rows that ask the same about
    a sound are further right answers to it; otherwise they are rejects.
    """

    name: str
    rows: Callable[[Place], Iterator[Record | Reject]]
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    options: Sequence[str] = ()
    answer_as: str = "text"
    roots: Callable[[Place], dict[str, str]] | None = None
    several_answers: bool = False

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise :class:`ConfigError` for an option that this format does not take."""
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                found = f"'{name}'{nearest(str(name), self.options)}"
                raise ConfigError(describe(f"options of format: {self.name}", known, found))
