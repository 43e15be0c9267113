"""``audio-llm train``: an encoder on scenes or labelled sounds, or a small language model on the text of a corpus."""

from __future__ import annotations

import argparse

HELP = "train an audio encoder, or a small language model, from a recipe"

_TASKS = {
    "spatial": "audio_llm.tasks.trainer",
    "classification": "audio_llm.tasks.trainer",
    "tagging": "audio_llm.tasks.trainer",
    "seld": "audio_llm.tasks.trainer",
    "language_model": "audio_llm.tasks.language_model.task",
    "echotwin": "audio_llm.tasks.echotwin.task",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file; its key 'task' says what is trained")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")


def run(args: argparse.Namespace) -> int:
    import importlib

    importlib.import_module(_TASKS[task_of(args.recipe, args.overrides)]).run(args.recipe, args.overrides)
    return 0


def task_of(recipe: str, overrides: list[str]) -> str:
    """The recipe's task, or the override's."""
    from audio_llm import config
    from audio_llm.errors import ConfigError, describe, nearest

    task = config.read(recipe, overrides, "train").get("task")
    if task not in _TASKS:
        found = "none" if task is None else f"'{task}'{nearest(str(task), _TASKS)}"
        raise ConfigError(describe(f"recipe {recipe}", f"task: {' or '.join(_TASKS)}", found))
    return str(task)
