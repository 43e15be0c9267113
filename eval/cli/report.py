"""``audio-llm report``: one HTML file about one or several runs, and the limits they are held to."""

from __future__ import annotations

import argparse

from eval.cli.options import add_scorer_settings

HELP = "write one self-contained HTML page about evaluation runs; check them against limits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of audio-llm eval, FOLDER or NAME=FOLDER")
    parser.add_argument("--out", default="report.html", help="the HTML file (default report.html)")
    parser.add_argument(
        "--training",
        nargs="+",
        default=[],
        metavar="RUNDIR",
        help="training folders with metrics.jsonl (NAME=FOLDER too)",
    )
    add_scorer_settings(parser)
    parser.add_argument("--check", metavar="YAML", help="limits to hold the runs to; exit code 1 where one is not met")
    parser.add_argument("--title", default="Evaluation", help="headline of the page")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from eval.cli.options import scorer_settings
    from eval.figures import runs as stored
    from eval.figures.expectations import print_findings, read_expectations, verify
    from eval.predictions import uncollected
    from eval.report import page

    expectations = read_expectations(args.check) if args.check else None
    with uncollected():
        runs = stored.load_named(args.runs, scorer_settings(args))
        findings = verify(expectations, {run.name: run for run in runs}) if expectations else []
        page.write(Path(args.out), runs, args.training, findings, title=args.title)
    if findings:
        print_findings(findings)
    return 0 if all(finding.passed for finding in findings) else 1
