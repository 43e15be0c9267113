"""Mamba-2 in chunks against the recurrence step by step: seconds and peak memory by number of frames.

    python benchmarks/mamba.py [--frames 250 500 1000 2000 4000] [--repeats 7]

Both run on the same inputs, one after the other, in this process, on one thread; seconds are the processor's, which do
not count what else the machine does meanwhile. Memory is the peak of one pass over a sequence in a process of its own,
beyond what that held before, measured by the operating system; it should double with the frames.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch

from audio_llm.encoders.mamba import chunked_scan, sequential_scan

HEADS, WIDTH, STATE = 4, 64, 64  # a layer of hidden size 128


def inputs(frames: int) -> tuple[torch.Tensor, ...]:
    """x, dt, a, b, c of one sequence; see ``audio_llm.encoders.mamba``."""
    torch.manual_seed(0)
    return (
        torch.randn(1, frames, HEADS, WIDTH),
        torch.rand(1, frames, HEADS),
        -torch.rand(HEADS) - 0.1,
        torch.randn(1, frames, STATE) / 8,
        torch.randn(1, frames, STATE) / 8,
    )


def best_seconds(run: Callable[..., torch.Tensor], values: tuple[torch.Tensor, ...], repeats: int) -> float:
    """Processor time of the shortest of several runs: what disturbs one can only add."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run(*values)
        times.append(time.process_time() - start)
    return min(times)


def peak_mib() -> float:
    """Largest resident size of this process so far (the kernel counts in KiB, on macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def added_mib(frames: int) -> float:
    """Peak memory of one chunked pass, in a process of its own, beyond what its inputs and a short pass need."""
    command = [sys.executable, __file__, "--measure", str(frames)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps freed blocks by its own rules
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000])
    parser.add_argument("--memory-frames", type=int, nargs="*", default=[16000, 32000, 64000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        chunked_scan(*inputs(64))
        values = inputs(args.measure)
        before = psutil.Process().memory_info().rss / 2**20  # not the peak, which belongs to the imports
        chunked_scan(*values)
        print(peak_mib() - before)
        return
    print(f"{HEADS} heads of {WIDTH}, state {STATE}, one thread, float32\n")
    print("| frames | step by step, s | chunked, s | ratio | largest difference |\n|---|---|---|---|---|")
    for frames in args.frames:
        values = inputs(frames)
        difference = float((sequential_scan(*values) - chunked_scan(*values)).abs().max())
        slow, fast = (best_seconds(run, values, args.repeats) for run in (sequential_scan, chunked_scan))
        print(f"| {frames} | {slow:.4f} | {fast:.4f} | {slow / fast:.1f} | {difference:.1e} |")
    if args.memory_frames:
        print("\n| frames | memory of a chunked pass, MiB | MiB per 1,000 frames |\n|---|---|---|")
    for frames in args.memory_frames:
        added = added_mib(frames)
        print(f"| {frames} | {added:.1f} | {1000 * added / frames:.2f} |")


if __name__ == "__main__":
    main()
