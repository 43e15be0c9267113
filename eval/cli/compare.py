"""``audio-llm compare RUN RUN``: two runs on the questions that both answered."""

from __future__ import annotations

import argparse

from eval.cli.options import add_scorer_settings

HELP = "compare two runs question by question: difference with its interval and test"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN", help="run folder, predictions.jsonl or official .json")
    parser.add_argument("second", metavar="RUN", help="the run that is hoped to be better")
    parser.add_argument("--scorer", help="by name (default: the headline of the second run's benchmark)")
    add_scorer_settings(parser)
    parser.add_argument("--answers", default="greedy", help="which pass: greedy (default), sampled, or a control")
    parser.add_argument("--by", default="question_type", help="a key of the items to group by (default: question_type)")


def run(args: argparse.Namespace) -> int:
    from audio_llm.errors import ConfigError, describe
    from eval.cli.options import scorer_settings
    from eval.figures import comparing, runs

    settings = scorer_settings(args)
    first, second = runs.load(args.first), runs.load(args.second, scorers=args.scorer, settings=settings)
    scorer = second.headline
    for name in settings:
        if name != scorer.name:
            raise ConfigError(
                describe("--with", f"settings of '{scorer.name}', which compares", f"'{name}'", f"Add --scorer {name}.")
            )
    print(comparing.table(comparing.compare_runs(first, second, answers=args.answers, group=args.by)))
    return 0
