"""The flag ``--hearing`` of all verbs that give sounds to a model."""

from __future__ import annotations

import argparse

HELP = "what is heard of sound in another layout than the model's: of several channels left, right, mean, omni (W of "
HELP += "ambisonics); duplicate: one channel as both, straight ahead, so that answers about direction mean nothing"


def add_hearing(parser: argparse.ArgumentParser, *old: str, default: str | None = "refuse") -> None:
    """``--hearing``, and `old` names of it that nobody is shown; None as the `default` is what the model learned."""
    from audio_llm.audio import HEARINGS
    from audio_llm.config import VALUES

    def renamed(text: str) -> str:
        return VALUES["hearing"].get(text, text)

    usual = f" (default: {default or 'as trained'})"
    parser.add_argument("--hearing", type=renamed, choices=HEARINGS, default=default, help=HELP + usual)
    if old:
        parser.add_argument(
            *old, dest="hearing", type=renamed, choices=HEARINGS, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
