"""``audio-llm sft RECIPE [key=value …]``: supervised fine-tuning."""

from __future__ import annotations

import argparse
import os

from audio_llm.cli.options import add_launch, add_recipe, checked

HELP = "teach the model from questions with answers (supervised fine-tuning)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "quickstart/sft.yaml")
    add_launch(parser)


def recipes() -> dict[str, type]:
    """The dataclass of its recipe; there is one kind."""
    from audio_llm.training.recipes import SFTRecipe

    return {"": SFTRecipe}


def run(args: argparse.Namespace) -> int:
    from audio_llm.training.recipes import SFTRecipe

    recipe = checked(args, SFTRecipe, "sft", ("accelerate", "peft"))
    from audio_llm.inspection.room import check_memory
    from audio_llm.training import sft

    if not args.ignore_memory:
        check_memory(recipe)
    result = sft.run(recipe)
    if int(os.environ.get("RANK", "0")) != 0:
        return 0
    exported = ", ".join(result["exported"].values())
    print(
        f"{result['steps']} steps, {result['samples']} samples, {result['seconds']} s"
        + (f"; wrote {exported}" if exported else "")
    )
    return 0
