"""WebDataset shards: sample schema, writer, index, reader. Names load when used: the reader needs torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audio_llm.shards.index import Reject, Row, ShardIndex
    from audio_llm.shards.reader import ShardDataset, epoch_order
    from audio_llm.shards.schema import AudioInfo, Event, Sample, Source, split_of
    from audio_llm.shards.writer import ShardWriter

_HOMES = {
    "index": ("Reject", "Row", "ShardIndex"),
    "reader": ("ShardDataset", "epoch_order"),
    "schema": ("AudioInfo", "Event", "Sample", "Source", "split_of"),
    "writer": ("ShardWriter",),
}
__all__ = [
    "AudioInfo",
    "Event",
    "Reject",
    "Row",
    "Sample",
    "ShardDataset",
    "ShardIndex",
    "ShardWriter",
    "Source",
    "epoch_order",
    "split_of",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"audio_llm.shards.{home}"), name)
    raise AttributeError(f"module 'audio_llm.shards' has no attribute '{name}'")
