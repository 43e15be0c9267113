"""``audio-llm train``: an encoder on scenes or labelled sounds, or a small language model on the text of a corpus."""

from __future__ import annotations

import argparse

HELP = "train an audio encoder, or a small language model, from a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file; its key 'task' says what is trained")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")


def recipes() -> dict[str, type]:
    """The dataclasses of its recipes, by task."""
    from audio_llm.tasks.base import TASKS

    return {name: task.recipe for name, task in TASKS.items()}


def run(args: argparse.Namespace) -> int:
    from audio_llm.tasks.base import check_paths, load_recipe

    task, recipe = load_recipe(args.recipe, args.overrides)
    check_paths(recipe)
    task.train(recipe)
    return 0
