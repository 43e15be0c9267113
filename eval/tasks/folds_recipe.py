"""The recipe of ``audio-llm folds``; it imports no torch, so that it is checked before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from audio_llm.config import renamed
from audio_llm.errors import ConfigError, describe
from audio_llm.tasks.base import build_recipe
from audio_llm.tasks.classification import CLASSIFICATION, ClassificationRecipe

PLAIN = "plain"  # the only candidate where none are named
# The orchestrator fills these keys of a training recipe.
_OWN_KEYS = tuple("train output task train_folds validation validation_folds labels classes seed resume".split())


@dataclasses.dataclass
class FoldsRecipe:
    """Recipe of ``audio-llm folds``."""

    verb: ClassVar[str] = "folds"
    sounds: Path  # a labelled sound folder with official folds: ESC-50 or UrbanSound8K layout
    output: Path  # the run's folder
    training: dict[str, Any]  # an encoder recipe (see ``audio-llm train``) without data, output and seed
    task: str = "folds"  # what is done: folds
    folds: Any = "official"  # the corpus's own; there are no others
    test_folds: list[int | str] | None = None  # by default every fold once
    candidates: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # name → changes of `training`
    refit: dict[str, Any] | None = None  # train the chosen again, validation fold included, with these changes
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])  # every fold is trained once with each
    min_accuracy: float | None = None  # exit code 1 where the mean over folds is below this share
    max_reject_share: float = 0.02  # share of test clips that may be unusable

    def __post_init__(self) -> None:
        known = {field.name for field in dataclasses.fields(ClassificationRecipe)}
        self.training = renamed(self.training, known, "training")  # before candidates are merged into it
        self.candidates = {name: renamed(tree or {}, known, name) for name, tree in self.candidates.items()}
        self.refit = self.refit and renamed(self.refit, known, "refit")

    def check(self) -> None:
        """:class:`ConfigError` for splits that are not the corpus's, or training keys that are not free."""
        if self.folds != "official":
            cure = "Clips cut from one recording would be on both sides: random splits of UrbanSound8K score 98 %."
            raise ConfigError(describe("folds", "'official'", repr(self.folds), cure))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(describe("seeds", "different numbers, at least one", repr(self.seeds)))
        for name, tree in {"training": self.training, **self.candidates, "refit": self.refit or {}}.items():
            own = [key for key in _OWN_KEYS if key in tree]
            if own:
                raise ConfigError(describe(name, "keys that the folds do not decide", f"'{own[0]}'"))
        for name in self.candidates or {PLAIN: {}}:
            self.training_recipe(name, Path("."), seed=0).check()

    def training_recipe(self, candidate: str, output: Path, *, seed: int, refit: bool = False) -> ClassificationRecipe:
        """The encoder recipe of one candidate; folds and labels are still to be filled in."""
        tree = merged(self.training, self.candidates.get(candidate, {}))
        if refit:
            tree = merged(tree, self.refit or {})
        tree |= {"task": "classification", "train": [str(self.sounds)], "output": str(output), "seed": seed}
        return build_recipe(CLASSIFICATION, tree, where=f"training of '{candidate}'")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put in; groups of keys are merged. ``steps`` and ``seconds`` replace each other."""
    tree = dict(base)
    for one, other in (("steps", "seconds"), ("seconds", "steps")):
        if one in changes and other not in changes:
            tree.pop(other, None)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(tree.get(key), dict)
        tree[key] = merged(tree[key], value) if both else value
    return tree
