"""``audio-llm predict MODEL FILE…``: which sound a file is, by a trained or a published classifier."""

from __future__ import annotations

import argparse
import sys

HELP = "classify sound files of any length"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "encoder folder of 'train', folder of 'folds' (its models together), or a published .pt or .safetensors"
    parser.add_argument("model", help=kinds)
    parser.add_argument("files", nargs="+", metavar="FILE", help="wav, flac, ogg, mp3 or opus")
    parser.add_argument(
        "--format", choices=("table", "json", "block"), default="table", help="json: one line per file (default: table)"
    )
    parser.add_argument("--hop", type=float, metavar="SECONDS", help="from window to window (default: the window)")
    parser.add_argument(
        "--channels", choices=("refuse", "mean", "first"), help="files with several channels (default: as trained)"
    )


def run(args: argparse.Namespace) -> int:
    """2 when a file could not be classified: it is named, and the others are still done."""
    from audio_llm import predicting
    from audio_llm.errors import AudioLLMError

    classifier = predicting.load(args.model, args.channels)
    failed = 0
    for file in args.files:
        try:
            prediction = predicting.predict_file(classifier, file, args.hop)
        except AudioLLMError as error:
            failed += 1
            print(f"audio-llm predict: error: {error}", file=sys.stderr)
            continue
        if args.format == "json":
            print(predicting.as_json(file, prediction))
        elif args.format == "block":
            print(predicting.as_block(prediction))
        else:
            print(predicting.as_table(file, prediction))
    return 2 if failed else 0
