"""Corpora made of recordings: a source and stages, each of which leaves a ledger, and shards where the last one packs.

``funnel.json`` counts what came into each stage and out of it, ``rejects.jsonl`` has every item that fell out, with the
stage and its reason. A folder belongs to the `corpus` that its recipe names; a recipe with other stages goes on in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from audio_llm.files import write_json
from audio_llm.identity import identity_of
from data_prep import text_check
from data_prep.corpus.ledger import hashed
from data_prep.corpus.recipe import CorpusConfig
from data_prep.corpus.stage import FOLDERS
from data_prep.ledger import Ledger, Summary, finished, plain
from data_prep.tasks.base import Kind

FUNNEL = "funnel.json"
FORMAT_VERSION = 1


def prepare(
    config: CorpusConfig, out: Path, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
) -> Summary:
    """Take all items through all stages in `out`. A run that was stopped, or another recipe of the same corpus, goes on
    with what the ledgers lack.

    Raises :class:`ConfigError` when `out` holds another corpus, unless `overwrite`; :class:`DataError` for a source
    without items; what a stage raises when it is opened.
    """
    from data_prep.corpus.endpoint import spent
    from data_prep.corpus.run import Corpus

    config.check()
    free = ("source", "stages", "engine", "seed", "retry")
    identity = identity_of(config, {"format": FORMAT_VERSION}, free=free)
    sides = [name for entry in config.entries for name in getattr(entry.stage, "splits", ())]
    head = {"version": FORMAT_VERSION, "kind": "corpus"}
    ledger = Ledger(out, head, identity, [*sides, *FOLDERS], overwrite)
    earlier = ledger.finished
    if earlier is None:
        ledger.begin()
    corpus = Corpus(config, out, quiet)
    mark = hashed(corpus.read_source(), [(entry.label, entry.fingerprint) for entry in config.entries])
    if earlier and earlier.manifest.get("run") == mark and not config.retry and all(finished(out / s) for s in sides):
        return earlier
    ledger.begin()
    pool = config.opened_engine.pool(out, workers)
    try:
        corpus.run(pool)
    finally:
        pool.close()
    rows = [row.as_dict() for row in corpus.rows]
    write_json(out / FUNNEL, {"corpus": config.corpus, "stages": rows})
    facts = {name: value for found in corpus.facts.values() for name, value in found.items()}
    checked = [text_check.Row(**row) for row in facts.get("text_only_check", ())]
    return ledger.finish(
        corpus.rejects(),
        biased=[row for row in checked if row.biased],
        config=plain(config),
        run=mark,
        funnel=rows,
        costs=spent(out),
        **{"subsets": {}, **facts},
    )


def _details(manifest: Mapping[str, Any]) -> Iterator[str]:
    from audio_llm.inspection.funnel import table

    yield from table(manifest["funnel"])
    for stage, cost in manifest.get("costs", {}).items():
        tokens = f"{cost['prompt_tokens']:.0f} + {cost['completion_tokens']:.0f} tokens"
        requests = f"{cost['requests']:.0f} requests ({cost['failed']:.0f} failed)"
        yield f"{stage} asked a model: {requests}, {tokens}, {cost['seconds']:.1f} s of waiting, all runs together"
    if "questions" in manifest:
        rejects = manifest["question_rejects"]
        kept = manifest["questions"] - sum(rejects.values())
        yield f"{manifest['questions']} questions = {kept} samples + {sum(rejects.values())} rejects"
        yield from (f"  rejected {number:>6}: {reason}" for reason, number in rejects.items())
        yield text_check.table([text_check.Row(**row) for row in manifest["text_only_check"]])


def _draw(out: Path) -> list[Path]:
    from audio_llm.inspection.funnel import draw

    return [draw(out)]


def _parts() -> dict[str, type]:
    from data_prep.corpus.engines import ENGINES
    from data_prep.corpus.engines.base import Running
    from data_prep.corpus.sources import SOURCES
    from data_prep.corpus.stages import STAGES

    return {**SOURCES, **ENGINES, "stage": Running, **STAGES}


KIND = Kind("corpus", CorpusConfig, prepare, draw=_draw, details=_details, parts=_parts)
