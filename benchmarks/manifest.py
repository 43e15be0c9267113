"""``kind: manifest`` beside the FLAC encoder alone: how much of a run is anything else than encoding.

    python benchmarks/manifest.py --rows 10000 --out manifest.json

WAV files of noise with a 1/f spectrum and a CSV table become shards, by a command of its own. The encoder alone gets
the same samples in memory, in as many processes. Rates are clips per second of processor time, all processes together
and start-up included, and of the clock; the ratio that counts is the first, as it does not see what else the machine
does.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
TARGET = 0.9


def clip(number: int, seconds: float) -> np.ndarray:
    """(time,) int16 noise with a 1/f spectrum, which FLAC compresses about as well as real ambience."""
    rng = np.random.default_rng(number)
    length = int(seconds * RATE)
    scale = 1 / np.maximum(np.fft.rfftfreq(length, 1 / RATE), 20.0)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * scale, length)
    return (16000 * noise / np.abs(noise).max()).astype(np.int16)


def write_corpus(folder: Path, rows: int, seconds: float) -> Path:
    """A table and its sounds: clips drawn from a few hundred, each turned by another number of samples."""
    bases = [clip(number, seconds) for number in range(min(rows, 200))]
    lines = ["audio,question,answer,group"]
    for number in range(rows):
        name = f"{number:06d}.wav"
        soundfile.write(folder / name, np.roll(bases[number % len(bases)], number), RATE)
        lines.append(f"{name},What is heard?,{('rain', 'dog', 'bell')[number % 3]},{number}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder / "rows.csv"


def encode(rows: int, seconds: float) -> None:
    """The encoder alone, in this process."""
    bases = [clip(number, seconds) for number in range(50)]
    for number in range(rows):
        soundfile.write(io.BytesIO(), bases[number % len(bases)], RATE, format="FLAC", subtype="PCM_16")


def measured(commands: list[list[str]]) -> tuple[float, float]:
    """Seconds of the clock and of processor time that `commands` take beside each other, with all their children."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    if any(process.wait() for process in processes):
        raise SystemExit("a command failed")
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a clip")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--encode", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.encode is not None:
        encode(args.encode, args.seconds)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = write_corpus(folder, args.rows, args.seconds)
        (folder / "recipe.yaml").write_text(
            f"verb: prep\nkind: manifest\ncorpus: bench\nformat: csv\npath: {table}\n"
            "splits: {train: 1}\naudio: {sample_rate: 16000, layouts: [mono]}\n"
        )
        prep = [sys.executable, "-m", "audio_llm", "prep", str(folder / "recipe.yaml"), str(folder / "out")]
        ours = measured([[*prep, "--quiet", "--workers", str(args.workers)]])
        share = args.rows // args.workers
        alone = [sys.executable, __file__, "--encode", str(share), "--seconds", str(args.seconds)]
        theirs = measured([alone] * args.workers)
        start = measured([[sys.executable, __file__, "--encode", "0", "--seconds", str(args.seconds)]] * args.workers)
    theirs = (theirs[0] - start[0], theirs[1] - start[1])  # the encoder itself, without starting and making noise
    figures = {
        "rows": args.rows,
        "seconds": args.seconds,
        "workers": args.workers,
        "prep": {"clips_per_cpu_second": args.rows / ours[1], "clips_per_second": args.rows / ours[0]},
        "encoder": {"clips_per_cpu_second": args.rows / theirs[1], "clips_per_second": args.rows / theirs[0]},
        "ratio_cpu": theirs[1] / ours[1],
        "ratio_clock": theirs[0] / ours[0],
        "target": TARGET,
    }
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
