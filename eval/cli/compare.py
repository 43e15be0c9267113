"""``audio-llm compare RUN RUN``: two runs on the questions that both answered."""

from __future__ import annotations

import argparse

HELP = "compare two runs question by question: difference with its interval, McNemar's test"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN", help="run folder, predictions.jsonl or official .json")
    parser.add_argument("second", metavar="RUN", help="the run that is hoped to be better")
    parser.add_argument("--scorer", help="by name (default: the headline of the second run's benchmark)")
    parser.add_argument("--answers", default="greedy", help="which pass: greedy (default), sampled, or a control")
    parser.add_argument("--by", default="question_type", help="a key of the items to group by (default: question_type)")


def run(args: argparse.Namespace) -> int:
    from eval import comparing, rescoring

    first, second = rescoring.load(args.first), rescoring.load(args.second)
    scorer = rescoring.scorers_for(second, args.scorer)[0]
    print(comparing.table(comparing.compare_runs(first, second, scorer, answers=args.answers, group=args.by)))
    return 0
