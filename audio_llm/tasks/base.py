"""What an encoder is trained on: the interface between the trainer and its tasks, and their registry."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from audio_llm.datasets.sounds import Channels
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.model.encoder import AudioEncoder
from audio_llm.tasks.clips import Augmentation, Batch
from audio_llm.tasks.spatial.heads import LossWeights

# Named by module and class, as encoders are.
TASKS: dict[str, str] = {
    "spatial": "audio_llm.tasks.spatial.task:Localisation",
    "classification": "audio_llm.tasks.classification.task:Classification",
    "tagging": "audio_llm.tasks.classification.task:Tagging",
    "seld": "audio_llm.tasks.seld.task:Localisation",
}


class SupervisedTask(nn.Module):
    """Encoder and heads as one module, so that data-parallel training sees a single forward.

    A child is built from (encoder, labels, recipe). What :meth:`targets` gives are tuples of tensors on the CPU; the
    trainer moves them and hands them to :meth:`forward` and :meth:`observe`.
    """

    clip_level: ClassVar[bool] = False  # labels hold for the whole clip: it may be rolled in time and mixed with others
    places: ClassVar[bool] = False  # nothing is learnt from events without an azimuth and a distance

    def __init__(self, encoder: AudioEncoder, labels: Sequence[str], recipe: EncoderRecipe) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = {name: index for index, name in enumerate(labels)}

    def targets(self, batch: Batch) -> tuple[Any, ...]:
        """Named tuples of tensors for one batch."""
        raise NotImplementedError

    def forward(self, waveform: Tensor, lengths: Tensor, *targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its detached parts for the log."""
        raise NotImplementedError

    def observe(self, waveform: Tensor, lengths: Tensor, targets: tuple[Any, ...], batch: Batch) -> Any:
        """What one validation batch contributes, as a named tuple of plain arrays that processes can exchange."""
        raise NotImplementedError

    def summarise(self, parts: Sequence[Any]) -> dict[str, Any]:
        """Scores of all batches; ``score`` decides which weights are kept (higher is better)."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the encoder folder."""
        raise NotImplementedError


def task_class(name: str) -> type[SupervisedTask]:
    """The class registered under `name`."""
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclasses.dataclass
class EncoderRecipe:
    """Recipe of ``audio-llm train`` with ``task: spatial``, ``classification``, ``tagging`` or ``seld``."""

    verb: ClassVar[str] = "train"
    train: list[Path]  # shard folders whose samples have events, one labelled sound folder, or one of stereo SELD
    output: Path
    validation: Path | None = None  # folder of unseen recordings (and rooms); decides which weights are kept
    task: str = "spatial"
    train_folds: list[int | str] | None = None  # of a sound folder: its official folds to train on
    validation_folds: list[int | str] | None = None  # ... and to validate on, of the folder in `train`
    # Of a SELD folder folds (fold3) or rooms (fold3_room4); rooms that are validated on are not trained on.
    use_test_fold: bool = False  # ... and fold4 may be among them: for a submission that nothing is left to score
    channels: Channels = "refuse"  # what becomes of several channels where the encoder wants one
    encoder: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "spatial_ast", "preset": "tiny"})
    # of classification and tagging: name, dropout; of seld: elements, frames
    head: dict[str, Any] = dataclasses.field(default_factory=dict)
    init: Path | None = None  # encoder folder to start from; its configuration replaces `encoder`
    unfreeze: int | None = None  # top layers of the encoder that learn; 0: none, the heads alone; by default all
    labels: list[str] | None = None  # classes in order; by default the sorted labels of the training events
    steps: int | None = None  # either a number of updates ...
    seconds: float | None = None  # ... or a wall-clock budget for the loop, validation included
    batch_size: int = 32  # clips per update, over all processes
    learning_rate: float = 1e-3
    minimum_rate: float = 0.02  # share of learning_rate that is left at the end of the cosine
    warmup: float = 0.05  # share of the run
    weight_decay: float = 0.01
    layer_decay: float = 1.0  # learning rate factor per layer from the top (0.75 when fine-tuning a published model)
    label_smoothing: float = 0.0  # of classification and tagging
    distance_weight: float = 1.0  # of seld: metres in the loss (1: as published)
    ema: float = 0.0  # decay of a moving average of the weights, which is then what is validated and kept
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # auto: bf16 where the processor computes in it
    channels_last: bool = False  # memory layout of convolutions; with bf16 on a CPU a third faster
    gradient_checkpointing: bool = False
    weights: LossWeights = dataclasses.field(default_factory=lambda: LossWeights(azimuth_smoothing=8.0))
    augment: Augmentation = dataclasses.field(default_factory=Augmentation)
    seed: int = 0
    log_every: int = 20
    eval_every: int = 0  # updates between validations; 0: at the end only
    eval_batch_size: int = 64
    save_every: int = 200  # updates between checkpoints
    memory_gib: float = 2.0  # decoded clips are kept in memory up to this size
    max_rejects: float = 0.02  # share of unusable samples beyond which the run stops
    tensorboard: bool = True  # curves in OUTPUT/tensorboard, beside metrics.jsonl
    processes: int | None = None  # stated number of processes; a launch with fewer is an error
    resume: Literal["auto", "never"] = "auto"

    def check(self) -> None:
        """:class:`ConfigError` for values that cannot be trained with."""
        if self.task not in TASKS:
            found = f"'{self.task}'{nearest(self.task, TASKS)}"
            raise ConfigError(describe("task", f"one of {', '.join(TASKS)}", found))
        if "path" in self.encoder:
            cure = f"To go on from a folder: init: {self.encoder['path']}."
            raise ConfigError(describe("encoder", "'name', and 'published' for published weights", "'path'", cure))
        if twice := sorted({name for name in self.labels or () if (self.labels or []).count(name) > 1}):
            raise ConfigError(describe("labels", "every class once", f"'{twice[0]}' twice"))
        if self.validation and self.validation_folds:
            raise ConfigError(describe("recipe", "either 'validation' or 'validation_folds'", "both"))
        both = sorted({*map(str, self.train_folds or [])} & {*map(str, self.validation_folds or [])})
        if both or bool(self.validation_folds) > bool(self.train_folds):
            found = f"fold {both[0]} in both" if both else "validation_folds alone"
            raise ConfigError(describe("recipe", "train_folds and validation_folds that share none", found))
        if self.augment.clip_level and not task_class(self.task).clip_level:
            found = f"task: {self.task}"
            raise ConfigError(describe("augment.roll_seconds, speed, mixup", "labels of whole clips", found))
        if (self.steps is None) == (self.seconds is None):
            raise ConfigError(
                describe("recipe", "either 'steps' or 'seconds'", "neither" if self.steps is None else "both")
            )
        for name in ("steps", "seconds", "batch_size", "learning_rate", "eval_batch_size", "log_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(describe(name, "a positive number", repr(value)))
        if not 0 <= self.warmup < 1:
            raise ConfigError(describe("warmup", "a share of the run in [0, 1)", repr(self.warmup)))
