"""``audio-llm sft RECIPE [key=value …]``: supervised fine-tuning."""

from __future__ import annotations

import argparse
import os

HELP = "teach the model from questions with answers (supervised fine-tuning)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML recipe, for instance recipes/quickstart/sft.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. data.workers=2")
    parser.add_argument(
        "--expect-processes", type=int, metavar="N", help="stop unless N processes train (recipe key: processes)"
    )
    parser.add_argument("--ignore-memory", action="store_true", help="start although the machine seems too small")


def recipes() -> dict[str, type]:
    """The dataclass of its recipe; there is one kind."""
    from audio_llm.training.recipes import SFTRecipe

    return {"": SFTRecipe}


def run(args: argparse.Namespace) -> int:
    from audio_llm import config
    from audio_llm.errors import require
    from audio_llm.training.recipes import SFTRecipe

    for package in ("accelerate", "peft"):
        require(package, "audio-llm sft", "train")
    recipe = config.load(SFTRecipe, args.recipe, args.overrides)
    recipe.check()
    recipe.check_paths()
    if args.expect_processes is not None:
        recipe.processes = args.expect_processes
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
