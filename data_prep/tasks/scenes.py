"""Scenes with questions, as shards: what a recipe of ``audio-llm prep`` without a ``kind`` makes."""

from __future__ import annotations

from data_prep.scenes import figures, simulate
from data_prep.tasks.base import Kind

KIND = Kind(
    "scenes",
    simulate.SceneConfig,
    simulate.prepare,
    flags={"sounds": "sounds.folder", "folds": "folds"},
    draw=figures.draw,
)
