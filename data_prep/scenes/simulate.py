"""From a recipe to a dataset: sounds → splits → rooms → questions → scenes → shards.

Everything is drawn by seeds that name what they are for, so a sample depends on the recipe and its own index alone:
not on the number of processes, and not on how often the run was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from audio_llm import config as recipes
from audio_llm.audio import Waveform
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.files import atomic_file, write_json, write_lines
from audio_llm.shards.schema import Sample
from audio_llm.shards.writer import ShardWriter
from data_prep import sounds, text_check
from data_prep.questions import planning
from data_prep.questions.common import QuestionsConfig
from data_prep.questions.records import dcase_record, mmau_record, spatialsoundqa_record
from data_prep.scenes import pool, receivers, render, rooms
from data_prep.scenes.world import EventsConfig, Margins, World

FORMAT_VERSION = 2  # raise it when the same recipe would give other bytes
MANIFEST = "dataset.json"
REJECTS = "rejects.jsonl"
CHUNK = 16  # scenes a worker renders before it hands them over


@dataclass(frozen=True)
class SoundsConfig:
    """Where dry sounds come from: a folder, or (folder null) the built-in synthesisers."""

    folder: str | None = None
    classes: list[str] | None = None  # keep only these
    recordings: int = 120  # built-in recordings per class
    seconds: tuple[float, float] = (0.8, 2.5)  # length of built-in recordings
    shortest: float = 0.2  # clips audible for less are rejected


@dataclass(frozen=True)
class HeadConfig:
    """Binaural head: the spherical one of `radius` metres, or a measured one from a SOFA file."""

    sofa: str | None = None
    radius: float = 0.0875


@dataclass(frozen=True)
class SubsetConfig:
    """A folder of shards: `count` samples of a `split`, in these shares of question formats."""

    split: str
    count: int
    formats: dict[str, float] = field(default_factory=lambda: {"mmau": 1.0})


@dataclass(frozen=True)
class TextConfig:
    """Samples without audio (questions, answers, thinking) of the training split, to teach a language model to talk.

    `choice` replaces the mix of ``questions.choice``: what is easy to hear may be hard to reason about.
    """

    count: int = 0
    formats: dict[str, float] = field(default_factory=lambda: {"mmau": 0.8, "dcase_aqa": 0.1, "spatialsoundqa": 0.1})
    choice: dict[str, float] | None = None


@dataclass(frozen=True)
class SceneConfig:
    """The recipe of ``audio-llm prep``."""

    verb: ClassVar[str] = "prep"
    seed: int = 0
    audio: render.AudioConfig = field(default_factory=render.AudioConfig)
    sounds: SoundsConfig = field(default_factory=SoundsConfig)
    split: dict[str, float] = field(default_factory=lambda: {"train": 0.7, "validation": 0.1, "test": 0.2})
    folds: dict[str, list[str]] | None = None
    rooms: rooms.RoomsConfig = field(default_factory=rooms.RoomsConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    events: EventsConfig = field(default_factory=EventsConfig)
    margins: Margins = field(default_factory=Margins)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    subsets: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: TextConfig = field(default_factory=TextConfig)
    samples_per_shard: int = 256

    @property
    def parts(self) -> dict[str, SubsetConfig]:
        """The subsets, checked."""
        return {name: recipes.build(SubsetConfig, tree, f"subsets.{name}") for name, tree in self.subsets.items()}

    @property
    def text_questions(self) -> QuestionsConfig:
        """The questions of ``text``: those of the recipe, in its own mix where it has one."""
        return dataclasses.replace(self.questions, choice=self.text.choice or self.questions.choice)

    def check(self) -> None:
        """Raise :class:`ConfigError` for values that contradict each other."""
        if self.seed < 0:
            raise ConfigError(f"seed: expected 0 or more, found {self.seed}.")
        self.audio.check()
        receivers.build(self.audio.layout, sofa=self.head.sofa, radius=self.head.radius)
        self.rooms.check()
        planning.check_config(self.questions)
        if not self.subsets:
            raise ConfigError("subsets: expected at least one, for instance sft: {split: train, count: 1000}.")
        for name, part in self.parts.items():
            if part.split not in sounds.SPLITS:
                raise ConfigError(
                    f"subsets.{name}.split: expected one of {', '.join(sounds.SPLITS)}, found '{part.split}'."
                )
            if self.split.get(part.split, 0) <= 0 and part.split not in (self.folds or {}):
                raise ConfigError(f"subsets.{name}: its split '{part.split}' has no share in split.")
            if getattr(self.rooms, part.split) < 1:
                raise ConfigError(f"subsets.{name}: its split '{part.split}' has no rooms (rooms.{part.split}).")
            if part.count < 1:
                raise ConfigError(f"subsets.{name}.count: expected 1 or more, found {part.count}.")
            _check_formats(f"subsets.{name}", part.formats)
        _check_formats("text", self.text.formats)
        planning.check_config(self.text_questions)
        if self.events.seconds[1] > self.audio.seconds:
            raise ConfigError(
                describe("events.seconds", f"at most the scene's {self.audio.seconds} s", f"{self.events.seconds[1]} s")
            )


def _check_formats(where: str, formats: dict[str, float]) -> None:
    for name in formats:
        if name not in planning.FORMATS:
            raise ConfigError(f"{where}.formats: expected {', '.join(planning.FORMATS)}, found '{name}'.")


# ------------------------------------------------------------------------------------------------ worlds


def find_sounds(config: SceneConfig) -> sounds.Library:
    """The clips of the recipe, not yet opened."""
    if config.sounds.folder is None:
        return sounds.builtin(config.sounds.classes, config.sounds.recordings, config.sounds.seconds, config.seed)
    library = sounds.find(config.sounds.folder)
    if config.sounds.classes is None:
        return library
    for name in config.sounds.classes:
        if name not in library.labels:
            raise ConfigError(
                f"sounds.classes: no class '{name}' in {config.sounds.folder}. Classes: {', '.join(library.labels)}."
            )
    return dataclasses.replace(library, clips=[clip for clip in library.clips if clip.label in config.sounds.classes])


def build_world(config: SceneConfig, split: str, clips: Sequence[sounds.Clip]) -> World:
    """The sounds and places of one split."""
    found = [rooms.draw_room(config.rooms, split, index, config.seed) for index in range(getattr(config.rooms, split))]
    return World(clips, found, config.audio.seconds, config.events, config.margins)


def build_worlds(config: SceneConfig, groups: dict[str, list[sounds.Clip]]) -> dict[str, World]:
    """Worlds of the splits that the recipe uses. Raises :class:`ConfigError` when too few classes are left."""
    used = {part.split for part in config.parts.values()} | ({"train"} if config.text.count else set())
    worlds = {split: build_world(config, split, groups.get(split, [])) for split in sorted(used)}
    needed = max(4, config.questions.choices)
    for split, world in worlds.items():
        if len(world.labels) < needed:
            raise ConfigError(
                describe(f"sounds of split '{split}'", f"at least {needed} classes", str(len(world.labels)))
                + f" Every class needs recordings in every split; see {REJECTS}."
            )
    return worlds


def scene_corpus(
    config: SceneConfig,
    world: World,
    formats: dict[str, float],
    count: int,
    *seed: object,
    prefix: str = "text",
    dataset: str = "builtin",
    split: str = "train",
    asked: QuestionsConfig | None = None,
) -> Iterator[Sample]:
    """`count` samples without audio: events, question, choices, answer and thinking, nothing rendered.

    `asked` replaces the questions of `config`.
    """
    asked = asked or config.questions
    for ask in planning.plan(asked, world, formats, count, config.seed, *seed):
        draft, choices = planning.draft_of(ask, world, asked, config.seed, *seed)
        key = f"{prefix}-{ask.index:06d}"
        yield planning.sample_of(ask, draft, choices, world, key=key, dataset=dataset, split=split)


# ------------------------------------------------------------------------------------------------ worker side


class Renderer:
    """What a worker process knows: worlds, the bank and the head. Built once per process."""

    def __init__(
        self, config: SceneConfig, groups: dict[str, list[sounds.Clip]], bank: Path, dataset: str, licence: str | None
    ) -> None:
        self.config, self.bank, self.dataset, self.licence = config, bank / config.audio.layout, dataset, licence
        self.worlds = build_worlds(config, groups)
        self.head = receivers.build(config.audio.layout, sofa=config.head.sofa, radius=config.head.radius)

    def room(self, job: tuple[str, int]) -> int:
        """Render the bank of one room."""
        split, index = job
        room = self.worlds[split].rooms[index]
        return render.render_room(self.bank, room, self.config.rooms, self.head, self.config.audio.sample_rate)

    def scenes(self, job: tuple[str, str, list[planning.Ask]]) -> list[tuple[Sample, Waveform | None, str]]:
        """Render some items of a subset: (sample, audio, ""), or (sample, None, reason) for one that failed."""
        name, split, asks = job
        world, config = self.worlds[split], self.config
        found: list[tuple[Sample, Waveform | None, str]] = []
        for ask in asks:
            seed = (config.seed, name)
            draft, choices = planning.draft_of(ask, world, config.questions, *seed)
            sample = planning.sample_of(
                ask,
                draft,
                choices,
                world,
                key=f"{name}-{ask.index:06d}",
                dataset=self.dataset,
                split=split,
                licence=self.licence,
            )
            try:
                waveform, done = render.render_scene(
                    draft.placed, world, self.bank, self.head, config.audio, *seed, ask.index
                )
            except AudioLLMError as error:
                found.append((sample, None, str(error)))
                continue
            sample.meta |= done
            sample.meta["sources"] = [
                {
                    "clip": item.clip.name,
                    "response": "/".join((world.places[item.source][0], f"{world.places[item.source][1]}.npy")),
                }
                for item in draft.placed
            ]
            found.append((sample, waveform, ""))
        return found


# ------------------------------------------------------------------------------------------------ the run


@dataclass
class Summary:
    """What a run did. `biased`: text-only predictors above chance; `fresh` is False when nothing had to be done."""

    out: Path
    manifest: dict[str, Any]
    fresh: bool
    biased: list[text_check.Row] = field(default_factory=list)


def config_hash(config: SceneConfig, library: sounds.Library) -> str:
    """Changes with anything that changes the data: recipe, list of sounds, version of the simulator."""
    tree = dataclasses.asdict(config)
    tree["sounds"].pop("folder")  # the same sounds in another place are the same
    text = json.dumps([FORMAT_VERSION, tree, library.dataset, library.fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(
    config: SceneConfig, out: Path, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
) -> Summary:
    """Make the dataset in `out`: one shard folder per subset, ``text.jsonl``, ``responses/``, ``dataset.json``.

    Raises :class:`ConfigError` when `out` holds a dataset of another recipe, unless `overwrite`.
    """
    config.check()
    library = find_sounds(config)
    digest = config_hash(config, library)
    earlier = claim(out, digest, overwrite)
    if earlier and earlier.get("complete") and _intact(out, config):
        return Summary(out, earlier, fresh=False)
    out.mkdir(parents=True, exist_ok=True)
    manifest = {
        "version": FORMAT_VERSION,
        "config_hash": digest,
        "complete": False,
        "subset_names": sorted(config.subsets),
    }
    write_json(out / MANIFEST, manifest)
    workers = workers or os.cpu_count() or 1
    return _make(config, out, library, manifest, workers, quiet)


def _make(
    config: SceneConfig, out: Path, library: sounds.Library, manifest: dict[str, Any], workers: int, quiet: bool
) -> Summary:
    library = scan_sounds(config, out, library, workers, quiet)
    groups, left_out = sounds.split(library, config.split, config.seed, config.folds)
    rejects = library.rejects + left_out
    write_lines(out / REJECTS, rejects)
    for reject in left_out:
        _say(f"left out: {reject['item']} ({reject['reason']})", quiet)
    worlds = build_worlds(config, groups)
    plans = {
        name: planning.plan(config.questions, worlds[part.split], part.formats, part.count, config.seed, name)
        for name, part in config.parts.items()
    }
    rows = check_text(config, worlds)
    _say(text_check.table(rows), quiet)
    _write_text(config, worlds, library, out)
    args = (config, groups, out / "responses", library.dataset, library.licence)
    with pool.open_pool(workers, Renderer, args) as jobs:
        render_bank(config, worlds, out, jobs, quiet)
        counts = {name: _render_subset(config, name, plans[name], library, out, jobs, quiet) for name in plans}
    manifest |= {
        "complete": True,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "sounds": describe_sounds(library, groups),
        "labels": worlds[next(iter(worlds))].labels,
        "rooms": {split: [room.name for room in world.rooms] for split, world in worlds.items()},
        "subsets": counts,
        "text": config.text.count,
        "rejects": len(rejects),
        "text_only_check": [row.as_dict() for row in rows],
        "text_only_biased": [f"{row.question_type} ({row.predictor})" for row in rows if row.biased],
    }
    write_json(out / MANIFEST, manifest)
    return Summary(out, manifest, fresh=True, biased=[row for row in rows if row.biased])


def scan_sounds(config: SceneConfig, out: Path, library: sounds.Library, workers: int, quiet: bool) -> sounds.Library:
    """Fill in the audible parts, from ``sounds.json`` where an earlier run has them."""
    if config.sounds.folder is None:
        return library
    cache = out / "sounds.json"
    key = [library.fingerprint, config.sounds.shortest]
    if cache.is_file() and (tree := json.loads(cache.read_text()))["key"] == key:
        clips = [sounds.Clip(**item) for item in tree["clips"]]
        return dataclasses.replace(library, clips=clips, rejects=tree["rejects"])
    with pool.plain_pool(workers) as executor:
        found = sounds.scan(
            library,
            executor,
            shortest=config.sounds.shortest,
            progress=lambda items, n: pool.bar(items, n, "sounds", quiet),
        )
    if not found.clips:
        raise ConfigError(f"sounds: none of the {len(library.clips)} files can be used; the first: {found.rejects[0]}.")
    tree = {"key": key, "clips": [dataclasses.asdict(clip) for clip in found.clips], "rejects": found.rejects}
    write_json(cache, tree)
    return found


def check_text(config: SceneConfig, worlds: dict[str, World]) -> list[text_check.Row]:
    """Fit text-only predictors on the train subsets (at most 20,000 items of each), measure them on the test ones."""
    sides: dict[str, list[Sample]] = {"train": [], "test": []}
    for name, part in config.parts.items():
        if part.split in sides:
            count = part.count if part.split == "test" else min(part.count, 20_000)
            sides[part.split] += scene_corpus(config, worlds[part.split], part.formats, count, name, split=part.split)
    return text_check.check(sides["train"], sides["test"])


def _write_text(config: SceneConfig, worlds: dict[str, World], library: sounds.Library, out: Path) -> None:
    path = out / "text.jsonl"
    if not config.text.count or path.is_file():
        return
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for sample in scene_corpus(
            config,
            worlds["train"],
            config.text.formats,
            config.text.count,
            "text",
            dataset=library.dataset,
            asked=config.text_questions,
        ):
            stream.write(sample.to_json() + "\n")


def render_bank(config: SceneConfig, worlds: dict[str, World], out: Path, jobs: pool.Jobs, quiet: bool) -> None:
    wanted = [(split, index) for split, world in worlds.items() for index in range(len(world.rooms))]
    for _ in pool.bar(jobs.run("room", wanted), len(wanted), "rooms", quiet):
        pass
    for split, world in worlds.items():
        render.write_bank_index(out / "responses", config.audio.layout, split, [room.name for room in world.rooms])


def _render_subset(
    config: SceneConfig,
    name: str,
    asks: list[planning.Ask],
    library: sounds.Library,
    out: Path,
    jobs: pool.Jobs,
    quiet: bool,
) -> dict[str, Any]:
    part = config.parts[name]
    if (count := finished(out / name)) == part.count:
        return {"split": part.split, "samples": count, "shards": len(_sizes(out / name)["shards"])}
    with ShardWriter(out / name, samples_per_shard=config.samples_per_shard) as writer:
        todo = [ask for ask in asks if f"{name}-{ask.index:06d}" not in writer]
        chunks = [(name, part.split, todo[start : start + CHUNK]) for start in range(0, len(todo), CHUNK)]
        progress = pool.bar(jobs.run("scenes", chunks), len(chunks), name, quiet)
        for found in progress:
            for sample, waveform, reason in found:
                if waveform is None:
                    writer.reject(sample.id, reason)
                else:
                    writer.write(sample, waveform)
    _write_records(out / name, part)
    return {"split": part.split, "samples": finished(out / name), "shards": len(_sizes(out / name)["shards"])}


def _write_records(folder: Path, part: SubsetConfig) -> None:
    """The questions of a test subset as other people's files: MMAU, DCASE and SpatialSoundQA JSON."""
    if part.split != "test":
        return
    from audio_llm.shards.reader import ShardDataset

    dataset = ShardDataset(folder, decode=False)
    samples = [dataset.load_sample(index) for index in range(len(dataset))]
    by_format = {name: [sample for sample in samples if sample.meta["format"] == name] for name in planning.FORMATS}
    records: dict[str, Any] = {
        "mmau": [mmau_record(sample) for sample in by_format["mmau"]],
        "dcase_aqa": [dcase_record(sample) for sample in by_format["dcase_aqa"]],
        "spatialsoundqa": {"data": [spatialsoundqa_record(s, i) for i, s in enumerate(by_format["spatialsoundqa"])]},
    }
    for name, tree in records.items():
        if by_format[name]:
            write_json(folder / f"{name}.json", tree)


# ------------------------------------------------------------------------------------------------ files


def describe_sounds(library: sounds.Library, groups: dict[str, list[sounds.Clip]]) -> dict[str, Any]:
    return {
        "dataset": library.dataset,
        "fingerprint": library.fingerprint,
        "clips": {split: len(clips) for split, clips in groups.items()},
        "recordings": {split: len({clip.recording for clip in clips}) for split, clips in groups.items()},
        "clips_by_class": dict(sorted(Counter(clip.label for clips in groups.values() for clip in clips).items())),
    }


def _sizes(folder: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads((folder / "sizes.json").read_text())
        return tree
    except (OSError, ValueError):
        return {}


def finished(folder: Path) -> int:
    """Samples of a finished shard folder whose shards are all there; 0 for anything else."""
    sizes = _sizes(folder)
    there = all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in sizes.get("shards", {}).items()
    )
    return int(sizes.get("samples", 0)) if there else 0


def _intact(out: Path, config: SceneConfig) -> bool:
    text = config.text.count == 0 or (out / "text.jsonl").is_file()
    return text and all(finished(out / name) > 0 for name in config.subsets)


def claim(out: Path, digest: str, overwrite: bool) -> dict[str, Any] | None:
    """The manifest that a run of the same recipe (its hash `digest`) left in `out`, or None where it may begin.

    Raises :class:`ConfigError` when `out` holds a dataset of another recipe, unless `overwrite`, which removes it.
    """
    earlier = _earlier(out)
    if earlier is None or earlier["config_hash"] == digest:
        return earlier
    if not overwrite:
        raise ConfigError(
            f"{out}: holds a dataset of another recipe (hash {earlier['config_hash']}, this one {digest}). "
            f"Choose another folder, or add --overwrite to replace it."
        )
    _clear(out, earlier)
    return None


def _earlier(out: Path) -> dict[str, Any] | None:
    path = out / MANIFEST
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            found = ", ".join(sorted(item.name for item in out.iterdir())[:3])
            raise ConfigError(
                describe(str(out), "a new or empty folder, or one made by audio-llm prep", f"a folder with {found}")
            )
        return None
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        tree["config_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a manifest of audio-llm prep; delete it, or choose another folder.") from error
    return tree


def _clear(out: Path, manifest: dict[str, Any]) -> None:
    """Remove what an earlier run made, and nothing else."""
    for name in [*manifest.get("subset_names", []), "responses", "figures", "manifests"]:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("text.jsonl", "sounds.json", REJECTS, MANIFEST):
        (out / name).unlink(missing_ok=True)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
