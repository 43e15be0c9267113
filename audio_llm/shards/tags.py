"""Tags of samples: what is known of each beside its shards, and which samples a recipe chooses by it.

``audio-llm filter`` writes ``tags.jsonl`` into a folder of its own, ``SHARDS/tags`` by default; shards are not written
again. Its first line tells whose tags they are (:class:`Tags`), every other one has a sample's ``id`` and its tags, by
name numbers or texts. A sample may lack a tag: no condition on it is met then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.errors import ConfigError, ShardError, describe, nearest
from audio_llm.files import parse_json, write_lines
from audio_llm.shards.index import ShardIndex, data_hash
from audio_llm.shards.remote import address

FOLDER, FILE = "tags", "tags.jsonl"
VERSION = 1
TAGS_KEY = "tags"  # of a `where`: the folder of the tags, where it is not beside the shards
BINS = 10  # of a histogram of numbers that are no counts
MOST_VALUES = 12  # different numbers that a histogram names one by one


@dataclass
class Tags:
    """The tags of the samples of one shard folder: `data` is its :func:`data_hash`, `samples` how many it has, and
    `about` how the tags were found. `rows` are tags by sample id."""

    data: str
    samples: int
    about: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, float | str]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put ``tags.jsonl`` into `folder`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {"version": VERSION, "data": self.data, "samples": self.samples, **self.about}
        write_lines(folder / FILE, [head, *({"id": key, **row} for key, row in self.rows.items())])

    @classmethod
    def read(cls, folder: Path) -> Tags:
        """The tags of `folder`. :class:`ShardError` where there are none, or they are not whole."""
        path, cure = folder / FILE, "Make them with: audio-llm filter MODEL SHARDS."
        if not path.is_file():
            raise ShardError(describe(str(path), "tags of samples", "no such file", cure))
        try:
            head, *rows = [
                parse_json(line, once=True) for line in path.read_text(encoding="utf-8").rstrip().split("\n")
            ]
            version, data, samples = head.pop("version"), str(head.pop("data")), int(head.pop("samples"))
            tags = cls(data, samples, head, {str(row.pop("id")): _checked(row) for row in rows})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ShardError(
                describe(str(path), "a line about the tags and one a sample", f"others ({error!r})", cure)
            ) from error
        if version != VERSION or not len(tags.rows) == len(rows) == samples:
            twice = f", {len(rows) - len(tags.rows)} of them twice" if len(tags.rows) < len(rows) else ""
            found = f"version {version} with {len(rows)} of {samples} samples{twice}"
            raise ShardError(describe(str(path), f"version {VERSION}, whole", found, cure))
        return tags

    def of(self, index: ShardIndex, folder: Path) -> None:
        """Make sure that these tags, read from `folder`, are of the shards of `index`: :class:`ShardError` tells what
        is missing where they are of others."""
        shards, cure = index.remote.url if index.remote else str(index.folder), "Make them again: audio-llm filter."
        name = f"tags {folder / FILE} of {shards}"
        if missing := [key for key in (each.decode() for each in index.keys) if key not in self.rows]:
            found = f"none for {len(missing)}, the first '{missing[0]}'"
            raise ShardError(describe(name, f"tags for all {len(index)} samples", found, cure))
        if self.samples != len(index):
            raise ShardError(describe(name, f"tags for {len(index)} samples", f"tags for {self.samples}", cure))
        if self.data != (here := data_hash([shards])):
            raise ShardError(describe(name, f"tags of shards of the hash {here}", f"of {self.data}", cure))

    @property
    def names(self) -> list[str]:
        """All tags that a sample has, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def text(self) -> str:
        """How often each tag has which value, a few lines for a terminal."""
        about = ", ".join(f"{name} {_plain(value)}" for name, value in self.about.items() if value not in ({}, [], ""))
        lines = [f"tags of {self.samples} samples" + (f" ({about})" if about else "")]
        for name in self.names:
            values = [row[name] for row in self.rows.values() if name in row]
            shown = "  ".join(f"{value} {n} ({n / len(values):.0%})" for value, n in _histogram(values))
            without = f"  none {self.samples - len(values)}" if len(values) < self.samples else ""
            lines.append(f"  {name}: {shown}{without}")
        return "\n".join(lines)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, dict)) else str(value)


def _histogram(values: list[float | str]) -> list[tuple[str, int]]:
    """Texts and few numbers by value; of many numbers ten stretches of equal width."""
    counts = Counter(values)
    if any(isinstance(value, str) for value in counts):
        return [(str(value), n) for value, n in counts.most_common(MOST_VALUES)]
    if len(counts) <= MOST_VALUES:
        return [(f"{value:g}", counts[value]) for value in sorted(counts, key=float)]
    heights, edges = np.histogram([float(value) for value in values], BINS)
    stretches = zip(edges[:-1], edges[1:], heights.tolist(), strict=True)
    return [(f"{low:.2g}…{high:.2g}", n) for low, high, n in stretches if n]


def _checked(row: dict[str, Any]) -> dict[str, float | str]:
    """The tags that a line states; null is none. Raises :class:`ValueError`."""
    told = {name: value for name, value in row.items() if value is not None}
    if wrong := {name: value for name, value in told.items() if not (isinstance(value, str) or _is_number(value))}:
        raise ValueError(f"tags that are no number and no word: {wrong}")
    return told


def check_where(where: Mapping[str, Any], name: str) -> None:
    """:class:`ConfigError` for what is no condition: a value, a list of values, or ``{min: …, max: …}``."""
    conditions = {tag: wanted for tag, wanted in where.items() if tag != TAGS_KEY}
    if not conditions:
        cure = "For instance where: {gain: {min: 0.25}}; audio-llm inspect SHARDS lists the tags."
        raise ConfigError(describe(name, "a condition on a tag", "none", cure))
    if not isinstance(where.get(TAGS_KEY, ""), (str, Path)):
        raise ConfigError(describe(f"{name}.{TAGS_KEY}", "the folder of the tags", repr(where[TAGS_KEY])))
    for tag, wanted in conditions.items():
        values = wanted if isinstance(wanted, list) and wanted else [wanted]
        limits = wanted if isinstance(wanted, dict) else {}
        bounds = bool(limits) and set(limits) <= {"min", "max"} and all(map(_is_number, limits.values()))
        if not bounds and not all(isinstance(value, str) or _is_number(value) for value in values):
            expected = "a number, a word, a list of them, or {min: NUMBER, max: NUMBER}"
            raise ConfigError(describe(f"{name}.{tag}", expected, repr(wanted)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def tags_folder(path: str | Path, where: Mapping[str, Any]) -> Path:
    """Where the tags of the shards at `path` lie: what `where` says, else beside them."""
    if TAGS_KEY in where:
        return Path(where[TAGS_KEY])
    if url := address(path):
        cure = f"Say {TAGS_KEY}: FOLDER in it, what audio-llm filter was told by --out."
        raise ConfigError(
            describe(f"where of {url}", "the folder of the tags of shards behind an address", "none", cure)
        )
    return Path(path) / FOLDER


def choose(index: ShardIndex, where: Mapping[str, Any], path: str | Path) -> ShardIndex:
    """The samples of `index`, of the shards at `path`, that meet all conditions of `where`.

    Raises :class:`ConfigError` for a tag that no sample has, a word where a tag has numbers, and where nothing is left;
    :class:`ShardError` for tags of other shards.
    """
    folder, path = tags_folder(path, where), index.remote.url if index.remote else path
    tags = Tags.read(folder)
    tags.of(index, folder)
    kept, untagged = np.ones(len(index), bool), 0
    rows = [tags.rows[key.decode()] for key in index.keys]
    for tag, wanted in where.items():
        if tag == TAGS_KEY:
            continue
        if tag not in tags.names:
            more = nearest(tag, tags.names)
            raise ConfigError(describe(f"where: {tag}", f"a tag of {folder / FILE}", f"none of that name{more}"))
        has = [row.get(tag) for row in rows]
        _check_kind(tag, wanted, (value for value in has if value is not None))
        untagged = max(untagged, sum(value is None for value in has))
        kept &= np.array([value is not None and _meets(value, wanted) for value in has], bool)
    told = ", ".join(
        f"{tag} {_condition(wanted)}{_missing(wanted, {row.get(tag) for row in rows})}"
        for tag, wanted in where.items()
        if tag != TAGS_KEY
    )
    without = f", {untagged} have no such tag" if untagged else ""
    told = f"{path}: {int(kept.sum())} of {len(index)} samples are chosen ({told}{without})"
    if not kept.any():
        cure = "audio-llm inspect SHARDS shows how often each tag has which value."
        raise ConfigError(describe(f"where of {path}", "samples that meet it", told.partition(": ")[2], cure))
    return index.part(kept, told)


def _check_kind(tag: str, wanted: Any, values: Iterable[float | str]) -> None:
    words = any(isinstance(value, str) for value in values)
    asked = list(wanted.values()) if isinstance(wanted, dict) else wanted if isinstance(wanted, list) else [wanted]
    if any(isinstance(value, str) != words for value in asked):
        expected = "words, as this tag has" if words else "numbers, as this tag has"
        raise ConfigError(describe(f"where: {tag}", expected, _condition(wanted)))


def _meets(value: float | str, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return not isinstance(value, str) and wanted.get("min", -math.inf) <= value <= wanted.get("max", math.inf)
    return value in wanted if isinstance(wanted, list) else value == wanted


def _condition(wanted: Any) -> str:
    if isinstance(wanted, dict):
        signs = {"min": "≥", "max": "≤"}
        return " and ".join(f"{signs[limit]} {value:g}" for limit, value in wanted.items())
    return "one of " + _plain(wanted) if isinstance(wanted, list) else f"= {wanted}"


def _missing(wanted: Any, there: Collection[Any]) -> str:
    """Which of several values no sample has: others are chosen, and nobody would see that one is misspelt."""
    lost = [value for value in wanted if value not in there] if isinstance(wanted, list) else []
    return f" (none is {', '.join(map(str, lost))})" if lost else ""
