"""Shards of anybody's questions about sound files, read in one of many formats: the recipe names it and its columns.

``OUT/SPLIT`` is a shard folder for each split, ``OUT/rejects.jsonl`` has every row that is no sample, with a reason of
the closed list :class:`data_prep.manifest.rows.Reason`; rows read = samples + rejects.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_llm import machine
from audio_llm.errors import DataError, describe
from audio_llm.files import write_json, write_lines
from audio_llm.identity import identity_of
from audio_llm.shards.rendering import ROOTS
from audio_llm.shards.schema import Sample
from data_prep import text_check
from data_prep.ledger import REJECTS, Ledger, Summary, digest, finished
from data_prep.manifest import checks, sides
from data_prep.manifest.filling import about, fill
from data_prep.manifest.formats.base import Place
from data_prep.manifest.packing import Packer
from data_prep.manifest.recipe import ManifestConfig
from data_prep.manifest.rows import Draft, Reason, Reject
from data_prep.scenes import pool
from data_prep.tasks.base import Kind

FORMAT_VERSION = 1  # raise it when the same recipe would give other files


def prepare(
    config: ManifestConfig, out: Path, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
) -> Summary:
    """Make the shards in `out`. A run that was stopped goes on; the same recipe gives the same bytes.

    Raises :class:`ConfigError` when `out` holds the data of another recipe, unless `overwrite`; :class:`DataError` for
    rows that cannot be read at all, a split without samples, and more rejects than the recipe allows.
    """
    config.check()
    place = Place(config.path, config.folder, config.options, config.seed)
    drafts, rejects = checks.drafts(config.reader.rows(place), config)
    total = len(drafts) + len(rejects)
    if not total:
        raise DataError(describe(str(config.path), f"rows in the format '{config.format}'", "none"))
    digests = {"format": FORMAT_VERSION, "rows": _hash(drafts, rejects)}
    identity = identity_of(config, digests, ("path", "root"), free=("max_rejects",))
    # What ended before its first shard, by too many rejects, is nothing to keep.
    replace = overwrite or not any(out.glob("*/*.tar"))
    ledger = Ledger(out, {"version": FORMAT_VERSION, "kind": "manifest"}, identity, list(config.splits), replace)
    if (earlier := ledger.finished) and all(finished(out / name) for name in config.splits):
        return earlier
    ledger.begin()
    counter = _Rejects(out, rejects, total, config)
    counter.check()
    if not drafts:
        raise counter.error(describe("rows", "samples", f"none: all {total} are rejects", counter.told()))
    parts, homeless = sides.divided(drafts, config)
    counter.add(homeless)
    seen: dict[str, str] = {}  # the side of every sound
    samples: dict[str, list[Sample]] = {}
    roots = config.reader.roots(place) if config.audio.store == "recipe" and config.reader.roots else None
    with counter, pool.open_pool(workers or machine.cpus(), Packer, (config.audio,)) as jobs:
        for name, rows in parts.items():
            samples[name] = fill(out / name, name, rows, jobs, seen, config, quiet, counter.add)
            if roots:
                write_json(out / name / ROOTS, roots)
    kept = sum(map(len, samples.values()))
    assert kept + len(counter.rejects) == total
    first, last = samples[next(iter(samples))], samples[list(samples)[-1]]
    rows_checked = text_check.check(first, last) if len(samples) > 1 else []
    biased = [row for row in rows_checked if row.biased]
    return ledger.finish(
        [reject.as_dict() for reject in counter.rejects],
        biased=biased,
        config=json.loads(json.dumps(config.plain(), default=str)),
        rows=total,
        rejects_by_reason=dict(sorted(Counter(r.reason.name.lower() for r in counter.rejects).items())),
        subsets={name: about(found) for name, found in samples.items()},
        text_only_check=[row.as_dict() for row in rows_checked],
        text_only_biased=[f"{row.question_type} ({row.predictor})" for row in biased],
    )


def _hash(drafts: Sequence[Draft], rejects: Sequence[Reject]) -> str:
    """Changes with any word of the rows, and with the size of any sound."""
    rows: list[Any] = []
    for draft in drafts:
        sounds = zip(draft.sounds, draft.stretches, strict=True)
        told = [[sound.name, sound.size, *stretch] for sound, stretch in sounds]
        rows.append([draft.sample.to_json(), *(told[0] if len(told) == 1 else told)])
    return digest(rows, [(reject.item, reject.reason.name) for reject in rejects])


class _Rejects:
    """Counts rejects, and stops the run where they are too many. What there is then is in ``rejects.jsonl``."""

    def __init__(self, out: Path, rejects: Sequence[Reject], total: int, config: ManifestConfig) -> None:
        self.out, self.rejects, self.total = out, list(rejects), total
        share = int(config.max_reject_share * total)
        self.limit = share if config.max_rejects is None else config.max_rejects
        self.key = "max_reject_share" if config.max_rejects is None else "max_rejects"

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, DataError):
            self._write()

    def add(self, rejects: Sequence[Reject]) -> None:
        self.rejects += rejects
        self.check()

    def check(self) -> None:
        """Raise :class:`DataError` beyond the limit."""
        if len(self.rejects) > self.limit:
            expected = f"at most {self.limit} of {self.total} rows ({self.key})"
            cure = f"{self.told()}; mend them or raise {self.key}."
            raise self.error(describe("rejects", expected, f"{len(self.rejects)}", cure))

    def told(self) -> str:
        """The first, and where all are."""
        return f"The first: {self.rejects[0].told}. All so far are in {self.out / REJECTS}"

    def error(self, message: str) -> DataError:
        self._write()
        return DataError(message)

    def _write(self) -> None:
        write_lines(self.out / REJECTS, [reject.as_dict() for reject in self.rejects])


def _details(manifest: Mapping[str, Any]) -> Iterator[str]:
    kept = sum(entry["samples"] for entry in manifest["subsets"].values())
    yield f"{manifest['rows']} rows = {kept} samples + {manifest['rejects']} rejects"
    for name, entry in manifest["subsets"].items():
        yield f"  {name:<12} {entry['samples']:>7} samples {entry['groups']:>7} groups {entry['seconds']:>10.1f} s"
    for reason, count in manifest["rejects_by_reason"].items():
        yield f"  rejected {count:>6}: {reason} ({Reason[reason.upper()].value})"
    yield text_check.table([text_check.Row(**row) for row in manifest["text_only_check"]])


KIND = Kind("manifest", ManifestConfig, prepare, details=_details)
