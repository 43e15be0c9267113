"""The contract of a task: what an encoder (or a small model) is trained on, and what its folders are good for.

A task is registered by an entry point of the group ``audio_llm.tasks``, which names an instance of :class:`Task`.
``audio-llm train`` finds it by the key ``task`` of a recipe, ``predict`` and ``eval`` by the folder or file that it
recognises. How its models are scored is told by ``eval.tasks.<name>``, or by ``evaluate`` in the task's own module.

Nothing here imports torch, so that a recipe is checked before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from audio_llm import config
from audio_llm.audio import Hearing
from audio_llm.errors import ConfigError, describe
from audio_llm.ranges import check_numbers
from audio_llm.registry import Registry
from audio_llm.training.trackers import Tracker

if TYPE_CHECKING:
    from audio_llm.model.encoder import AudioEncoder

TASKS = Registry("tasks", "task", needs="recognises")
LONGEST = 24 * 3600.0  # seconds of a file in `audio-llm predict`: it is decoded whole, and a day is what memory holds


class Task:
    """One task; what it does not offer stays as it is here."""

    name: ClassVar[str]
    models: ClassVar[str] = ""  # what it recognises, in words
    formats: ClassVar[tuple[str, ...]] = ()  # of `audio-llm predict`, the first is the default; none: no predictions
    options: ClassVar[tuple[str, ...]] = ()  # of `audio-llm predict`: threshold, hop, ...

    @property
    def recipe(self) -> type:
        """The dataclass of its recipes; ``check()`` raises :class:`ConfigError` for what cannot be trained with."""
        raise NotImplementedError

    def train(self, recipe: Any) -> None:
        """``audio-llm train``: train by a checked recipe, and say on the output what came of it."""
        raise NotImplementedError

    def recognises(self, path: Path) -> bool:
        """Whether the model in a folder, or in a published file, is one of this task."""
        return False

    def predictor(self, path: Path, options: Mapping[str, Any]) -> Callable[[str, str], str]:
        """Load a model; what it gives makes text of a sound file, in one of :attr:`formats`.

        `options` are those of :attr:`options` that were asked for. Loading raises :class:`CheckpointError` and
        :class:`ConfigError`, a file that cannot be used :class:`AudioError`.
        """
        raise NotImplementedError


class EncoderTask(Task):
    """A task that trains an encoder with heads, in the loop of :mod:`audio_llm.tasks.trainer`."""

    recipe: ClassVar[type[TaskRecipe]]

    def module(self, encoder: AudioEncoder, labels: Sequence[str], recipe: Any) -> Any:
        """A :class:`audio_llm.tasks.supervised.SupervisedTask`: encoder and heads for the classes `labels`."""
        raise NotImplementedError


def find_task(path: str | Path) -> Task | None:
    """The registered task that recognises the model at `path`; None where none does."""
    return next((task for task in TASKS.values() if task.recognises(Path(path))), None)


def load_recipe(path: str | Path | None, overrides: list[str] | None = None) -> tuple[Task, Any]:
    """The task of a recipe of ``audio-llm train``, and its dataclass, checked. Raises :class:`ConfigError`."""
    tree = config.read(path, overrides, "train")
    if tree.get("task") is None:
        raise ConfigError(describe(f"recipe {path}", f"task: {' or '.join(TASKS)}", "none"))
    task = TASKS.find(tree["task"])
    recipe = build_recipe(task, tree, str(path) if path else "overrides")
    recipe.check()
    return task, recipe


def check_paths(recipe: Any) -> None:
    """:class:`ConfigError` for data, or a folder to start from, that is not there. Warns of a validation on what is
    learnt from: the weights that learnt most by heart would be kept."""
    for name in ("train", "validation", "init", "classes", "text", "audio", "sounds"):
        value = getattr(recipe, name, None)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and not path.exists():
                raise ConfigError(describe(f"{name} {path}", "a file or folder", "none of that name"))
    held = getattr(recipe, "validation", None)
    if isinstance(held, Path) and any(os.path.samefile(held, folder) for folder in recipe.train):
        warnings.warn(
            describe("validation", "a folder that nothing is learnt from", f"{held}, which train has"), stacklevel=2
        )


def build_recipe(task: Task, tree: Mapping[str, Any], where: str) -> Any:
    """The recipe of `task` from a plain mapping.

    A key of another task is a :class:`ConfigError` that names it, unless it says no more than that task's default:
    version 0.1 wrote the keys of all tasks into the ``recipe.yaml`` of a run.
    """
    known = {field.name for field in dataclasses.fields(task.recipe)}
    tree = config.renamed(tree, known, where)  # first: an old name of a key of this task may be one of another's
    kept = dict(tree)
    for key in sorted(set(tree) - known):
        for other in TASKS.values():
            if not isinstance(other, EncoderTask):
                continue
            field = {field.name: field for field in dataclasses.fields(other.recipe)}.get(key)
            if field is None:
                continue
            if tree[key] != _default(field):
                raise ConfigError(describe(f"{where}: {key}", f"keys of task {task.name}", f"one of {other.name}"))
            del kept[key]
            break
    return config.build(task.recipe, kept, where)


def _default(field: dataclasses.Field) -> Any:
    """As a recipe's file writes it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


@dataclasses.dataclass
class Augmentation:
    """Switches; zero or false is off. All draws depend on (seed, step, rank) only."""

    swap: bool = True  # mirror left and right with probability 1/2, azimuths with it
    gain_db: float = 6.0  # uniform in ± this
    shift_seconds: float = 0.0  # uniform in ± this, as far as no event leaves the window
    frequency_mask: int = 0  # SpecAugment: widest mask in mel bands ...
    time_mask: int = 0  # widest mask of SpecAugment in frames
    masks: int = 1  # of each kind
    overlay: float = 0.0  # share of clips that are heard together with another of the batch, events and all
    # Where labels hold for the whole clip (classification, tagging):
    roll_seconds: float = 0.0  # uniform in ± this, around the clip's end: what leaves it comes in again
    speed: float = 0.0  # played faster or slower by up to this share, and so higher or lower
    mixup: float = 0.0  # Beta(this, this) shares of two clips, brought to one level first (Tokozume et al. 2018)

    @property
    def clip_level(self) -> bool:
        """Whether something is on that only labels of the whole clip survive."""
        return any((self.roll_seconds, self.speed, self.mixup))


@dataclasses.dataclass
class TaskRecipe:
    """What the recipes of all tasks that train an encoder share; a task adds the keys that only it knows."""

    verb: ClassVar[str] = "train"
    clip_level: ClassVar[bool] = False  # labels hold for the whole clip: it may be rolled in time and mixed with others
    places: ClassVar[bool] = False  # nothing is learnt from events without an azimuth and a distance

    train: list[Path]  # shard folders whose samples have events, or one folder of another data set
    output: Path  # the run's folder, and the encoder's
    validation: Path | None = None  # folder of unseen recordings (and rooms); decides which weights are kept
    task: str = ""  # spatial, seld, classification, tagging
    train_folds: list[int | str] | None = None  # of a data set with folds: those to train on
    validation_folds: list[int | str] | None = None  # those to validate on, of the folder in `train`
    # Of a SELD folder folds (fold3) or rooms (fold3_room4); rooms that are validated on are not trained on.
    use_test_fold: bool = False  # fold4 of a SELD folder may be trained on; nothing is left to score it with then
    hearing: Hearing = "refuse"  # what the encoder hears of sound in another layout: left, right, mean, omni, duplicate
    # A name with a `preset`, with fields of its configuration, or with the file of `published` weights.
    encoder: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "spatial_ast", "preset": "tiny"})
    init: Path | None = None  # encoder folder to start from; its configuration replaces `encoder`
    unfreeze: int | None = None  # top layers of the encoder that learn; 0: none, the heads alone; by default all
    labels: list[str] | None = None  # classes in order; by default the sorted labels of the training events
    classes: Path | None = None  # CSV of names (index,mid,display_name) for labels that are AudioSet's identifiers
    steps: int | None = None  # number of updates; with `seconds` as well, whichever is over first ends the run
    seconds: float | None = None  # wall-clock budget for the loop, validation included
    batch_size: int = 32  # clips per update, over all processes
    learning_rate: float = 1e-3  # the largest one, after the warm-up
    minimum_rate: float = 0.02  # share of learning_rate that is left at the end of the cosine
    warmup_share: float = 0.05  # share of the run
    weight_decay: float = 0.01  # of AdamW, on matrices alone
    layer_decay: float = 1.0  # learning rate factor per layer from the top (0.75 when fine-tuning a published model)
    ema: float = 0.0  # decay of a moving average of the weights, which is then what is validated and kept
    max_grad_norm: float = 1.0  # a longer gradient is shortened to it
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # auto: bf16 where the processor computes in it
    channels_last: bool = False  # memory layout of convolutions; with bf16 on a CPU a third faster
    gradient_checkpointing: bool = False  # less memory for about a third more time
    augment: Augmentation = dataclasses.field(default_factory=Augmentation)  # what is done to clips in training
    seed: int = 0  # of the order of clips, new weights, augmentation
    log_steps: int = 20  # updates from line to line of metrics.jsonl
    eval_steps: int = 0  # updates between validations; 0: at the end only
    eval_batch_size: int = 64  # clips per pass in validation
    save_steps: int = 200  # updates between checkpoints
    memory_gib: float = 2.0  # decoded clips are kept in memory up to this size
    max_reject_share: float = 0.02  # share of unusable samples beyond which the run stops
    report_to: list[Tracker] = dataclasses.field(default_factory=lambda: list[Tracker](["tensorboard"]))  # draw curves
    processes: int | None = None  # stated number of processes; a launch with fewer is an error
    resume: Literal["auto", "never"] = "auto"  # never: begin anew in a used folder

    def check(self) -> None:
        """:class:`ConfigError` for values that cannot be trained with."""
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
        if self.augment.clip_level and not self.clip_level:
            found = f"task: {self.task}"
            raise ConfigError(describe("augment.roll_seconds, speed, mixup", "labels of whole clips", found))
        if self.steps is None and self.seconds is None:
            raise ConfigError(describe("recipe", "'steps', 'seconds' or both (the smaller counts)", "neither"))
        check_numbers(self)
