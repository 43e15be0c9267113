"""``audio-llm train``: an encoder on scenes or labelled sounds, or a small language model on the text of a corpus."""

from __future__ import annotations

import argparse

from audio_llm.cli.options import add_recipe

HELP = "train an audio encoder, or a small language model, from a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "quickstart/encoder.yaml", "; its key 'task' says what is trained (audio-llm keys)")


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
