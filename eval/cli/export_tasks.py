"""``audio-llm export-tasks DATA``: questions of a benchmark as a task folder of lmms-eval."""

from __future__ import annotations

import argparse
import sys

from eval.cli.options import add_asking, add_benchmark, at_least

HELP = "write a benchmark's questions as an lmms-eval task folder: sound, prompts, our scorer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_benchmark(parser)
    parser.add_argument("--out", required=True, help="folder of tasks: --include_path of lmms-eval")
    parser.add_argument("--task", metavar="NAME", help="the task's name (default: audio_llm_BENCHMARK)")
    parser.add_argument("--scorer", help="whose values are the metric (default: the benchmark's first)")
    add_asking(parser)
    parser.add_argument("--limit", type=int, help="this many questions, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of --limit (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from eval.benchmarks import get_benchmark, open_benchmark
    from eval.cli.options import key_values
    from eval.lmms_export import export_task
    from eval.runner import choose

    limit = None if args.limit is None else at_least(1, "--limit", args.limit)
    seed = at_least(0, "--seed", args.seed)
    benchmark = get_benchmark(args.benchmark)
    opened = open_benchmark(args.benchmark, args.data, **key_values(args.option))
    exported = export_task(
        choose(opened, limit, seed).asked(args.instruction, args.answer_as),
        args.task or f"audio_llm_{benchmark.name}",
        args.out,
        scorer=args.scorer or benchmark.scorers[0],
        title=benchmark.title,
        progress=not args.quiet,
    )
    print(f"{exported.folder}: {exported.questions} questions")
    print(
        f"lmms_eval --model audio_llm --model_args base_url=http://HOST:PORT --include_path {exported.folder.parent} "
        f"--tasks {exported.folder.name}"
    )
    for reason, count in opened.left_out.items():
        print(f"{count} x left out: {reason}", file=sys.stderr)
    if exported.left_out:
        first = next(iter(exported.left_out.items()))
        print(f"{len(exported.left_out)} questions left out; the first, '{first[0]}': {first[1]}", file=sys.stderr)
    return 0
