"""``audio-llm folds RECIPE``: train and test over the official folds of a corpus."""

from __future__ import annotations

import argparse

from audio_llm.cli.options import add_recipe

HELP = "cross-validate a sound classifier over a corpus's official folds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "classification/esc10.yaml")


def recipes() -> dict[str, type]:
    """The dataclass of its recipe; there is one kind."""
    from eval.tasks.folds_recipe import FoldsRecipe

    return {"": FoldsRecipe}


def run(args: argparse.Namespace) -> int:
    from audio_llm import config
    from audio_llm.tasks.base import check_paths
    from eval.tasks.folds_recipe import FoldsRecipe

    recipe = config.load(FoldsRecipe, args.recipe, args.overrides)
    recipe.check()
    check_paths(recipe)
    from eval.tasks import classification
    from eval.tasks.classification_folds import CrossValidation

    scores = CrossValidation(recipe).run()
    print(f"\n{classification.table(scores)}\n")
    print(f"accuracy {classification.headline(scores)}; {recipe.output}")
    if recipe.min_accuracy is not None and scores["mean"]["accuracy"] < recipe.min_accuracy:
        print(f"below the expected {100 * recipe.min_accuracy:g} %")
        return 1
    return 0
