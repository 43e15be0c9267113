"""The flag ``--hearing`` of all verbs that give sounds to a model."""

from __future__ import annotations

import argparse

HELP = (
    "what is heard of sound in another layout than the model's: refuse; of several channels left, right, mean, omni (W "
)
HELP += "of ambisonics); duplicate: one channel as both, straight ahead, so that answers about direction mean nothing"


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
    parser.add_argument("--hearing", type=hearing, metavar="HOW", default=default, help=HELP + usual)
    if old:
        parser.add_argument(*old, dest="hearing", type=hearing, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
