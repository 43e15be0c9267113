"""Stereo scenes in the layout of DCASE 2025 task 3, from any labelled sound folder and the room simulator.

Sounds, rooms and events are those of :mod:`data_prep.scenes`; what differs is what is written: five-second clips with a
table of 100 ms rows each, without questions. No recording and no room is in two splits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from audio_llm import audio
from audio_llm.datasets import dcase_seld, seld_tables
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.files import atomic_file, write_json, write_lines
from audio_llm.tasks.seld import tracks
from data_prep import sounds
from data_prep.scenes import pool, render, rooms, simulate
from data_prep.scenes.world import Placed, Wish, World

# The challenge's own: fold 1 is synthetic training data, fold 4 is tested on, the others train.
FOLDERS = {
    "train": ("dev-train-synth", "fold1"),
    "validation": ("dev-train-synth", "fold2"),
    "test": ("dev-test-synth", dcase_seld.TEST_FOLD),
}


@dataclass(frozen=True)
class SELDConfig(simulate.SceneConfig):
    """Recipe of ``audio-llm prep`` with ``kind: seld``: a scene recipe whose question keys have no meaning."""

    verb: ClassVar[str] = "prep"
    kind: Literal["seld"] = "seld"
    events_per_clip: dict[int, float] = field(default_factory=lambda: {0: 0.05, 1: 0.5, 2: 0.35, 3: 0.1})

    def check(self) -> None:
        super().check()
        if self.audio.layout != "stereo":
            raise ConfigError(describe("audio.layout", "stereo", self.audio.layout))
        if not self.events_per_clip or min(self.events_per_clip) < 0 or sum(self.events_per_clip.values()) <= 0:
            found = repr(dict(self.events_per_clip))
            raise ConfigError(describe("events_per_clip", "shares by numbers of events", found))
        if len({part.split for part in self.parts.values()}) < len(self.parts):
            raise ConfigError(describe("subsets", "one for each split", ", ".join(self.subsets)))


@dataclass(frozen=True)
class Job:
    """A clip to be: its number within a split."""

    split: str
    number: int


class ClipRenderer(simulate.Renderer):
    """What a worker process knows, and the folder that it writes into."""

    def __init__(self, out: Path, labels: list[str], *args: Any) -> None:
        super().__init__(*args)
        self.out, self.labels = out, {label: number for number, label in enumerate(labels)}

    def clips(self, jobs: Sequence[Job]) -> list[dict[str, str]]:
        """Write clips and their tables, unless they are there; returns those that could not be made."""
        rejects = []
        for job in jobs:
            try:
                self._clip(job)
            except AudioLLMError as error:
                rejects.append({"item": f"{job.split} {job.number}", "reason": str(error)})
        return rejects

    def _clip(self, job: Job) -> None:
        world, config = self.worlds[job.split], self.config
        placed, room = draw(world, config, job)
        folder, fold = FOLDERS[job.split]
        name = f"{fold}_room{room + 1}_mix{job.number:05d}_deg000_start0000"
        table = self.out / dcase_seld.TABLES / folder / f"{name}.csv"
        if table.is_file():  # written last
            return
        waveform, _ = render.render_scene(
            placed, world, self.bank, self.head, config.audio, config.seed, job.split, job.number
        )
        path = self.out / dcase_seld.AUDIO / folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(audio.encode(waveform, format="wav"))
        frames = round(config.audio.seconds / seld_tables.FRAME_SECONDS)
        seld_tables.write_rows(table, tracks.event_rows(world.events_of(placed), self.labels, frames))


def draw(world: World, config: simulate.SceneConfig, job: Job) -> tuple[list[Placed], int]:
    """The events of a clip and the number of its room, by the clip's own seed."""
    assert isinstance(config, SELDConfig)
    rng = rooms.seeded("seld", config.seed, job.split, job.number)
    numbers = sorted(config.events_per_clip)
    shares = np.array([config.events_per_clip[number] for number in numbers])
    count = numbers[int(rng.choice(len(numbers), p=shares / shares.sum()))]
    if not count:
        return [], int(rng.integers(len(world.rooms)))
    for _ in range(100):
        labels = [world.labels[int(rng.integers(len(world.labels)))] for _ in range(count)]
        placed = world.scene(rng, [Wish(label) for label in labels])
        if placed:
            names = [room.name for room in world.rooms]
            return placed, names.index(world.places[placed[0].source][0])
    found = f"{count} events of {config.events.seconds[0]} s or more"
    raise ConfigError(describe("events", f"what fits into {config.audio.seconds} s", found))


def prepare(
    config: SELDConfig, out: Path, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
) -> simulate.Summary:
    """Make the corpus in `out`; clips that an earlier run finished are kept.

    Raises :class:`ConfigError` when `out` holds a dataset of another recipe, unless `overwrite`.
    """
    config.check()
    library = simulate.find_sounds(config)
    digest = simulate.config_hash(config, library)
    earlier = simulate.claim(out, digest, overwrite)
    if earlier and earlier.get("complete") and _intact(out, earlier):
        return simulate.Summary(out, earlier, fresh=False)
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "version": simulate.FORMAT_VERSION,
        "config_hash": digest,
        "complete": False,
        "subset_names": [dcase_seld.AUDIO, dcase_seld.TABLES],
    }
    write_json(out / simulate.MANIFEST, manifest)
    workers = workers or os.cpu_count() or 1
    library = simulate.scan_sounds(config, out, library, workers, quiet)
    groups, left_out = sounds.split(library, config.split, config.seed, config.folds)
    worlds = simulate.build_worlds(config, groups)
    labels = sorted({label for world in worlds.values() for label in world.labels})
    write_json(out / dcase_seld.CLASSES_FILE, labels)
    args = (out, labels, config, groups, out / "responses", library.dataset, library.licence)
    rejects = library.rejects + left_out + _absent(worlds, labels, quiet)
    with pool.open_pool(workers, ClipRenderer, args) as running:
        simulate.render_bank(config, worlds, out, running, quiet)
        for part in config.parts.values():
            rejects += _render(part, running, quiet)
    write_lines(out / simulate.REJECTS, rejects)
    manifest |= {
        "complete": True,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "sounds": simulate.describe_sounds(library, groups),
        "labels": labels,
        "rooms": {split: [room.name for room in world.rooms] for split, world in worlds.items()},
        "subsets": {
            name: {"split": part.split, "samples": _count(out, part.split)} for name, part in config.parts.items()
        },
        "rejects": len(rejects),
    }
    write_json(out / simulate.MANIFEST, manifest)
    return simulate.Summary(out, manifest, fresh=True)


def _absent(worlds: dict[str, World], labels: Sequence[str], quiet: bool) -> list[dict[str, str]]:
    """Classes that a split has no recordings of: what is chosen on it is chosen without them."""
    found = [
        {"item": f"class {label}", "reason": f"no recording in {split}"}
        for split, world in worlds.items()
        for label in sorted(set(labels) - set(world.labels))
    ]
    for reject in found if not quiet else ():
        print(f"warning: {reject['item']} has {reject['reason']}", file=sys.stderr)
    return found


def _render(part: simulate.SubsetConfig, running: pool.Jobs, quiet: bool) -> list[dict[str, str]]:
    jobs = [Job(part.split, number) for number in range(part.count)]
    chunks = [jobs[start : start + simulate.CHUNK] for start in range(0, len(jobs), simulate.CHUNK)]
    return [
        reject for found in pool.bar(running.run("clips", chunks), len(chunks), part.split, quiet) for reject in found
    ]


def _tables(out: Path, split: str) -> list[Path]:
    folder, fold = FOLDERS[split]
    return sorted((out / dcase_seld.TABLES / folder).glob(f"{fold}_*.csv"))


def _count(out: Path, split: str) -> int:
    return len(_tables(out, split))


def _intact(out: Path, manifest: dict[str, Any]) -> bool:
    return all(_count(out, entry["split"]) == entry["samples"] for entry in manifest["subsets"].values())
