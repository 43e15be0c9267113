"""Evaluation: questions a second of the vLLM engine against plain Transformers loops, same model, same questions.

    python -m benchmarks.evaluation MODEL SHARDS --out evaluation.json

The engines are those of ``audio-llm eval``: decoding of the sound, prompts and reading included, greedy. They take
turns, round after round, and a ratio is the median over the rounds, so that what else the machine does falls on all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eval.benchmarks import open_benchmark
from eval.benchmarks.base import Collection
from eval.engines import Engine, Request, open_engine
from eval.runner import choose

TARGET = 2.0  # vLLM over the better of the loops, on a CPU


def answer(engine: Engine, questions: Collection, max_tokens: int) -> tuple[float, list[str]]:
    """Wall time in seconds of all `questions`, sound decoded on the way as in a run, and the replies."""
    requests = (
        Request(item, engine.prepare(questions.waveform(index), f"item '{item.id}'"), 0.0, max_tokens, 0)
        for index, item in enumerate(questions.items)
    )
    start = time.perf_counter()
    replies = [done.raw for done in engine.generate(requests)]
    return time.perf_counter() - start, replies


@dataclass(frozen=True)
class Found:
    """Median questions a second by engine; the ratio of vLLM to the better loop, round by round and their median; and
    the share of replies that are those of vLLM to the letter, by loop."""

    questions: int
    questions_per_second: dict[str, float]
    best_loop: str
    ratios: list[float]
    ratio: float
    same_replies: dict[str, float]


def measure(engines: dict[str, Engine], questions: Collection, rounds: int, max_tokens: int) -> Found:
    """`rounds` of all engines in turn, after a short warm-up of each."""
    for engine in engines.values():  # warm up
        answer(engine, questions.part(range(min(8, len(questions.items)))), max_tokens)
    taken: dict[str, list[float]] = {name: [] for name in engines}
    replies: dict[str, list[str]] = {}
    for _ in range(rounds):
        for name, engine in engines.items():
            seconds, replies[name] = answer(engine, questions, max_tokens)
            taken[name].append(seconds)
    loops = [name for name in engines if name != "vllm"]
    best = min(loops, key=lambda name: statistics.median(taken[name]))
    count = len(questions.items)
    same = {name: sum(a == b for a, b in zip(replies["vllm"], replies[name], strict=True)) / count for name in loops}
    rates = {name: count / statistics.median(seconds) for name, seconds in taken.items()}
    ratios = [loop / vllm for loop, vllm in zip(taken[best], taken["vllm"], strict=True)]
    return Found(count, rates, best, ratios, statistics.median(ratios), same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("data", nargs="+", help="shard folders")
    parser.add_argument("--limit", type=int, default=128, help="questions, drawn by the seed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of the Transformers loops")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    questions = choose(open_benchmark("scenes", args.data), args.limit, seed=0)
    engines: dict[str, Engine] = {"vllm": open_engine("vllm", args.model)}
    try:
        for size in args.batch:
            engines[f"transformers, batch {size}"] = open_engine("transformers", args.model, batch_size=size)
        found = measure(engines, questions, args.rounds, args.max_tokens)
    finally:
        for engine in engines.values():
            engine.close()

    print(f"\n{found.questions} questions, {torch.get_num_threads()} threads, {args.rounds} rounds")
    for name, rate in found.questions_per_second.items():
        same = f"   {found.same_replies[name]:.0%} of replies as vLLM's" if name in found.same_replies else ""
        print(f"  {name:<24} {rate:>8.1f} questions/s{same}")
    verdict = "reached" if found.ratio >= TARGET else "MISSED"
    print(f"vLLM over {found.best_loop}: {found.ratio:.2f}   target {TARGET:g}: {verdict}")
    if args.out:
        tree = {"arguments": {**vars(args), "out": str(args.out)}, **asdict(found)}
        args.out.write_text(json.dumps(tree, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
