"""``audio-llm folds RECIPE``: train and test over the official folds of a corpus."""

from __future__ import annotations

import argparse

HELP = "cross-validate a sound classifier over a corpus's official folds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file, for instance recipes/classification/esc10.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")


def run(args: argparse.Namespace) -> int:
    from eval.tasks import classification
    from eval.tasks import classification_folds as folds

    scores, recipe = folds.run(args.recipe, args.overrides)
    print(f"\n{classification.table(scores)}\n")
    print(f"accuracy {classification.headline(scores)}; {recipe.output}")
    if recipe.min_accuracy is not None and scores["mean"]["accuracy"] < recipe.min_accuracy:
        print(f"below the expected {100 * recipe.min_accuracy:g} %")
        return 1
    return 0
