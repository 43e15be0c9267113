"""SFT with a frozen encoder, with and without a warm `encoder_cache`: seconds per step, and the same losses.

    python -m benchmarks.encoder_cache runs/quickstart/data/sft --language-model runs/quickstart/language_model
    python -m benchmarks.encoder_cache DATA --language-model LM --encoder name=beats preset=tiny

The encoder, by default the published transformer behind a small front end, has random weights: they take as long.
The runs are whole SFT runs; the first step is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from audio_llm import config, files
from audio_llm.model.build import build_checkpoint
from audio_llm.model.encoder import build_encoder
from audio_llm.training import sft
from benchmarks.policy import QUICKSTART_PROJECTOR

TARGET = 3.0


def train(folder: Path, model: Path, args: argparse.Namespace, cache: Path | None) -> tuple[list[float], list[float]]:
    """Losses, and seconds of every step but the first."""
    recipe: dict[str, Any] = {
        "output": str(folder),
        "model": {"path": str(model)},
        "data": {"train": [str(args.data)]},
        "steps": args.steps,
        "batch_size": args.batch_size,
        "precision": "fp32",
        "export": [],
        "encoder_cache": None if cache is None else str(cache),
    }
    sft.run(config.build(sft.SFTRecipe, recipe))
    lines = [line for line in files.read_lines(folder / "metrics.jsonl") if "loss" in line]
    clock = [line["seconds"] for line in lines]
    return [line["loss"] for line in lines], [b - a for a, b in zip(clock, clock[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="shard folder of questions")
    parser.add_argument("--language-model", type=Path, required=True)
    parser.add_argument(
        "--encoder",
        nargs="+",
        default=["name=spatial_ast", "preset=tiny", "hidden_size=768", "depth=12", "heads=12"],
        help="its configuration as key=value; it must take the rate and layout of the data",
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_checkpoint(
            folder / "model",
            encoder=build_encoder(
                {key: yaml.safe_load(value) for key, _, value in (t.partition("=") for t in args.encoder)}
            ),
            language_model=AutoModelForCausalLM.from_pretrained(args.language_model),
            tokenizer=AutoTokenizer.from_pretrained(args.language_model),
            projector=QUICKSTART_PROJECTOR,
        )
        plain, without = train(folder / "plain", model, args, None)
        train(folder / "filling", model, args, folder / "cache")
        cached, with_cache = train(folder / "cached", model, args, folder / "cache")
    row = {
        "benchmark": "encoder_cache",
        "encoder": args.encoder,
        "seconds_per_step": {"without": statistics.median(without), "with": statistics.median(with_cache)},
        "ratio": statistics.median(without) / statistics.median(with_cache),
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(plain, cached, strict=True)),
    }
    print(json.dumps(row, indent=1))
    print(f"{row['ratio']:.1f} x faster per step with the cache (wanted: {TARGET:g} x)")
    if args.out:
        files.write_json(args.out, row)


if __name__ == "__main__":
    main()
