"""All items of a source through all stages of a recipe, one stage after the other.

``OUT/items/LABEL.jsonl`` holds what came out of each stage, in the order of the source, ``LABEL.rejects.jsonl`` what
did not. ``OUT/ledger/LABEL.jsonl`` is the stage's ledger (:mod:`data_prep.corpus.ledger`), in the order in which items
were done. What the ledger holds is not computed again; what comes out is read from it alone, so that it is the same
bytes by any engine, with any number of workers and after any stop.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audio_llm.errors import AudioLLMError, DataError, ShardError, describe
from audio_llm.files import TEXT, atomic_file, content_hash
from audio_llm.shards.schema import check_key
from data_prep.corpus.engines.base import Holder, Job, Pool, told
from data_prep.corpus.ledger import Ledger, TornLine, hashed, key_of
from data_prep.corpus.recipe import CorpusConfig, Entry
from data_prep.corpus.stage import FAILED, Item, Reject
from data_prep.scenes.pool import bar

SOURCE = "source"  # what the first row of the funnel is called
BAD_ID, DUPLICATE_ID = "bad_id", "duplicate_id"


@dataclass
class Row:
    """A row of the funnel: `taken` items came in, `given` went on. `computed` of the results are of this run."""

    label: str
    name: str
    taken: int = 0
    given: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    computed: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As ``funnel.json`` has it. Nothing is lost on the way: in = out + rejects."""
        assert self.taken == self.given + sum(self.rejects.values()), self
        return {
            "stage": self.label,
            "name": self.name,
            "in": self.taken,
            "out": self.given,
            "rejects": dict(sorted(self.rejects.items())),
            "computed": self.computed,
            "seconds": round(self.seconds, 3),
        }


class Corpus:
    """A run in the folder `out`. `rows` grow with the stages that are done, `facts` are what stages say."""

    def __init__(self, config: CorpusConfig, out: Path, quiet: bool) -> None:
        self.config, self.out, self.quiet = config, out, quiet
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}

    def read_source(self) -> str:
        """Write what the source has to say; what tells it from any other. Raises :class:`DataError` for a source
        without items."""
        source, row = self.config.opened_source, Row(SOURCE, self.config.opened_source.name)
        seen: set[str] = set()
        first = ""
        with self._written(row) as (keep, drop):
            for found in source.items():
                row.taken += 1
                result = _checked(found, seen, source.reasons)
                if isinstance(result, Reject):
                    first = first or f"{result.id}: {result.detail or result.reason}"
                    drop(result)
                else:
                    seen.add(result.id)
                    keep(result)
        row.computed = row.taken
        self.rows.append(row)
        if not row.given:
            found_words = f"none of {row.taken} is one; the first: {first}" if row.taken else "none"
            raise DataError(describe(f"source '{source.name}'", "items", found_words))
        return hashed(*(content_hash(self._path(SOURCE, kind)) for kind in ("", ".rejects")))

    def run(self, pool: Pool) -> None:
        """Take the items through all stages."""
        before = SOURCE
        for entry in self.config.entries:
            begun = time.monotonic()
            row = Row(entry.label, entry.name)
            step = self._whole if entry.stage.whole else self._each
            step(entry, before, row, pool)
            row.seconds = time.monotonic() - begun
            self.rows.append(row)
            before = entry.label

    def rejects(self) -> Iterator[dict[str, Any]]:
        """All rejects, stage by stage, in the order of the items."""
        for row in self.rows:
            for tree in _lines(self._path(row.label, ".rejects")):
                yield {"item": tree["id"], "stage": row.label, "reason": tree["reason"], "detail": tree["detail"]}

    # -------------------------------------------------------------------------------------------- a stage

    def _each(self, entry: Entry, before: str, row: Row, pool: Pool) -> None:
        """Items one by one, by the engine."""
        needs, mark = entry.stage.needs, entry.fingerprint
        with Ledger(self._ledger(entry.label)) as ledger:
            try:
                self._found(entry, before, row, pool, ledger)
            except TornLine:  # looked for only now, for that takes as long as reading all lines once more
                _sweep(ledger, (key_of(item, needs, mark) for item in self._items(before)))
                row.taken, row.given = 0, 0
                row.rejects.clear()
                self._found(entry, before, row, pool, ledger)

    def _found(self, entry: Entry, before: str, row: Row, pool: Pool, ledger: Ledger) -> None:
        """Compute what the ledger lacks, and write what came out. Raises :class:`TornLine`."""
        stage, mark = entry.stage, entry.fingerprint
        needs, again = stage.needs, (*FAILED, *stage.retryable)

        def todo() -> Iterator[Job]:
            for item in self._items(before):
                key = key_of(item, needs, mark)
                if key not in ledger or (self.config.retry and ledger.lost(key, stage.name, again)):
                    yield Job(key, item)

        number = sum(1 for _ in todo())
        if number:
            done = pool.map(entry.label, stage, entry.running, todo())
            for made in bar(done, number, entry.label, self.quiet):
                ledger.add(made.key, made.line)
                row.computed += 1
        self._gather(before, row, ((item, ledger.find(key_of(item, needs, mark))) for item in self._items(before)))

    def _whole(self, entry: Entry, before: str, row: Row, pool: Pool) -> None:
        """All items at once, in this process."""
        stage, needs = entry.stage, entry.stage.needs
        items = list(self._items(before))
        mark = entry.fingerprint
        mark = hashed(mark, *(key_of(item, needs, mark) for item in items))
        jobs = [Job(key_of(item, needs, mark), item) for item in items]
        if not stage.keeps:
            lines = map(json.loads, self._called(entry, jobs, row))
            self._gather(before, row, zip(items, lines, strict=True))
            return
        with Ledger(self._ledger(entry.label)) as ledger:
            _sweep(ledger, (job.key for job in jobs))
            said = _facts(where := self.out / "ledger" / f"{entry.label}.facts.json")
            if all(job.key in ledger for job in jobs):
                self.facts |= {entry.label: said[mark]} if mark in said else {}
            else:
                made = self._called(entry, jobs, row)
                if entry.label in self.facts:  # before the lines, for with all of them it is not called again
                    with atomic_file(where) as path:
                        path.write_text(json.dumps(said | {mark: self.facts[entry.label]}) + "\n", encoding="utf-8")
                for job, line in zip(jobs, made, strict=True):
                    ledger.add(job.key, line)
            self._gather(before, row, ((job.item, ledger.find(job.key)) for job in jobs))

    def _called(self, entry: Entry, jobs: list[Job], row: Row) -> list[bytes]:
        try:
            holder = Holder(entry.stage, self.out)
            try:
                lines, facts = holder.call(jobs), dict(entry.stage.facts())
                hashed(facts)  # raises for what is no JSON
            finally:
                entry.stage.close()
        except AudioLLMError:
            raise
        except Exception as error:  # of a stage of anybody's
            found = told(error)
            raise AudioLLMError(describe(f"stage '{entry.label}'", "results of all items", found)) from error
        row.computed = len(jobs)
        if facts:
            self.facts[entry.label] = facts
        return lines

    def _gather(self, before: str, row: Row, found: Iterable[tuple[Item, Mapping[str, Any] | None]]) -> None:
        """Write what came out of a stage, by what its ledger says of each item."""
        with self._written(row) as (keep, drop):
            for item, line in found:
                assert line is not None, item.id
                row.taken += 1
                if "reason" in line:
                    drop(Reject(item.id, line["reason"], line["detail"]))
                else:
                    keep(item.adding(**line["fields"]))

    # -------------------------------------------------------------------------------------------- files

    def _path(self, label: str, kind: str = "") -> Path:
        return self.out / "items" / f"{label}{kind}.jsonl"

    def _ledger(self, label: str) -> Path:
        return self.out / "ledger" / f"{label}.jsonl"

    def _items(self, label: str) -> Iterator[Item]:
        return (Item(tree["id"], tree["fields"]) for tree in _lines(self._path(label)))

    @contextlib.contextmanager
    def _written(self, row: Row) -> Iterator[tuple[Any, Any]]:
        """Two functions that write an item that goes on, and a reject, and count them."""
        path, rejects = self._path(row.label), self._path(row.label, ".rejects")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_file(path) as kept,
            atomic_file(rejects) as dropped,
            open(kept, "w", **TEXT) as items,
            open(dropped, "w", **TEXT) as others,
        ):

            def keep(item: Item) -> None:
                row.given += 1
                items.write(json.dumps({"id": item.id, "fields": dict(item.fields)}, ensure_ascii=False) + "\n")

            def drop(reject: Reject) -> None:
                row.rejects[reject.reason] += 1
                others.write(json.dumps(vars(reject), ensure_ascii=False) + "\n")

            yield keep, drop


def _facts(path: Path) -> dict[str, Any]:
    """What a stage of all items said of itself, by the mark of its items and keys."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _sweep(ledger: Ledger, keys: Iterable[str]) -> None:
    if torn := ledger.sweep(keys):
        print(f"note: {ledger.path}: {torn} damaged lines; what they held is computed anew", file=sys.stderr)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _checked(found: Item | Reject, seen: set[str], reasons: tuple[str, ...]) -> Item | Reject:
    """What a source gave; a reject of it where its id cannot be used."""
    if isinstance(found, Reject):
        assert found.reason in reasons, f"'{found.reason}' is none of the source's reasons"
        return found
    try:
        check_key(found.id, f"item {found.id!r}")
    except ShardError as error:
        return Reject(str(found.id), BAD_ID, str(error))
    if found.id in seen:
        return Reject(found.id, DUPLICATE_ID, "another item has this id")
    return found
