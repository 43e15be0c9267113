"""Drafts of one side, made samples and written into its shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from audio_llm.errors import DataError, describe
from audio_llm.shards.schema import Sample
from audio_llm.shards.writer import ShardWriter
from data_prep.manifest.packing import contents_of
from data_prep.manifest.recipe import ManifestConfig
from data_prep.manifest.rows import Draft, Reason, Reject
from data_prep.scenes import pool


def fill(
    folder: Path,
    side: str,
    rows: Sequence[Draft],
    jobs: pool.Jobs,
    seen: dict[str, str],
    config: ManifestConfig,
    quiet: bool,
    reject: Callable[[Sequence[Reject]], None],
) -> list[Sample]:
    """Write the shards of one side; its samples without their audio. `seen` learns whose every sound is; rows that are
    no sample go to `reject`, which may stop the run. What an earlier run finished is taken over.

    Raises :class:`DataError` where no row is a sample.
    """
    kept: list[Sample] = []
    asked: set[tuple[str, ...]] = set()
    first: Reject | None = None

    def question(sample: Sample) -> tuple[str, ...]:
        further = (sample.answer or "",) if config.reader.several_answers else ()
        return *further, *_question(sample)

    with ShardWriter(folder, samples_per_shard=config.samples_per_shard) as writer:
        for sample in writer.stored():
            seen.update(dict.fromkeys(contents_of(sample), side))
            asked.add(question(sample))
            kept.append(sample)
        todo = [row for row in rows if row.sample.id not in writer]
        for draft, made in zip(todo, jobs.each("pack", todo, side, quiet), strict=True):
            refused = made.reject
            if made.packed is not None:
                sample = made.packed.sample
                contents = contents_of(sample)
                owner = next((seen[content] for content in contents if seen.get(content, side) != side), side)
                if owner != side:
                    refused = Reject(draft.where, Reason.OTHER_SIDE, f"the sound of '{draft.name}' is in {owner}.")
                elif question(sample) in asked:
                    refused = Reject(draft.where, Reason.REPEATED, f"'{draft.name}': {sample.question}")
                else:
                    seen.update(dict.fromkeys(contents, side))
                    asked.add(question(sample))
                    kept.append(writer.add(made.packed))
            if refused is not None:
                first = first or refused
                reject([refused])
    if not kept:
        told = f"The first: {first.told}." if first else None
        raise DataError(describe(f"split '{side}'", "samples", f"none: all of its {len(rows)} rows are rejects", told))
    return kept


def _question(sample: Sample) -> tuple[str, ...]:
    """What a sample asks, about which samples of sound; in another order the choices are the same."""
    stored = [info.sha256 or "" for info in sample.audio]
    sounds = " ".join(stored if all(stored) else contents_of(sample))
    return sounds, str(sample.places), sample.question or "", *sorted(sample.choices)


def about(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a manifest says of one side."""
    seconds = sum(info.seconds for sample in samples for info in sample.audio)
    recordings = {recording for sample in samples for recording in sample.recordings}
    return {"samples": len(samples), "seconds": round(seconds, 3), "groups": len(recordings)}
