"""How cost grows with size: processor seconds and peak memory at several sizes, and the exponent between them.

    python -m benchmarks.growth --sizes 1000 10000 --out growth.json

Each line is a process of its own, so that its peak memory is its own; what prepares its input is not counted. The
exponent is the slope of log seconds over log size between the two largest (1: cost in proportion). Exit code 1 where
one passes ``LIMIT``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 1.1
SMALLEST = 0.05  # processor seconds below which a ratio says nothing
PER_SHARD = 100


def write_shards(folder: Path, size: int, stop: bool = False) -> None:
    """Samples of a hundredth of a second each, so that what is measured is everything but the encoder."""
    from audio_llm.audio import Waveform
    from audio_llm.shards.schema import Sample, Source
    from audio_llm.shards.writer import ShardWriter

    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 160)).astype(np.float32)
    source = Source("bench", "train")
    with contextlib.suppress(KeyboardInterrupt), ShardWriter(folder, samples_per_shard=PER_SHARD) as writer:
        for number in range(size):
            asked = {"question": "What is heard?", "answer": ("rain", "dog", "bell")[number % 3]}
            writer.write(Sample(f"bench-{number:07d}", "open", source=source, **asked), Waveform(noise, 16000, "mono"))
        if stop:
            raise KeyboardInterrupt


def write_predictions(folder: Path, size: int) -> None:
    """Greedy answers and answers in silence, with thinking that differs from row to row."""
    from eval.predictions import Prediction, PredictionWriter

    choices, rng = ["on the left", "on the right", "in front"], np.random.default_rng(0)
    with PredictionWriter(folder / "predictions.jsonl") as writer:
        for start in range(0, size, 1000):
            rows = []
            for number in range(start, min(start + 1000, size)):
                item, said, gold = number // 2, *rng.integers(3, size=2).tolist()
                raw = f"<think>bell {item}, {choices[said]}.</think>\n<answer>{choices[said]}</answer>"
                meta = {"question_type": "direction", "room": f"r-{item % 50}", "recordings": [f"bell-{item % 5000}"]}
                meta |= {
                    "difficulty": ("easy", "hard")[item % 2],
                    "caption": f"the bell {choices[gold]}, number {item}.",
                }
                asked = (f"i-{item}", "direction", "mmau", "Where is the bell?", choices, choices[gold], raw)
                control = "silence" if number % 2 else ""
                rows.append(Prediction(*asked, control=control, completion_tokens=20, clip=f"clip-{item}", meta=meta))
            writer.write(rows)


def _said(command: list[str]) -> None:
    from audio_llm.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        if main(command):
            raise SystemExit(f"failed: {' '.join(command)}")


def _index(folder: Path, size: int) -> None:
    from audio_llm.shards.index import ShardIndex

    assert len(ShardIndex.load(folder)) == size


def _table(folder: Path, size: int) -> None:
    from audio_llm.inspection.shards import shard_table
    from audio_llm.shards.reader import ShardDataset

    assert str(size) in shard_table(ShardDataset(folder))


def _resume(folder: Path, size: int) -> None:
    from audio_llm.shards.writer import ShardWriter

    with ShardWriter(folder, samples_per_shard=PER_SHARD) as writer:
        assert len(writer) == size


def _scan(folder: Path, size: int) -> None:
    (folder / "index.npz").unlink()
    _index(folder, size)


# What is prepared, and what is measured of it.
PARTS: dict[str, tuple[Callable[[Path, int], Any], Callable[[Path, int], Any]]] = {
    "shards: write": (lambda folder, size: None, write_shards),
    "shards: first opening": (write_shards, _index),
    "shards: opening without an index": (write_shards, _scan),
    "shards: a stopped writer resumes": (lambda folder, size: write_shards(folder, size, stop=True), _resume),
    "shards: table": (write_shards, _table),
    "evaluation: rescore": (write_predictions, lambda folder, size: _said(["rescore", str(folder)])),
    "evaluation: report": (
        write_predictions,
        lambda folder, size: _said(["report", str(folder), "--out", str(folder / "report.html")]),
    ),
}


def measure(part: str, folder: Path, size: int) -> None:
    """In this process: print processor seconds and the peak of memory."""
    begin = time.process_time()
    PARTS[part][1](folder, size)
    seconds, peak = time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"size": size, "cpu_seconds": round(seconds, 3), "peak_mb": round(peak)}))


def exponent(found: list[dict[str, Any]]) -> float:
    """Slope of log seconds over log size between the two largest sizes, which start-up says least of."""
    first, last = found[-2:]
    if first["cpu_seconds"] < SMALLEST:
        return math.nan
    return math.log(last["cpu_seconds"] / first["cpu_seconds"]) / math.log(last["size"] / first["size"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--measure", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if len(args.sizes) < 2 and not args.measure:
        parser.error("--sizes: expected two or more")
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), args.sizes[0])
        return 0
    table: dict[str, Any] = {}
    print(f"{'':<34}" + "".join(f"{size:>16}" for size in args.sizes) + "   exponent")
    for part in args.parts:
        found = []
        for size in sorted(args.sizes):
            with tempfile.TemporaryDirectory() as temporary:
                PARTS[part][0](Path(temporary), size)
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.growth",
                    "--sizes",
                    str(size),
                    "--measure",
                    part,
                    temporary,
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        slope = exponent(found)
        table[part] = {"sizes": found, "exponent": None if math.isnan(slope) else round(slope, 2)}
        cells = "".join(f"{entry['cpu_seconds']:>8.2f} s{entry['peak_mb']:>4} MB" for entry in found)
        verdict = "–" if math.isnan(slope) else f"{slope:.2f}" + (f"  ABOVE {LIMIT}" if slope > LIMIT else "")
        print(f"{part:<34}{cells}   {verdict}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"limit": LIMIT, "parts": table}, indent=2) + "\n")
    return 1 if any((entry["exponent"] or 0) > LIMIT for entry in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
