"""How models of a task are scored: ``eval.tasks.<name>`` for every task of :mod:`audio_llm.tasks` that is.

Such a module has ``evaluate(model, data, out, options) -> str``: it scores the model in a folder on the paths `data`,
leaves predictions and figures in the folder `out`, and returns what a person reads. ``options`` is an :class:`Options`.
With ``recognises(path) -> bool`` it takes other folders than its task does. A task from outside this repository has
both in the module that registers it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from audio_llm import config as recipes
from audio_llm.errors import ConfigError, describe
from audio_llm.files import write_json
from audio_llm.identity import Identity, compare, refusal
from audio_llm.tasks.base import TASKS

RECIPE = "recipe.yaml"  # what training leaves in a model's folder


@dataclass(frozen=True)
class Options:
    """What ``audio-llm eval`` was asked for beside model, data and OUT."""

    pairs: Mapping[str, str] = field(default_factory=dict)  # of --option KEY=VALUE
    batch_size: int | None = None
    overwrite: bool = False  # drop what an earlier run left in OUT
    quiet: bool = False  # no progress bar


def claim(path: Path, facts: Mapping[str, Any], digests: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Write the ``run.json`` of an evaluation, or see that an earlier one's says the same.

    :class:`ConfigError` with what differs. `usual` are values of `facts` that earlier versions did not write; a digest
    that they did not take tells nothing.
    """
    if path.is_file():
        cure = "Add --overwrite, or choose another folder."
        try:
            tree = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(describe(str(path), "what an evaluation wrote there", "another file", cure)) from error
        plain = json.loads(json.dumps({"facts": facts, "digests": digests}))
        if differing := compare(Identity(tree, tree), Identity(plain["facts"], plain["digests"], usual=usual)):
            raise ConfigError(refusal(str(path.parent), differing, cure))
    write_json(path, {**facts, **digests})


def folds_seen(model: str | Path) -> set[str] | None:
    """The folds that trained a model or decided what was kept of it, by the recipes that runs leave in its folder.

    Those of the model that training started from (``init``) count too. None where there is no recipe.
    """
    names: set[str] | None = None
    folder: Path | None = Path(model)
    visited: set[Path] = set()
    while folder is not None and folder.resolve() not in visited and (folder / RECIPE).is_file():
        visited.add(folder.resolve())
        tree = recipes.read(folder / RECIPE)
        names = names or set()
        names |= {str(name) for key in ("train_folds", "validation_folds") for name in tree.get(key) or ()}
        folder = Path(tree["init"]) if tree.get("init") else None
    return names


def evaluator(path: str | Path) -> Callable[..., str] | None:
    """``evaluate`` of the task whose model, or whose predictions, lie in a folder; None where no task's do."""
    for name, task in TASKS.items():
        module = _module(name)
        recognises = getattr(module, "recognises", task.recognises)
        if hasattr(module, "evaluate") and recognises(Path(path)):
            return module.evaluate
    return None


def _module(name: str) -> ModuleType:
    if importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    return sys.modules[type(TASKS[name]).__module__]
