"""Classes of whole clips: one of several (``classification``), or any number of them (``tagging``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from audio_llm.tasks.base import EncoderTask, TaskRecipe

if TYPE_CHECKING:
    from audio_llm.model.encoder import AudioEncoder
    from audio_llm.tasks.classification.task import TaggingTask


@dataclasses.dataclass
class ClassificationRecipe(TaskRecipe):
    """Recipe of ``audio-llm train`` with ``task: classification`` or ``tagging``."""

    clip_level: ClassVar[bool] = True

    task: str = "classification"  # or tagging
    head: dict[str, Any] = dataclasses.field(default_factory=dict)  # name, dropout
    label_smoothing: float = 0.0  # share of the target that all classes get alike


class Classification(EncoderTask):
    """Classes that exclude each other; ``predict`` also takes folders of folds (ensembles) and published files."""

    name = "classification"
    recipe = ClassificationRecipe
    models = (
        "config.json of 'audio-llm train', folds.json of a finished 'audio-llm folds', model_fold_N_best.safetensors, "
        "or a published classifier"
    )
    formats = ("table", "json", "block")
    options = ("hop", "hearing", "fold", "labels")

    def train(self, recipe: TaskRecipe) -> None:
        from audio_llm.tasks.trainer import train

        train(recipe)

    def module(self, encoder: AudioEncoder, labels: Sequence[str], recipe: ClassificationRecipe) -> TaggingTask:
        from audio_llm.tasks.classification.task import ClassificationTask, TaggingTask

        kind = TaggingTask if self.name == "tagging" else ClassificationTask
        return kind(encoder, labels, recipe.head, smoothing=recipe.label_smoothing, hearing=recipe.hearing)

    def recognises(self, path: Path) -> bool:
        """A folder of training or of folds, or a published file; a folder that names no task classifies."""
        from audio_llm.tasks.classification.predict import recognises

        return recognises(path)

    def predictor(self, path: Path, options: Mapping[str, Any]) -> Callable[[str, str], str]:
        from audio_llm.tasks.classification.predict import as_text, load, named, predict_file

        classifier, hop = load(path, options.get("hearing"), options.get("fold")), options.get("hop")
        if options.get("labels"):
            classifier.labels = named(classifier.labels, options["labels"])
        return lambda file, form: as_text(file, predict_file(classifier, file, hop), form)


class Tagging(Classification):
    """Any number of classes at once."""

    name = "tagging"

    def recognises(self, path: Path) -> bool:
        from audio_llm.model.validate import read_facts

        return read_facts(path).get("task") == self.name


CLASSIFICATION, TAGGING = Classification(), Tagging()
