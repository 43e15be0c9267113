"""``audio-llm predict MODEL FILE…``: which sound a file is, or which sounds are when and where in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

HELP = "classify sound files of any length, or find the events in them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "folder of 'train' or of 'folds' (or of model_fold_N_best files), or a published .pt or .safetensors"
    parser.add_argument("model", help=kinds)
    parser.add_argument("files", nargs="+", metavar="FILE", help="wav, flac, ogg, mp3 or opus")
    parser.add_argument(
        "--format",
        choices=("table", "json", "block", "csv"),
        default="table",
        help="json: one line per file; csv: events every 100 ms as DCASE has them (default: table)",
    )
    parser.add_argument("--hop", type=float, metavar="SECONDS", help="from window to window (default: the window)")
    parser.add_argument(
        "--channels", choices=("refuse", "mean", "first"), help="files with several channels (default: as trained)"
    )
    parser.add_argument(
        "--fold",
        "--fold_num",
        metavar="N",
        help="of a folder of folds: the model tested on fold N (default: all of them)",
    )
    parser.add_argument("--threshold", type=float, help="of events: when one counts as heard (default: as trained)")
    parser.add_argument("--out", metavar="FOLDER", help="of events: a .csv or .json for each file, instead of printing")


def run(args: argparse.Namespace) -> int:
    """2 when a file could not be heard: it is named, and the others are still done."""
    from audio_llm.errors import AudioLLMError
    from audio_llm.tasks.seld import predict

    heard = _events(args) if predict.finds_events(args.model) else _classes(args)
    failed = 0
    for file in args.files:
        try:
            print(heard(file))
        except AudioLLMError as error:
            failed += 1
            print(f"audio-llm predict: error: {error}", file=sys.stderr)
    return 2 if failed else 0


def _classes(args: argparse.Namespace) -> Callable[[str], str]:
    from audio_llm.tasks.classification import predict

    _refuse(args, "threshold", "out", format="csv", model="a network that finds events")
    classifier = predict.load(args.model, args.channels, args.fold)

    def heard(file: str) -> str:
        prediction = predict.predict_file(classifier, file, args.hop)
        if args.format == "json":
            return predict.as_json(file, prediction)
        if args.format == "block":
            return predict.as_block(prediction)
        return predict.as_table(file, prediction)

    return heard


def _events(args: argparse.Namespace) -> Callable[[str], str]:
    from audio_llm import files
    from audio_llm.datasets import seld_tables
    from audio_llm.errors import one_line
    from audio_llm.tasks.seld import predict, tracks

    _refuse(args, "hop", "channels", "fold", format="block", model="a classifier")
    suffix = {"csv": ".csv", "json": ".json"}.get(args.format, ".txt")
    paths = {file: Path(args.out) / f"{Path(file).stem}{suffix}" for file in args.files} if args.out else {}
    _refuse_doubles(paths)
    locator = predict.load(args.model, args.threshold)

    def heard(file: str) -> str:
        found = predict.locate_file(locator, file)
        events = tracks.join_events(found, locator.labels)
        if args.format == "csv":
            text = seld_tables.format_rows(found.rows()).rstrip("\n")
        else:
            text = (predict.as_json if args.format == "json" else predict.as_table)(file, events)
        if not args.out:
            return text
        paths[file].parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(paths[file], text + "\n")
        return one_line(f"{file}: {paths[file]}")

    return heard


def _refuse_doubles(paths: Mapping[str, Path]) -> None:
    """Two files that would be written to one name, so that only the last of them were left."""
    from audio_llm.errors import ConfigError, describe

    written: dict[Path, str] = {}
    for file, path in paths.items():
        other = written.setdefault(path, file)
        if other != file:
            found = f"'{other}' and '{file}' for {path}"
            raise ConfigError(describe("--out", "files of different names", found, "Give them in separate calls."))


def _refuse(args: argparse.Namespace, *options: str, format: str, model: str) -> None:
    from audio_llm.errors import ConfigError

    for option in options:
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}: for {model}, which this is not.")
    if args.format == format:
        raise ConfigError(f"--format {format}: for {model}, which this is not.")
