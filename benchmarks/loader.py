"""Reading shards: this package, webdataset, and libsndfile alone on bytes that are already in memory.

    python benchmarks/loader.py --seconds 20 --out loader.json

One process, shards in the page cache, every contestant ends with the same float32 samples and the parsed JSON
(libsndfile alone: the samples only). The contestants take turns, round after round, and a ratio is the median over
the rounds, so that what else the machine does falls on all of them. Rates are clips per second of processor time.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset

from audio_llm.audio import Waveform
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Event, Sample, Source
from audio_llm.shards.writer import ShardWriter

TARGETS = {("flac", "libsndfile"): 0.95, ("wav", "webdataset"): 3.0}


def write_shards(folder: Path, format: str, clips: int, seconds: float, channels: int) -> None:
    """`clips` of noise with a 1/f spectrum: FLAC compresses it about as well as it does real ambience."""
    rng = np.random.default_rng(0)
    length = int(seconds * 16000)
    layout = {1: "mono", 2: "binaural", 4: "foa"}[channels]
    scale = 1 / np.maximum(np.fft.rfftfreq(length, 1 / 16000), 20.0)
    with ShardWriter(folder, samples_per_shard=64, format=format) as writer:
        for i in range(clips):
            noise = np.fft.irfft(np.fft.rfft(rng.standard_normal((channels, length))) * scale, length)
            samples = (0.5 * noise / np.abs(noise).max()).astype(np.float32)
            events = [Event("rain", 0.5, 4.0, 30.0, 0.0, 2.0), Event("dog", 5.0, 6.0, -60.0, 10.0, 1.0)]
            sample = Sample(
                f"clip{i:05d}",
                "scene_qa",
                "Which sound comes from the left?",
                ["rain", "dog", "rooster", "engine"],
                "rain",
                thinking="Rain is heard at thirty degrees to the left, the dog on the right, so the answer is rain.",
                events=events,
                source=Source("noise", "test", f"{i}", "CC0-1.0"),
            )
            writer.write(sample, Waveform(samples, 16000, layout))


def contestants(folder: Path) -> dict[str, Callable[[], int]]:
    """Name → a function that reads the whole folder once and returns the number of clips."""
    dataset = ShardDataset(folder)
    members = [dataset.load_audio_bytes(i)[0] for i in range(len(dataset))]
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def ours() -> int:
        return sum(dataset[i]["waveforms"][0].num_samples > 0 for i in range(len(dataset)))

    def through_webdataset() -> int:
        count = 0
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            json.loads(sample["json"])
            audio = sample["flac"] if "flac" in sample else sample["wav"]
            soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
            count += 1
        return count

    def libsndfile() -> int:
        return sum(len(soundfile.read(io.BytesIO(m), dtype="float32", always_2d=True)[0]) > 0 for m in members)

    return {"audio-llm": ours, "webdataset": through_webdataset, "libsndfile": libsndfile}


def measure(runs: dict[str, Callable[[], int]], seconds: float) -> dict[str, list[float]]:
    """Clips per second of processor time, one value per round, for about `seconds` of wall clock."""
    for run in runs.values():
        run()  # fills the page cache and imports what is imported late
    rates: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates[names[0]]) < 3:
        for name in names:
            start = time.process_time()
            clips = runs[name]()
            rates[name].append(clips / (time.process_time() - start))
        names = names[1:] + names[:1]  # nobody is always the one that runs after the cache was warmed
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time in all")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--clip-seconds", type=float, default=10.0)
    parser.add_argument("--channels", type=int, choices=(1, 2, 4), default=1)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    print(f"{args.clips} clips of {args.clip_seconds:g} s, {args.channels} channel(s), 16 kHz, 16 bit")
    print(f"{'format':<7}{'audio-llm':>12}{'webdataset':>12}{'libsndfile':>12}   ratios (target)")
    for format in ("flac", "wav"):
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), format, args.clips, args.clip_seconds, args.channels)
            rates = measure(contestants(Path(folder)), args.seconds / 2)
        row: dict[str, Any] = {"format": format, "rounds": len(rates["audio-llm"])}
        row["clips_per_second"] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        texts = []
        for other in ("webdataset", "libsndfile"):
            pairs = zip(rates["audio-llm"], rates[other], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            target = TARGETS.get((format, other))
            row[f"ratio_to_{other}"] = round(ratio, 3)
            texts.append(f"{ratio:.2f} x {other}" + (f" ({target:g})" if target else ""))
        speeds = row["clips_per_second"]
        print(f"{format:<7}" + "".join(f"{speeds[name]:>12.0f}" for name in rates) + "   " + ", ".join(texts))
        results.append(row)
    if args.out:
        settings = {"clips": args.clips, "clip_seconds": args.clip_seconds, "channels": args.channels}
        args.out.write_text(json.dumps({"benchmark": "loader", **settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
