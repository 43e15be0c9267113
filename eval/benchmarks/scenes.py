"""Shard folders with questions: simulated scenes, and everything else that ``audio-llm prep`` writes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audio_llm.errors import ConfigError, ShardError, describe
from audio_llm.files import content_hash
from audio_llm.language.clauses import check_told
from eval.benchmarks.base import Collection, Item, check_options
from eval.predictions import Prediction


class Scenes:
    """Samples of WebDataset shards; an unreadable sample is an item with an error."""

    name = "scenes"
    title = "Questions of shard folders"
    scorers = (
        "option-resolution",
        "letter",
        "mmau-official",
        "mmau-official-extracted",
        "mmau-official-resolved",
        "tag-exact",
        "dcase-aqa",
        "spatial-sound-qa",
    )
    groups = ("question_type", "format")

    def open(self, data: Path, **options: str) -> Collection:
        """Items of the shard folder `data`. Raises :class:`ShardError` where it is none."""
        from audio_llm.shards.reader import ShardDataset

        check_options(self.name, options, ())
        dataset = ShardDataset([data])
        items: list[Item] = []
        errors: dict[str, str] = {}
        for row in range(len(dataset)):
            try:
                items.append(item_of(dataset.load_sample(row)))
            except ShardError as error:
                name = f"{data.name}-row-{row}"
                items.append(Item(name, "", [], "", "unreadable", "unreadable", name))
                errors[name] = str(error)
        # sizes.json itself holds a checksum per shard; without it the questions must tell one folder from another.
        digest = content_hash(data / "sizes.json") or hashlib.sha256(repr(items).encode()).hexdigest()
        return Collection(items, errors, {}, [digest], dataset.load_waveforms)

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        raise ConfigError("benchmark 'scenes': there is nobody to submit its answers to; predictions.jsonl has them.")


def item_of(sample: Any) -> Item:
    """The item that a shard's ``Sample`` becomes. Raises :class:`ShardError` without a question or an answer."""
    if not sample.question or sample.answer is None:
        raise ShardError(describe(f"sample '{sample.id}'", "a question and an answer", "none"))
    meta = dict(sample.meta)
    if meta.get("counterfactual") is not None:
        check_told(meta["counterfactual"], sample.id)
    events = [
        {name: value for name, value in dataclasses.asdict(event).items() if value is not None}
        for event in sample.events
    ]
    sums = [info.sha256 or "" for info in sample.audio]
    clip = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest() if all(sums) else ""
    return Item(
        id=sample.id,
        question=sample.question,
        choices=list(sample.choices),
        gold=sample.answer,
        question_type=str(meta.get("question_type") or sample.task or "question"),
        format=str(meta.get("format") or "scenes"),
        clip=(clip or sample.id)[:16],
        meta=meta,
        events=events,
        audios=max(1, len(sample.audio)),
        places=list(sample.places),
    )


BENCHMARK = Scenes()
