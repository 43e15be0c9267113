"""What several verbs read from their arguments: a recipe, how it is launched, ``--hearing``."""

from __future__ import annotations

import argparse
from typing import Any, TypeVar

Recipe = TypeVar("Recipe")
HEARING = (
    "what is heard of sound in another layout than the model's: refuse; of several channels left, right, mean, omni (W "
)
HEARING += (
    "of ambisonics); duplicate: one channel as both, straight ahead, so that answers about direction mean nothing"
)


def add_recipe(parser: argparse.ArgumentParser, example: str, what: str = "") -> None:
    """``RECIPE [key=value …]``; `example` is one below ``recipes/``, `what` is more to say."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"YAML file, for instance recipes/{example}{what}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="sets a key of the recipe; of a group: group.key=value"
    )


def add_launch(parser: argparse.ArgumentParser) -> None:
    """What :func:`checked` reads beside a recipe of SFT or GRPO, and ``--ignore-memory``."""
    parser.add_argument(
        "--expect-processes", type=int, metavar="N", help="stop unless N processes train (recipe key: processes)"
    )
    parser.add_argument("--ignore-memory", action="store_true", help="start although the machine seems too small")


def checked(args: argparse.Namespace, kind: type[Recipe], verb: str, packages: tuple[str, ...]) -> Recipe:
    """The recipe of SFT or GRPO, with all that can be told of it before anything heavy is loaded.

    Raises :class:`PrerequisiteError` without the `packages` that `verb` needs, and what the recipe's checks raise.
    """
    from audio_llm import config
    from audio_llm.errors import require

    for package in packages:
        require(package, f"audio-llm {verb}", "train")
    recipe: Any = config.load(kind, args.recipe, args.overrides)
    recipe.check()
    recipe.check_paths()
    if args.expect_processes is not None:
        recipe.processes = args.expect_processes
    return recipe


def hearing(text: str) -> str:
    """A value of the flag. What it may be is looked up when one is given: numpy is more than ``--help`` needs."""
    from audio_llm.audio import HEARINGS
    from audio_llm.config import VALUES

    if (new := VALUES["hearing"].get(text, text)) not in HEARINGS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(HEARINGS)}; found '{text}'")
    return new


def add_hearing(parser: argparse.ArgumentParser, *old: str, default: str | None = "refuse") -> None:
    """``--hearing``, and `old` names of it that nobody is shown; None as the `default` is what the model learned."""
    usual = f" (default: {default or 'as trained'})"
    parser.add_argument("--hearing", type=hearing, metavar="HOW", default=default, help=HEARING + usual)
    if old:
        parser.add_argument(*old, dest="hearing", type=hearing, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
