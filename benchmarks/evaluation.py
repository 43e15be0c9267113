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

from audio_llm.answering.base import Engine, Request
from audio_llm.answering.engines import open_engine
from eval.benchmarks import open_benchmark
from eval.benchmarks.base import Collection
from eval.runner import choose

TARGET = 2.0  # vLLM over the better of the loops, on a CPU


@dataclass(frozen=True)
class Round:
    """One engine's answers to all questions: wall time and time of all cores in seconds."""

    seconds: float
    core_seconds: float
    replies: list[str]


def answer(engine: Engine, questions: Collection, max_tokens: int) -> Round:
    """All `questions`, their sound decoded on the way as in a run."""
    requests = (
        Request(
            item,
            tuple(engine.prepare(wave, f"item '{item.id}'") for wave in questions.waveforms(index)),
            max_tokens=max_tokens,
        )
        for index, item in enumerate(questions.items)
    )
    start, core_start = time.perf_counter(), time.process_time()  # all engines live in this process
    replies = [done.raw for done in engine.generate(requests)]
    return Round(time.perf_counter() - start, time.process_time() - core_start, replies)


@dataclass(frozen=True)
class Found:
    """Median questions a second by engine, over wall time and over the time of all cores, which other work on the
    machine does not stretch; the ratios of vLLM to the better loop round by round, and their medians; and the share of
    replies that are those of vLLM to the letter, by loop."""

    questions: int
    per_second: dict[str, float]
    per_core_second: dict[str, float]
    best_loop: str
    ratios: list[float]
    core_ratios: list[float]
    ratio: float
    core_ratio: float
    same_replies: dict[str, float]


def measure(engines: dict[str, Engine], questions: Collection, rounds: int, max_tokens: int) -> Found:
    """`rounds` of all engines in turn, after a short warm-up of each."""
    for engine in engines.values():  # warm up
        answer(engine, questions.part(range(min(8, len(questions.items)))), max_tokens)
    taken: dict[str, list[Round]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            taken[name].append(answer(engine, questions, max_tokens))
    count = len(questions.items)
    speed = {name: count / statistics.median(done.seconds for done in found) for name, found in taken.items()}
    by_core = {name: count / statistics.median(done.core_seconds for done in found) for name, found in taken.items()}
    loops = [name for name in engines if name != "vllm"]
    best = max(loops, key=lambda name: by_core[name])
    pairs = list(zip(taken[best], taken["vllm"], strict=True))
    ratios = [loop.seconds / vllm.seconds for loop, vllm in pairs]
    core_ratios = [loop.core_seconds / vllm.core_seconds for loop, vllm in pairs]
    replies = {name: found[-1].replies for name, found in taken.items()}
    same = {name: sum(map(str.__eq__, replies["vllm"], replies[name])) / count for name in loops}
    medians = statistics.median(ratios), statistics.median(core_ratios)
    return Found(count, speed, by_core, best, ratios, core_ratios, *medians, same)


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
    for name, rate in found.per_second.items():
        same = f"   {found.same_replies[name]:.0%} of replies as vLLM's" if name in found.same_replies else ""
        print(f"  {name:<24} {rate:>7.1f} questions/s, {found.per_core_second[name]:>7.1f} by core second{same}")
    verdict = "reached" if found.ratio >= TARGET else "MISSED"
    print(f"vLLM over {found.best_loop}: {found.ratio:.2f}   target {TARGET:g}: {verdict}")
    print(f"the same by core seconds: {found.core_ratio:.2f}")
    if args.out:
        tree = {"arguments": {**vars(args), "out": str(args.out)}, **asdict(found)}
        args.out.write_text(json.dumps(tree, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
