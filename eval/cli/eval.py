"""``audio-llm eval``: ask a model held-out questions, with controls, and store every answer."""

from __future__ import annotations

import argparse
import math
import sys

from audio_llm.cli.options import add_hearing
from eval.cli.options import add_asking, add_benchmark, add_max_errors, add_scorer_settings, at_least, max_errors_of

USUAL, FULL = ("silence,swap,silence_each", 1), ("all", 3)  # controls, orders of the options: unless they are given
HELP = "answer held-out questions with a model, with controls; every answer is stored and scored"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="checkpoint folder, the model's name behind an address, an encoder folder, one of SELD tables; "
        "or a published classifier or stereo SELD",
    )
    add_benchmark(parser)
    parser.add_argument("--out", required=True, help="run folder: predictions.jsonl, run.json, scores")
    parser.add_argument(
        "--engine", default="auto", help="auto, vllm, transformers, …, or an OpenAI address http://HOST:PORT/v1"
    )
    parser.add_argument("--adapter", help="PEFT adapter folder (its name behind an address)")
    parser.add_argument(
        "--full", action="store_true", help="all controls, options in 3 other orders, and the page OUT/report.html"
    )
    parser.add_argument(
        "--controls",
        help="of silence, swap, other_audio, shuffled_options, text_only, silence_each (each of several sounds alone); "
        "or all, none (default: silence,swap,silence_each)",
    )
    parser.add_argument(
        "--permutations", type=int, metavar="K", help="orders of the options under shuffled_options (default: 1)"
    )
    parser.add_argument("--temperature", default="0", help="one pass each, for instance 0,1; controls run at the first")
    parser.add_argument("--samples", type=int, default=1, help="answers per question at temperatures above 0")
    parser.add_argument("--limit", type=int, help="this many questions, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, --limit and controls (default: 0)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest reply; a longer one is cut and counted")
    parser.add_argument("--beams", type=int, default=1, help="search with so many beams (BAT: 4); default: greedy")
    parser.add_argument("--labels", metavar="JSON", help="of an encoder folder: file with its 'labels', dataset.json")
    parser.add_argument("--style", help="begin the reply for the model: answer, think, think_semantics or plain")
    parser.add_argument(
        "--order",
        default="audio",
        help="what comes first in a request: audio (default), text, or system (a system message, then the audio)",
    )
    add_asking(parser)
    add_scorer_settings(parser)
    add_hearing(parser, "--mono")
    parser.add_argument("--batch-size", type=int, help="sequences decoded together (requests in flight over HTTP)")
    add_max_errors(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="drop an earlier run in --out instead of continuing it"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from audio_llm.files import only_writer

    with only_writer(args.out):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from audio_llm.answering.base import is_address
    from audio_llm.errors import ConfigError, describe
    from audio_llm.model.validate import expect_files
    from eval.cli.options import key_values, scorer_settings
    from eval.controls import EACH, parse_controls
    from eval.tasks import Options, evaluator

    if args.batch_size is not None:
        at_least(1, "--batch-size", args.batch_size)
    usual, permutations = FULL if args.full else USUAL
    controls = parse_controls(usual if args.controls is None else args.controls)
    for path in args.data:
        if not Path(path).exists():
            raise ConfigError(describe(f"data {path}", "a file or folder", "none of that name"))
    if args.adapter and not is_address(args.engine):
        expect_files(f"adapter {args.adapter}", Path(args.adapter), ("adapter_config.json",))
    if Path(args.model).exists() and (evaluate := evaluator(args.model)):
        if args.full:
            raise ConfigError("--full: expected a model that answers questions, found a folder of another task.")
        pairs = key_values(args.option) | ({"labels": args.labels} if args.labels else {})
        options = Options(pairs, args.batch_size, args.overwrite, args.quiet)
        print(evaluate(args.model, args.data, Path(args.out), options))
        return 0
    from audio_llm.answering.engines import find_engine, open_engine
    from eval import predictions, runner
    from eval.figures.runs import Run, scorers_for
    from eval.figures.tables import print_run, write_scores

    kind = find_engine(args.engine, args.model)
    if args.controls is None and "text_only" in controls and kind.needs_audio:
        controls.remove("text_only")
        print(f"without the control text_only: {kind.name} cannot be asked without audio")
    settings = runner.EvalSettings(
        temperatures=_temperatures(args.temperature),
        samples=at_least(1, "--samples", args.samples),
        controls=controls,
        permutations=at_least(1, "--permutations", permutations if args.permutations is None else args.permutations),
        seed=at_least(0, "--seed", args.seed),
        max_tokens=at_least(1, "--max-tokens", args.max_tokens),
        style=args.style,
        order=args.order,
        beams=args.beams,
        instruction=args.instruction,
        answer_as=args.answer_as,
        hearing=args.hearing,
        limit=None if args.limit is None else at_least(1, "--limit", args.limit),
    )
    max_errors = max_errors_of(args)
    scorers = scorers_for(args.benchmark, None, scorer_settings(args))  # now: a wrong setting costs no answers
    out = Path(args.out)
    source = runner.Source(args.benchmark, tuple(args.data), key_values(args.option))
    questions = source.open(settings)
    for reason, count in questions.counts.items():
        print(f"{count} x {reason}")
    for reason, count in questions.left_out.items():
        print(f"{count} x left out: {reason}")
    most = max((item.audios for item in questions.items), default=1)
    if EACH in controls and most == 1:
        controls.remove(EACH)
    command = ["audio-llm", "eval", *sys.argv[2:]]
    manifest = runner.build_manifest(args.model, args.adapter, source, questions, settings, kind.name, command)
    if not args.overwrite and runner.is_complete(out, manifest):
        print(f"{out}: all that can be asked is answered already (--overwrite asks again).")
    else:
        if not args.overwrite:  # now: loading a model takes long
            runner.check_free(out, manifest)
        size, seed, hearing = args.batch_size, args.seed, args.hearing
        how = {"batch_size": size, "max_audios": max(4, most), "seed": seed, "hearing": hearing}
        engine = open_engine(args.engine, args.model, args.adapter, **how)
        manifest["engine"] = engine.name
        try:
            if args.overwrite:  # only now, when the new run can begin
                runner.clean(out)
            result = runner.evaluate(
                engine, questions, settings, out, manifest, max_errors=max_errors, progress=not args.quiet
            )
        finally:
            engine.close()
        print(
            f"{result.answered} answers in {result.seconds:.1f} s"
            + (f", {result.reused} kept from before" if result.reused else "")
            + (f", {result.errors} could not be asked; the first: {result.first_error}" if result.errors else "")
        )
    rows = predictions.read(out)
    print(f"{predictions.questions_asked(rows)} of {len(questions.items)} questions were asked with their sound")
    scored = Run(out.resolve().name, rows, scorers, args.benchmark, predictions.read_manifest(out))
    write_scores(out, scored)
    print_run(scored)
    if args.full:
        from eval.report import page

        page.write(out / page.FILE_NAME, [scored])
    return 0


def _temperatures(text: str) -> list[float]:
    from audio_llm.errors import ConfigError

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--temperature: expected numbers such as 0,1, found '{text}'.") from error
    if not all(0 <= value < math.inf for value in values) or len(set(values)) < len(values):
        raise ConfigError(f"--temperature: expected different numbers of at least 0, found '{text}'.")
    return values
