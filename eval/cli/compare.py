"""``audio-llm compare RUN RUN``: two runs on the questions that both answered, or how much of a score is audio."""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.cli.options import add_scorer_settings

HELP = "compare two runs question by question, or several by what they answer without sound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="two run folders, predictions.jsonl or official .json, the second one hoped to be better",
    )
    parser.add_argument("--scorer", help="by name (default: the headline of the second run's benchmark)")
    add_scorer_settings(parser)
    parser.add_argument("--answers", default="greedy", help="which pass: greedy (default), sampled, or a control")
    parser.add_argument("--by", help="a key of the items to group by (default: question_type)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--audio-dependent",
        action="store_true",
        help="of two or more models' runs with the controls silence and text_only: what is right of the questions that "
        "they cannot answer without sound; a run may be NAME=RUN",
    )
    parser.add_argument(
        "--right-without",
        type=int,
        metavar="N",
        help="from so many models right in silence, or with the text only, a question is not audio-dependent (1)",
    )
    parser.add_argument(
        "--wrong-in-silence",
        type=int,
        metavar="N",
        help="from so many models wrong in silence it is strong, else weak (2)",
    )


def run(args: argparse.Namespace) -> int:
    from audio_llm.errors import ConfigError, describe
    from audio_llm.files import write_asked
    from eval.cli.options import scorer_settings
    from eval.figures import comparing, dependency, runs
    from eval.figures.tables import to_plain

    settings = scorer_settings(args)
    thresholds = {"right_without": args.right_without, "wrong_in_silence": args.wrong_in_silence}
    given = {name: value for name, value in thresholds.items() if value is not None}
    if args.audio_dependent:
        if args.by is not None:
            raise ConfigError("--by: not with --audio-dependent, whose groups are its own.")
        folders = [Path(path).resolve() for _, path in map(runs.split_name, args.runs)]
        if twice := [str(folder) for folder in folders if folders.count(folder) > 1]:
            raise ConfigError(describe("runs", "each once", f"{twice[0]} twice"))
        loaded = runs.load_named(args.runs, settings, scorers=args.scorer)
        second = loaded[0]
    else:
        for name in given:
            raise ConfigError(f"--{name.replace('_', '-')}: only with --audio-dependent.")
        if len(args.runs) != 2:
            raise ConfigError(
                describe("compare", "two runs", f"{len(args.runs)}", "Several are taken by --audio-dependent.")
            )
        first, second = runs.load(args.runs[0]), runs.load(args.runs[1], scorers=args.scorer, settings=settings)
    scorer = second.headline
    for name in settings:
        if name != scorer.name:
            raise ConfigError(
                describe("--with", f"settings of '{scorer.name}', which compares", f"'{name}'", f"Add --scorer {name}.")
            )
    found: comparing.Compared | dependency.Dependency
    if args.audio_dependent:
        found = dependency.audio_dependency(loaded, args.answers, dependency.Rules(**given))
        print(dependency.table(found))
    else:
        found = comparing.compare_runs(first, second, answers=args.answers, group=args.by or "question_type")
        print(comparing.table(found))
    if args.json:
        write_asked(args.json, {"scorer": found.scorer} | to_plain(found))
    return 0
