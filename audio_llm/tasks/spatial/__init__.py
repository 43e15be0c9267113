"""The spatial task: which sound a clip has, from where, how far away, and when.

Spatial-AST's clip heads and a linear head on the encoder's time columns learn together, on scenes whose events have
times and places. ``audio-llm eval`` scores the clip heads as published (:mod:`eval.tasks.spatial`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from audio_llm.tasks.base import EncoderTask, TaskRecipe
from audio_llm.tasks.spatial.weights import LossWeights

if TYPE_CHECKING:
    from audio_llm.model.encoder import AudioEncoder
    from audio_llm.tasks.spatial.task import SpatialTask


@dataclasses.dataclass
class SpatialRecipe(TaskRecipe):
    """Recipe of ``audio-llm train`` with ``task: spatial``; `weights` are those of the parts of its loss."""

    task: str = "spatial"  # what is learnt
    weights: LossWeights = dataclasses.field(default_factory=lambda: LossWeights(azimuth_smoothing=8.0))


class Spatial(EncoderTask):
    name = "spatial"
    recipe = SpatialRecipe
    models = "an encoder folder with Spatial-AST's heads"

    def train(self, recipe: TaskRecipe) -> None:
        from audio_llm.tasks.trainer import train

        train(recipe)

    def module(self, encoder: AudioEncoder, labels: Sequence[str], recipe: SpatialRecipe) -> SpatialTask:
        from audio_llm.tasks.spatial.task import SpatialTask

        return SpatialTask(encoder, labels, recipe.weights)

    def recognises(self, path: Path) -> bool:
        """Whether it is an encoder folder of this task, or one that names none, as version 0.1 wrote them."""
        from audio_llm.model.validate import WEIGHTS, read_facts

        facts = read_facts(path)
        mine = facts.get("task", self.name) == self.name and not {"head", "seld"} & set(facts)
        return mine and (path / WEIGHTS).is_file()


TASK = Spatial()
