"""What several verbs read from their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from audio_llm.errors import ConfigError


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    """The data to ask about, ``--benchmark`` and the ``--option`` that :func:`key_values` reads."""
    from eval.benchmarks import names

    parser.add_argument(
        "data", metavar="DATA", nargs="+", help="the benchmark's data: folders of held-out shards, or what it reads"
    )
    known = f"{', '.join(names())} (default: scenes), FILE.yaml, or package.module:NAME: docs/benchmarks.md"
    parser.add_argument("--benchmark", default="scenes", help=known)
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the benchmark, for instance audio=FOLDER"
    )


def add_asking(parser: argparse.ArgumentParser) -> None:
    """What ``Collection.asked`` takes."""
    parser.add_argument("--instruction", metavar="TEXT", help="words to put after every question")
    parser.add_argument(
        "--answer-as",
        choices=("option", "letter"),
        help="what questions with choices ask for (its own sentence, or --instruction), and how a lone letter is read",
    )


def add_max_errors(parser: argparse.ArgumentParser) -> None:
    """What :func:`max_errors_of` reads."""
    parser.add_argument(
        "--max-errors",
        type=float,
        metavar="SHARE",
        help="of questions that may be unaskable, as with audio that is not there, before the run stops (default: 0.1, "
        "and never at fewer than 21)",
    )


def max_errors_of(args: argparse.Namespace) -> float | None:
    return None if args.max_errors is None else share("--max-errors", args.max_errors)


def add_scorer_settings(parser: argparse.ArgumentParser) -> None:
    """What :func:`scorer_settings` reads."""
    parser.add_argument(
        "--with",
        dest="scorer_settings",
        action="append",
        default=[],
        metavar="SCORER.KEY=VALUE",
        help="set up a scorer, for instance judge.url=http://HOST:PORT/v1 or label-similarity.embedder=FOLDER",
    )


def scorer_settings(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Settings by scorer of ``--with``. Raises :class:`ConfigError` for what is no SCORER.KEY=VALUE."""
    settings: dict[str, dict[str, str]] = {}
    for pair in args.scorer_settings:
        key, equals, value = pair.partition("=")
        scorer, dot, name = key.rpartition(".")
        if not (equals and dot and scorer and name):
            raise ConfigError(f"--with: expected SCORER.KEY=VALUE, found '{pair}'.")
        settings.setdefault(scorer, {})[name] = value
    return settings


def key_values(pairs: Sequence[str]) -> dict[str, str]:
    """``["a=1", "b=2"]`` of ``--option`` → a mapping. Raises :class:`ConfigError` for anything else."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--option: expected KEY=VALUE, found '{pair}'.")
        if key in values:
            raise ConfigError(f"--option: expected {key} once, found it twice.")
        values[key] = value
    return values


def at_least(low: int, flag: str, value: int) -> int:
    """`value`. Raises :class:`ConfigError` naming `flag` where it is below `low`."""
    if value < low:
        raise ConfigError(f"{flag}: expected at least {low}, found {value}.")
    return value


def share(flag: str, value: float) -> float:
    """`value`. Raises :class:`ConfigError` naming `flag` where it is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{flag}: expected a share from 0 to 1, found {value:g}.")
    return value
