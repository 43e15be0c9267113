"""What tests of ``kind: manifest`` share: sounds, tables, and what became of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from audio_llm import config as recipes
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Sample
from data_prep.manifest.recipe import ManifestConfig
from data_prep.tasks.manifest import prepare

RATE = 16000


def noise(seed: int, seconds: float = 0.2, channels: int = 1) -> np.ndarray:
    """(time, channels) float, which no other seed gives."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (int(seconds * RATE), channels))


def wav(path: Path, seed: int, seconds: float = 0.2, channels: int = 1, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.round(32768 * noise(seed, seconds, channels)).astype(np.int16), RATE, **how)
    return path


def made(folder: Path, **keys: Any) -> dict[str, Any]:
    """The manifest of what a recipe of `keys` makes in `folder` / out."""
    tree = {"corpus": "mine", "splits": {"train": 1.0}, **keys}
    return prepare(recipes.build(ManifestConfig, tree), folder / "out", workers=1, quiet=True).manifest


def samples(folder: Path, split: str = "train") -> list[Sample]:
    dataset = ShardDataset(folder / "out" / split, decode=False)
    return [dataset.load_sample(number) for number in range(len(dataset))]


def rejected(folder: Path) -> dict[str, str]:
    return rejected_in(folder / "out")


def rejected_in(out: Path) -> dict[str, str]:
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return {row["item"]: row["reason"] for row in map(json.loads, lines)}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
