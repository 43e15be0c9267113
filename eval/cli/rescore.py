"""``audio-llm rescore RUN``: every scorer side by side, from stored predictions alone."""

from __future__ import annotations

import argparse
import sys

from eval.cli.options import add_scorer_settings

HELP = "score stored answers again, under several scorers side by side; write submission files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, predictions.jsonl or official .json files")
    parser.add_argument(
        "--scorers",
        metavar="NAMES",
        help="or package.module:NAME, with commas, the headline first; all (default: benchmark's)",
    )
    add_scorer_settings(parser)
    parser.add_argument("--benchmark", help="whose answers these are (default: what run.json says, mmau for .json)")
    parser.add_argument("--submission", metavar="FOLDER", help="write the files that the benchmark's organisers read")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a .json file (key=NAME) or submission (form=raw)",
    )
    parser.add_argument(
        "--incomplete", action="store_true", help="write a submission though answers to some questions are missing"
    )
    parser.add_argument("--disagreement", action="store_true", help="show replies on which public scorers disagree")
    parser.add_argument(
        "--strict-reference", action="store_true", help="MMAU .json: the official script's figures, or how it dies"
    )


def run(args: argparse.Namespace) -> int:
    from audio_llm.errors import ConfigError
    from eval.predictions import uncollected

    if args.disagreement:
        return _disagreement()
    if not args.runs:
        raise ConfigError("rescore: expected a run folder or a file of predictions, found none.")
    if args.submission and len(args.runs) > 1:
        raise ConfigError(f"--submission: expected one run, whose files the folder is to hold, found {len(args.runs)}.")
    if args.strict_reference:
        return max(_reference(path) for path in args.runs)
    with uncollected():
        return max(_rescore(path, args) for path in args.runs)


def _rescore(path: str, args: argparse.Namespace) -> int:
    from pathlib import Path

    from audio_llm.errors import ConfigError
    from eval.benchmarks import get_benchmark
    from eval.cli.options import key_values, scorer_settings
    from eval.figures import runs
    from eval.figures.tables import print_run, print_spectrum, write_scores
    from eval.predictions import PredictionsError, questions_asked

    options = key_values(args.option)
    foreign = Path(path).suffix == ".json"
    if args.incomplete and not args.submission:
        raise ConfigError("--incomplete: expected --submission FOLDER, which it is about; found none.")
    if options and not foreign and not args.submission:
        raise ConfigError(
            "--option: expected --submission FOLDER, whose options they are, or a .json file; found neither."
        )
    given = {"scorers": args.scorers, "settings": scorer_settings(args)}
    stored = runs.load(path, benchmark=args.benchmark, options=options if foreign else None, **given)
    answers = runs.answers_of(stored.rows)
    lacking = runs.incomplete(stored, answers, foreign=foreign) if args.submission else ""
    if lacking and not args.incomplete:
        raise PredictionsError(lacking)
    if Path(path).is_dir():
        write_scores(Path(path), stored)
    print_run(stored)
    print_spectrum(stored)
    if args.submission:
        if not stored.benchmark:
            raise ConfigError("--submission: expected --benchmark NAME, for the run does not say its own.")
        out = Path(args.submission)
        out.mkdir(parents=True, exist_ok=True)
        written = get_benchmark(stored.benchmark).submission(answers, out, **({} if foreign else options))
        print("submission: " + ", ".join(str(file) for file in written))
        if lacking:
            print(f"incomplete: {lacking}", file=sys.stderr)
    unread = [row for row in stored.rows if row.error] if foreign else []
    if unread:
        print(f"{len(unread)} of {len(stored.rows)} items are left out; the first: {unread[0].error}", file=sys.stderr)
    if not questions_asked(stored.rows):
        print(f"{path}: no question was asked with its sound; nothing is scored.", file=sys.stderr)
        return 1
    return 1 if unread else 0


def _reference(path: str) -> int:
    from eval.scorers.mmau import MatchError, reference_report

    try:
        reference_report(path)
    except MatchError as error:
        print(f"audio-llm: the official script ends here: {error}", file=sys.stderr)
        print(error.reference, file=sys.stderr)
        return 1
    return 0


def _disagreement() -> int:
    from eval.figures import disagreement

    table = disagreement.rows()
    print(disagreement.markdown(table))
    return 1 if disagreement.wrong(table) else 0
