"""``audio-llm predict MODEL FILE…``: which sound a file is, or which sounds are when and where in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audio_llm.cli.options import add_hearing

HELP = "classify sound files of any length, or find the events in them"
_SUFFIXES = {"csv": ".csv", "json": ".json"}  # of --out; everything else is text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "folder of 'train' or of 'folds' (or of model_fold_N_best files), or a published .pt or .safetensors"
    parser.add_argument("model", metavar="MODEL", help=kinds)
    parser.add_argument("files", nargs="+", metavar="FILE", help="wav, flac, ogg, mp3 or opus")
    parser.add_argument(
        "--format",
        default="table",
        help="table, json (one line per file), block (of classes, as the UrbanSound8K project prints them) or csv "
        "(events every 100 ms as DCASE has them); default: table",
    )
    parser.add_argument("--hop", type=float, metavar="SECONDS", help="from window to window (default: the window)")
    add_hearing(parser, "--channels", default=None)
    parser.add_argument(
        "--fold",
        "--fold_num",
        metavar="N",
        help="of a folder of folds: the model tested on fold N (default: all of them)",
    )
    parser.add_argument("--threshold", type=float, help="of events: when one counts as heard (default: as trained)")
    parser.add_argument(
        "--labels", metavar="CSV", help="of classes: their names, as AudioSet's class_labels_indices.csv has them"
    )
    parser.add_argument("--out", metavar="FOLDER", help="a file for each sound file, instead of printing")


OPTIONS = ("hop", "hearing", "fold", "threshold", "labels")


def run(args: argparse.Namespace) -> int:
    """2 when a file could not be heard: it is named, and the others are still done."""
    from audio_llm.errors import AudioLLMError, one_line
    from audio_llm.files import write_atomically

    task, options = _task(args), {name: getattr(args, name) for name in OPTIONS if _given(args, name)}
    suffix = _SUFFIXES.get(args.format, ".txt")
    paths = {file: Path(args.out) / f"{Path(file).stem}{suffix}" for file in args.files} if args.out else {}
    _refuse_doubles(paths)
    predict = task.predictor(Path(args.model), options)
    failed = 0
    for file in args.files:
        try:
            text = predict(file, args.format)
        except AudioLLMError as error:
            failed += 1
            print(f"audio-llm predict: error: {error}", file=sys.stderr)
            continue
        if file in paths:
            paths[file].parent.mkdir(parents=True, exist_ok=True)
            write_atomically(paths[file], text + "\n")
        print(one_line(f"{file}: {paths[file]}") if file in paths else text)
    return 2 if failed else 0


def _task(args: argparse.Namespace) -> Any:
    """The task that recognises the model and has what was asked for."""
    from audio_llm.errors import CheckpointError, ConfigError, describe
    from audio_llm.tasks.base import TASKS, find_task

    able = [task for task in TASKS.values() if task.formats]
    task = find_task(args.model) if Path(args.model).exists() else None
    if task is None or not task.formats:
        expected = "; ".join(dict.fromkeys(task.models for task in able))
        found = f"one of task {task.name}" if task else "none of them" if Path(args.model).exists() else "nothing"
        cure = f"audio-llm eval {args.model} DATA --out RUN scores it." if task else None
        raise CheckpointError(describe(f"model {args.model}", expected, found, cure))
    asked = {f"--{name}": [other for other in able if name in other.options] for name in OPTIONS if _given(args, name)}
    asked[f"--format {args.format}"] = [other for other in able if args.format in other.formats]
    for flag, takers in asked.items():
        if task not in takers:
            names = " or ".join(other.name for other in takers) or "none"
            found = f"one of {task.name}, whose formats are {', '.join(task.formats)}"
            raise ConfigError(describe(flag, f"a model of task {names}", found))
    return task


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) is not None


def _refuse_doubles(paths: Mapping[str, Path]) -> None:
    """Two files that would be written to one name, so that only the last of them were left."""
    from audio_llm.errors import ConfigError, describe

    written: dict[Path, str] = {}
    for file, path in paths.items():
        other = written.setdefault(path, file)
        if other != file:
            found = f"'{other}' and '{file}' for {path}"
            raise ConfigError(describe("--out", "files of different names", found, "Give them in separate calls."))
