"""Sound event localisation and detection (SELD): which sound is where in every 100 ms, and how far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from audio_llm.tasks.base import EncoderTask, TaskRecipe

if TYPE_CHECKING:
    from audio_llm.model.encoder import AudioEncoder
    from audio_llm.tasks.seld.task import SELDTask


@dataclasses.dataclass
class SELDRecipe(TaskRecipe):
    """Recipe of ``audio-llm train`` with ``task: seld``."""

    places: ClassVar[bool] = True

    task: str = "seld"  # what is learnt
    head: dict[str, Any] = dataclasses.field(default_factory=dict)  # elements, frames
    distance_weight: float = 1.0  # metres in the loss (1: as published)


class SELD(EncoderTask):
    name = "seld"
    recipe = SELDRecipe
    models = "an encoder folder with a head of events in time, or a published network that has one"
    formats = ("table", "json", "csv")
    options = ("threshold", "hearing")

    def train(self, recipe: TaskRecipe) -> None:
        from audio_llm.tasks.trainer import train

        train(recipe)

    def module(self, encoder: AudioEncoder, labels: Sequence[str], recipe: SELDRecipe) -> SELDTask:
        from audio_llm.tasks.seld.task import SELDTask

        return SELDTask(encoder, labels, recipe.head, distance_weight=recipe.distance_weight)

    def recognises(self, path: Path) -> bool:
        from audio_llm.tasks.seld.predict import recognises

        return recognises(path)

    def predictor(self, path: Path, options: Mapping[str, Any]) -> Callable[[str, str], str]:
        from audio_llm.tasks.seld.predict import as_text, load, locate_file

        locator = load(path, options.get("threshold"), options.get("hearing", "refuse"))
        return lambda file, form: as_text(file, locate_file(locator, file), locator.labels, form)


TASK = SELD()
