"""``audio-llm bat``: runs of evaluation in the columns of BAT's table."""

from __future__ import annotations

import argparse

HELP = "evaluations of SpatialSoundQA's nine question types as BAT's table A to E"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="run folders of audio-llm eval")
    parser.add_argument("--out", help="write the table to this file as well")


def run(args: argparse.Namespace) -> int:
    from audio_llm.files import write_asked
    from eval.figures import bat, runs

    text = bat.table([bat.row_of(run) for run in runs.load_named(args.runs)])
    print(text)
    if args.out:
        write_asked(args.out, text + "\n")
    return 0
