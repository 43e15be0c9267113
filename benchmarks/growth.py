"""How cost grows with size: processor seconds and peak memory at several sizes, and the exponent between them.

    python -m benchmarks.growth --sizes 1000 10000 --out growth.json

Each line is a process of its own, so that its peak memory is its own; what prepares its input is not counted, processes
that it starts are. The exponent is the slope of log seconds over log size between the two largest (1: cost in
proportion). Exit code 1 where one passes ``LIMIT``. Lines of `prep` are about a tenth or a fiftieth of the size; beside
them stands how many times as much two workers do in a second of the clock as one, where the machine has nothing else to
do, and how much of the processor time of more work is the driver's, whatever else the machine does.
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

from data_prep.scenes import pool

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


def _partners(folder: Path, size: int) -> None:
    from eval.benchmarks.base import Item
    from eval.controls import Partners

    items = [Item(f"i-{n}", "Where?", [], "left", "direction", "bench", f"clip-{n // 2}") for n in range(size)]
    partners = Partners(items, seed=0)
    assert all(next(partners.of(index)) // 2 != index // 2 for index in range(size))


def write_outputs(folder: Path, size: int) -> None:
    """Clips of a second: what a network says of three classes, and two events in each that it mostly heard."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(0, 0.2, (size, 10, 3, 3, 3)).astype(np.float32)
    rows = np.zeros((size, 12, 6))
    rows[:, :, 0] = np.tile(np.arange(6), 2)
    rows[:, :6, 1] = rng.integers(3, size=(size, 1))
    rows[:, 6:, 1] = (rows[:, :6, 1] + rng.integers(1, 3, size=(size, 1))) % 3
    rows[:, :, 3], rows[:, :, 4] = rng.integers(-90, 91, (size, 12)), rng.integers(50, 400, (size, 12))
    place = np.arange(size)[:, None], rows[:, :, 0].astype(int), slice(None)
    for axis, value in enumerate((np.cos(np.radians(rows[:, :, 3])), np.sin(np.radians(rows[:, :, 3])))):
        outputs[*place, axis, rows[:, :, 1].astype(int)] += 0.7 * value[..., None]
    np.savez(folder / "outputs.npz", outputs=outputs, rows=rows)


def _thresholds(folder: Path, size: int) -> None:
    from audio_llm.tasks.seld.scores import tune_thresholds

    with np.load(folder / "outputs.npz") as stored:
        outputs, rows = (dict(enumerate(stored[name])) for name in ("outputs", "rows"))
    thresholds, _ = tune_thresholds(outputs, rows)  # type: ignore[arg-type]
    assert len(outputs) == size and len(thresholds) == 3


def _store(folder: Path) -> Any:
    import torch

    from audio_llm.training.encoder_cache import TokenStore

    return TokenStore(folder / "bench.sqlite", torch.bfloat16, 2**40)


def fill_cache(folder: Path, size: int) -> None:
    """Batches of eight windows, each of 64 tokens of 192 numbers."""
    import torch

    store, mask = _store(folder), torch.ones(64, dtype=torch.bool)
    for start in range(0, size, 8):
        numbers = range(start, min(start + 8, size))
        store.write({b"%016d" % n: (torch.full((64, 192), n % 100, dtype=torch.bfloat16), mask) for n in numbers})


def _read_cache(folder: Path, size: int) -> None:
    store = _store(folder)
    order = np.random.default_rng(0).permutation(size)
    for start in range(0, size, 8):
        keys = [b"%016d" % n for n in order[start : start + 8]]
        assert store.read(keys).keys() == set(keys)


def write_table(folder: Path, size: int) -> None:
    """A CSV table of questions about WAV files of a tenth of a second, each with its own samples."""
    import soundfile

    noise, lines = np.random.default_rng(0).uniform(-0.5, 0.5, 1600), ["audio,question,answer,group"]
    for number in range(size // 10):
        soundfile.write(folder / f"{number}.wav", np.roll(noise, number) * (1 - number / size), 16000)
        lines.append(f"{number}.wav,What is heard?,{('rain', 'dog', 'bell')[number % 3]},{number}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    recipe = "verb: prep\nkind: manifest\ncorpus: bench\nformat: csv\n"
    recipe += f"path: {folder / 'rows.csv'}\nsplits: {{train: 1}}\naudio: {{sample_rate: 16000, layouts: [mono]}}\n"
    (folder / "recipe.yaml").write_text(recipe)


def _prep(workers: int) -> Callable[[Path, int], None]:
    def prepare(folder: Path, size: int) -> None:
        recipe = str(folder / "recipe.yaml")
        _said(["prep", recipe, str(folder / "out"), "--quiet", "--workers", str(workers)])

    return prepare


def write_recipe(folder: Path, size: int) -> None:
    """The quickstart's scenes, fewer of them in fewer rooms."""
    import yaml

    tree = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "quickstart" / "scenes.yaml").read_text())
    tree["rooms"] |= {"train": 2, "validation": 1, "test": 1}
    tree["subsets"] = {"encoder": {"split": "train", "count": size // 50}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({key: tree[key] for key in tree if key != "text"}))


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
    "evaluation: partners of other_audio": (lambda folder, size: None, _partners),
    "SELD: thresholds": (write_outputs, _thresholds),
    **{f"prep: manifest, size / 10, workers {n}": (write_table, _prep(n)) for n in (1, 2)},
    **{f"prep: scenes, size / 50, workers {n}": (write_recipe, _prep(n)) for n in (1, 2)},
    # Last: what is loaded here to prepare them would count as the peak of processes that begin later.
    "encoder cache: fill": (lambda folder, size: None, fill_cache),
    "encoder cache: read": (fill_cache, _read_cache),
}


def _processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(part: str, folder: Path, size: int) -> None:
    """In this process: print processor seconds, those of the clock and the peak of memory."""
    begin, own, clock = _processor_seconds(), time.process_time(), time.perf_counter()
    PARTS[part][1](folder, size)
    pool.stop()  # what workers took is known when they have ended
    seconds, own, clock = _processor_seconds() - begin, time.process_time() - own, time.perf_counter() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rounded = {"cpu_seconds": seconds, "own_cpu_seconds": own, "seconds": clock}
    print(json.dumps({"size": size, "peak_mb": round(peak)} | {key: round(value, 3) for key, value in rounded.items()}))


def exponent(found: list[dict[str, Any]]) -> float:
    """Slope of log seconds over log size between the two largest sizes, which start-up says least of."""
    first, last = found[-2:]
    if first["cpu_seconds"] < SMALLEST:
        return math.nan
    return math.log(last["cpu_seconds"] / first["cpu_seconds"]) / math.log(last["size"] / first["size"])


def driver_share(found: list[dict[str, Any]]) -> float:
    """Of the processor time that more work takes, between the two largest sizes, the share of the process that hands it
    out: its inverse is how many processors can be kept busy. NaN where the difference is too small to be told."""
    first, last = found[-2:]
    more = last["cpu_seconds"] - first["cpu_seconds"]
    return (last["own_cpu_seconds"] - first["own_cpu_seconds"]) / more if more >= SMALLEST else math.nan


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
    print(f"{'':<37}" + "".join(f"{size:>16}" for size in args.sizes) + "   exponent")
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
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        slope = exponent(found)
        table[part] = {"sizes": found, "exponent": None if math.isnan(slope) else round(slope, 2)}
        cells = "".join(f"{entry['cpu_seconds']:>8.2f} s{entry['peak_mb']:>4} MB" for entry in found)
        verdict = "–" if math.isnan(slope) else f"{slope:.2f}" + (f"  ABOVE {LIMIT}" if slope > LIMIT else "")
        print(f"{part:<37}{cells}   {verdict}", flush=True)
    for name in [name for name in table if name.endswith("workers 1") and f"{name[:-1]}2" in table]:
        one, two = (table[key]["sizes"][-1]["seconds"] for key in (name, f"{name[:-1]}2"))
        print(f"{name.removesuffix(', workers 1')}: {one / two:.2f} times as much a second with two workers")
    for name in [name for name in table if name.endswith("workers 2")]:
        if not math.isnan(share := driver_share(table[name]["sizes"])):
            table[name]["driver_share"] = round(share, 3)
            print(f"{name}: {share:.1%} of what more work takes is the driver's")
    if args.out:
        args.out.write_text(json.dumps({"limit": LIMIT, "parts": table}, indent=2) + "\n")
    return 1 if any((entry["exponent"] or 0) > LIMIT for entry in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
