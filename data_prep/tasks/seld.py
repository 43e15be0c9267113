"""Stereo scenes in the layout of DCASE 2025 task 3, from any labelled sound folder and the room simulator.

Sounds, rooms and events are those of :mod:`data_prep.scenes`; what differs is what is written: five-second clips with a
table of 100 ms rows each, of the frames in which an event is heard, without questions. No recording and no room is in
two splits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from audio_llm import audio, machine
from audio_llm.datasets import dcase_seld, seld_tables
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.files import atomic_file, write_json
from data_prep.ledger import Ledger, Summary, plain
from data_prep.scenes import pool, render, rooms, simulate
from data_prep.scenes.world import Placed, Wish, World
from data_prep.tasks.base import Kind

# The challenge's own: fold 1 is synthetic training data, fold 4 is tested on, the others train.
FOLDERS = {
    "train": ("dev-train-synth", "fold1"),
    "validation": ("dev-train-synth", "fold2"),
    "test": ("dev-test-synth", dcase_seld.TEST_FOLD),
}


@dataclass(frozen=True)
class SELDConfig(simulate.SceneConfig):
    """Recipe of ``audio-llm prep`` with ``kind: seld``: a scene recipe whose question keys have no meaning.

    `events_per_clip` are shares of the clips by their number of events.
    """

    verb: ClassVar[str] = "prep"
    kind: Literal["seld"] = "seld"  # the kind of data set
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


class ClipRenderer(simulate.Renderer):
    """What a worker process knows, and the folder that it writes into."""

    def __init__(self, out: Path, labels: list[str], *args: Any) -> None:
        super().__init__(*args)
        self.out, self.labels = out, {label: number for number, label in enumerate(labels)}

    def clips(self, job: tuple[str, list[int]]) -> list[dict[str, str]]:
        """Write clips of a split by number, and their tables, unless they are there; returns those that failed."""
        split, numbers = job
        rejects = []
        for number in numbers:
            try:
                self._clip(split, number)
            except AudioLLMError as error:
                rejects.append({"item": f"{split} {number}", "reason": str(error)})
        return rejects

    def _clip(self, split: str, number: int) -> None:
        from audio_llm.tasks.seld.tracks import event_rows

        world, config = self.worlds[split], self.config
        placed, room = draw(world, config, split, number)
        folder, fold = FOLDERS[split]
        name = f"{fold}_room{room + 1}_mix{number:05d}_deg000_start0000"
        table = self.out / dcase_seld.TABLES / folder / f"{name}.csv"
        if table.is_file():  # written last
            return
        seed = (config.seed, split, number)
        placed.sort(
            key=lambda item: (round(item.onset, 3), item.clip.label)
        )  # as their events are, whose rows these are
        frame = seld_tables.FRAME_SECONDS
        waveform, _, heard = render.mix_scene(placed, world, self.bank, self.head, config.audio, *seed, frame=frame)
        path = self.out / dcase_seld.AUDIO / folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(audio.encode(waveform, format="wav"))
        rows = event_rows(world.events_of(placed), self.labels, round(config.audio.seconds / frame))
        # Pauses of a recording are no event: a frame is labelled where the event can be heard over the noise.
        rows = rows[heard[rows[:, 2].astype(int), rows[:, 0].astype(int)]] if len(rows) else rows
        seld_tables.write_rows(table, rows)


def draw(world: World, config: simulate.SceneConfig, split: str, number: int) -> tuple[list[Placed], int]:
    """The events of a clip and the number of its room, by the clip's own seed."""
    assert isinstance(config, SELDConfig)
    rng = rooms.seeded("seld", config.seed, split, number)
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
) -> Summary:
    """Make the corpus in `out`; clips that an earlier run finished are kept.

    Raises :class:`ConfigError` when `out` holds a dataset of another recipe, unless `overwrite`.
    """
    config.check()
    library = simulate.find_sounds(config)
    head = {"version": simulate.FORMAT_VERSION, "config_hash": simulate.config_hash(config, library)}
    identity = simulate.identity(config, library)
    ledger = Ledger(out, head, identity, (dcase_seld.AUDIO, dcase_seld.TABLES), overwrite)
    if (earlier := ledger.finished) and _intact(out, earlier.manifest):
        return earlier
    ledger.begin()
    workers = workers or machine.cpus()
    library, groups, rejects = simulate.split_sounds(config, out, library, workers, quiet)
    worlds = simulate.build_worlds(config, groups)
    facts = simulate.describe_world(library, groups, worlds)
    labels = facts["labels"]
    write_json(out / dcase_seld.CLASSES_FILE, labels)
    rejects += _absent(worlds, labels, quiet)
    args = (out, labels, config, groups, out / "responses", library.dataset, library.licence)
    with pool.open_pool(workers, ClipRenderer, args) as jobs:
        simulate.render_bank(config, worlds, out, jobs, quiet)
        for part in config.parts.values():
            rejects += jobs.each("clips", range(part.count), part.split, quiet, part.split)
    subsets = {name: {"split": part.split, "samples": _count(out, part.split)} for name, part in config.parts.items()}
    return ledger.finish(rejects, config=plain(config), **facts, subsets=subsets)


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


def _count(out: Path, split: str) -> int:
    folder, fold = FOLDERS[split]
    return len(list((out / dcase_seld.TABLES / folder).glob(f"{fold}_*.csv")))


def _intact(out: Path, manifest: dict[str, Any]) -> bool:
    return all(_count(out, entry["split"]) == entry["samples"] for entry in manifest["subsets"].values())


KIND = Kind("seld", SELDConfig, prepare, flags={"sounds": "sounds.folder", "folds": "folds"})
