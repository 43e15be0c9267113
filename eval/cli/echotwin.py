"""``audio-llm echotwin``: EchoTwin-QA by the flags of the original, and the table of what it hears.

``audio-llm train`` with ``task: echotwin`` and ``audio-llm eval --benchmark dcase_aqa`` do the same with recipes, run
folders and controls.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "train and evaluate EchoTwin-QA by the flags of the original, compare runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="train|evaluate|table")
    _train(kinds.add_parser("train", help="train on JSON folders", description="Train by the original's flags."))
    _evaluate(
        kinds.add_parser("evaluate", help="score a dev set, write submission.csv", description="Evaluate a model.")
    )
    table = kinds.add_parser("table", help="compare runs of audio-llm eval", description="Compare runs.")
    table.add_argument("runs", nargs="+", metavar="NAME=RUN", help="run folders of audio-llm eval, best first")
    table.add_argument("--baseline", nargs="+", default=[], metavar="NAME=RUN", help="what every model has to beat")
    table.add_argument("--train", nargs="+", required=True, metavar="DATA", help="training questions: majority letter")
    table.add_argument("--out", help="write the table to this file as well")
    table.add_argument(
        "--strict",
        action="store_true",
        help="exit code 1 unless every model beats the next one and the baselines, and the first one's choice never "
        "moves when options are permuted",
    )


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json_dir_train", required=True, help="folder with one JSON file a question")
    parser.add_argument("--json_dir_val", required=True, help="the same, for validation")
    parser.add_argument("--audio_dir", help="folder of the sound files; by default where the questions say")
    parser.add_argument("--checkpoint", required=True, help="BEATs checkpoint, or an encoder folder")
    parser.add_argument("--save_dir", default="runs/exp1", help="run folder (default: runs/exp1)")
    parser.add_argument("--batch_size", type=int, default=32, help="questions at once")
    parser.add_argument("--epochs", type=float, default=15, help="passes over the training questions")
    parser.add_argument("--lr_text", type=float, default=1e-5, help="rate of text tower and head")
    parser.add_argument("--lr_audio", type=float, default=1e-6, help="rate of the audio layers that learn")
    parser.add_argument("--unfreeze_audio_layers", type=int, default=0, help="how many of the last audio layers learn")
    parser.add_argument("--seed", type=int, default=1337, help="of weights and order")
    parser.add_argument("--num_workers", type=int, default=4, help="accepted, without effect")
    parser.add_argument("--amp", action="store_true", help="bfloat16; features stay in float32")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="of AdamW")
    parser.add_argument("--hf_text_dir", help="text tower; without it, a small one is built from the questions")
    parser.add_argument("--head", choices=("options", "letters"), default="options", help="letters: the original's")
    parser.add_argument("--cache", help="folder for what the frozen audio tower makes of the recordings")
    parser.add_argument(
        "--duplicates",
        choices=("keep", "drop"),
        default="drop",
        help="validation questions about a clip of the training questions (default: drop)",
    )
    parser.add_argument(
        "--max_rejects", type=float, default=0.05, help="share of unusable questions beyond which the run stops"
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_checkpoint", required=True, help="an original best.pt, or a run folder of training")
    parser.add_argument("--beats_ckpt", help="of a best.pt: the BEATs checkpoint it was trained with")
    parser.add_argument("--hf_text_dir", help="of a best.pt: the text tower's folder (configuration and tokenizer)")
    parser.add_argument("--dev_json_dir", help="questions with answers, to be scored")
    parser.add_argument("--dev_audio_dir", help="folder of the sound files of --dev_json_dir")
    parser.add_argument("--eval_json_dir", help="questions to be answered in --output_csv")
    parser.add_argument("--eval_audio_dir", help="folder of the sound files of --eval_json_dir")
    parser.add_argument("--batch_size", type=int, default=32, help="questions at once")
    parser.add_argument("--num_workers", type=int, default=4, help="accepted, without effect")
    parser.add_argument("--output_csv", default="submission.csv", help="where the answers go")
    parser.add_argument("--freeze_audio", action="store_true", help="accepted, without effect")
    parser.add_argument(
        "--key", choices=("id", "stem"), default="stem", help="column 'question' (stem: the original's)"
    )


def run(args: argparse.Namespace) -> int:
    return {"train": run_train, "evaluate": run_evaluate, "table": run_table}[args.kind](args)


def run_train(args: argparse.Namespace) -> int:
    from audio_llm.tasks.echotwin import task
    from audio_llm.tasks.echotwin.model import EchoTwinConfig

    checkpoint = Path(args.checkpoint)
    encoder = {"path": str(checkpoint)} if checkpoint.is_dir() else {"name": "beats", "published": str(checkpoint)}
    task.report(
        task.EchoTwinRecipe(
            train=[Path(args.json_dir_train)],
            validation=Path(args.json_dir_val),
            audio=Path(args.audio_dir) if args.audio_dir else None,
            output=Path(args.save_dir),
            encoder=encoder,
            text=task.TextTower(path=Path(args.hf_text_dir) if args.hf_text_dir else None),
            model=EchoTwinConfig(head=args.head),
            unfreeze=args.unfreeze_audio_layers,
            cache=Path(args.cache) if args.cache else None,
            epochs=args.epochs,
            batch_size=args.batch_size,
            learning_rate=args.lr_text,
            text_rate=args.lr_text,
            audio_rate=args.lr_audio,
            weight_decay=args.weight_decay,
            duplicates=args.duplicates,
            max_reject_share=args.max_rejects,
            precision="bf16" if args.amp else "fp32",
            seed=args.seed,
        )
    )
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    from audio_llm.errors import ConfigError, describe
    from eval.cli.options import at_least
    from eval.tasks import echotwin

    at_least(1, "--batch_size", args.batch_size)
    if not args.dev_json_dir and not args.eval_json_dir:
        raise ConfigError(describe("echotwin evaluate", "--dev_json_dir or --eval_json_dir", "neither"))
    engine = echotwin.open_model(args.model_checkpoint, args.beats_ckpt, args.hf_text_dir, args.batch_size)
    if args.dev_json_dir:
        answers = echotwin.answer(engine, args.dev_json_dir, args.dev_audio_dir)
        print(echotwin.dev_table(answers))
    if args.eval_json_dir:
        answers = echotwin.answer(engine, args.eval_json_dir, args.eval_audio_dir)
        for line in echotwin.write_submission(answers, args.output_csv, args.key):
            print(line)
    return 0


def run_table(args: argparse.Namespace) -> int:
    from audio_llm.errors import ConfigError, describe
    from audio_llm.files import write_asked
    from eval.tasks import echotwin

    pairs = [text.partition("=") for text in (*args.runs, *args.baseline)]
    names = [name for name, _, _ in pairs]
    for name, equals, folder in pairs:
        if not (name and equals and folder):
            raise ConfigError(describe("echotwin table", "NAME=RUN", f"'{name}{equals}{folder}'"))
        if names.count(name) > 1:
            raise ConfigError(describe(f"run '{name}'", "a name of its own", "several"))
    runs = [(name, folder) for name, _, folder in pairs]
    models, baselines = runs[: len(args.runs)], runs[len(args.runs) :]
    found = echotwin.table(dict(models), dict(baselines), args.train)
    print(found.text)
    if args.out:
        write_asked(args.out, found.text + "\n")
    if not args.strict or not found.failures:
        return 0
    print("\n".join(found.failures), file=sys.stderr)
    return 1
