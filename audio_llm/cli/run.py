"""``audio-llm run RECIPE …``: whatever a recipe is for; its key ``verb`` says it."""

from __future__ import annotations

import argparse

PASSES_ON = True
HELP = "do what a recipe is for: prep, train, sft, grpo or folds, as its key 'verb' says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, for instance recipes/quickstart/sft.yaml")
    parser.add_argument(
        "rest", metavar="ARGUMENT", nargs="*", help="what its verb takes: OUT, key=value; options come after a bare --"
    )


def run(args: argparse.Namespace) -> int:
    from audio_llm import config
    from audio_llm.cli import main
    from audio_llm.errors import ConfigError, describe

    verb = config.verb_of(config.read(args.recipe))
    if verb not in ("prep", "train", "sft", "grpo", "folds"):
        raise ConfigError(describe(f"recipe {args.recipe}: verb", "prep, train, sft, grpo or folds", repr(verb)))
    return main([verb, args.recipe, *args.rest, *args.passed_on])
