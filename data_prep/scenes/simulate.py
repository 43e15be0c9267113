"""From a recipe to a dataset: sounds → splits → rooms → questions → scenes → shards.

Everything is drawn by seeds that name what they are for, so a sample depends on the recipe and its own index alone:
not on the number of processes, and not on how often the run was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from audio_llm import config as recipes
from audio_llm import machine
from audio_llm.audio import Waveform, encode, limit_peak
from audio_llm.datasets import folders
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.files import atomic_file, content_hash, glance, read_own, write_json, write_lines
from audio_llm.identity import Identity, identity_of
from audio_llm.shards.schema import Sample, Source
from audio_llm.shards.writer import pack
from data_prep import sounds, text_check
from data_prep.ledger import REJECTS, Ledger, Rendered, Summary, digest, fill, finished, plain, sizes
from data_prep.questions import planning
from data_prep.questions.common import Draft, QuestionsConfig
from data_prep.questions.records import dcase_record, mmau_record, spatialsoundqa_record
from data_prep.questions.truth import Asked
from data_prep.scenes import interventions, pool, receivers, render, rooms
from data_prep.scenes.interventions import CounterfactualConfig
from data_prep.scenes.world import EventsConfig, Margins, World

DRY = "dry"  # the folder of clips that spatialsoundqa.json names
FORMAT_VERSION = 3  # raise it when the same recipe would give other bytes


@dataclass(frozen=True)
class SoundsConfig:
    """Where dry sounds come from: a folder, or (folder null) the built-in synthesisers."""

    folder: str | None = None  # labelled sounds; null: built-in ones
    classes: list[str] | None = None  # keep only these
    recordings: int = 120  # built-in recordings per class
    seconds: tuple[float, float] = (0.8, 2.5)  # length of built-in recordings
    shortest: float = 0.2  # clips audible for less are rejected


@dataclass(frozen=True)
class HeadConfig:
    """Binaural head: the spherical one of `radius` metres, or a measured one from a SOFA file."""

    sofa: str | None = None  # file of measured responses (HRTFs), in place of the sphere
    radius: float = 0.0875


@dataclass(frozen=True)
class SubsetConfig:
    """A folder of shards: `count` samples of a `split`, in these shares of question formats.

    `spatialsoundqa` replaces the mix of ``questions.spatialsoundqa``: parts of a curriculum ask different questions.
    With `counterfactuals`, every scene is followed by what interventions make of it.
    """

    split: str
    count: int
    formats: dict[str, float] = field(default_factory=lambda: {"mmau": 1.0})
    spatialsoundqa: dict[str, float] | None = None
    counterfactuals: CounterfactualConfig | None = None  # the same scenes with one cause changed; null: none

    def asked(self, questions: QuestionsConfig) -> QuestionsConfig:
        """The recipe's `questions` in this subset's mix."""
        return dataclasses.replace(questions, spatialsoundqa=self.spatialsoundqa or questions.spatialsoundqa)


@dataclass(frozen=True)
class TextConfig:
    """Samples without audio (questions, answers, thinking) of the training split, to teach a language model to talk.

    `formats` are shares of question formats. `choice` replaces the mix of ``questions.choice``: what is easy to hear
    may be hard to reason about.
    """

    count: int = 0  # samples without audio
    formats: dict[str, float] = field(default_factory=lambda: {"mmau": 0.8, "dcase_aqa": 0.1, "spatialsoundqa": 0.1})
    choice: dict[str, float] | None = None


@dataclass(frozen=True)
class SceneConfig:
    """The recipe of ``audio-llm prep``.

    `split` says which share of the recordings each split gets, `subsets` which folders of shards are made of a split.
    """

    verb: ClassVar[str] = "prep"
    seed: int = 0  # of everything that is drawn
    audio: render.AudioConfig = field(default_factory=render.AudioConfig)  # format and levels of the scenes
    sounds: SoundsConfig = field(default_factory=SoundsConfig)  # where dry sounds come from
    split: dict[str, float] = field(default_factory=lambda: {"train": 0.7, "validation": 0.1, "test": 0.2})
    folds: dict[str, list[str]] | None = None  # the corpus's folds in each split, in place of `split`
    split_seed: int | None = None  # of the split of recordings, which several recipes may share; None: `seed`
    rooms: rooms.RoomsConfig = field(default_factory=rooms.RoomsConfig)  # rooms per split, and what they are drawn from
    head: HeadConfig = field(default_factory=HeadConfig)  # what hears in binaural scenes
    events: EventsConfig = field(default_factory=EventsConfig)  # how long sounds are, and when
    margins: Margins = field(default_factory=Margins)  # how far from doubt an answer must be
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)  # which are asked, in which shares
    subsets: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: TextConfig = field(default_factory=TextConfig)  # samples without audio
    samples_per_shard: int = 256  # samples in a tar file

    @property
    def recordings_seed(self) -> int:
        """What splits the recordings."""
        return self.seed if self.split_seed is None else self.split_seed

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
            planning.check_config(part.asked(self.questions))
            if part.counterfactuals:
                part.counterfactuals.check(f"subsets.{name}.counterfactuals")
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
    if left_out := folders.told(library.left_out):
        print(left_out, file=sys.stderr)
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
    name: str,
    source: Source,
    asked: QuestionsConfig | None = None,
) -> Iterator[Sample]:
    """`count` samples of subset `name` without audio: events, question, choices, answer, thinking; nothing rendered.

    `asked` replaces the questions of `config`.
    """
    asked = asked or config.questions
    for ask in planning.plan(asked, world, formats, count, config.seed, name):
        draft, choices = planning.draft_of(ask, world, asked, config.seed, name)
        yield planning.sample_of(ask, draft, choices, world, ask.key("text"), source)


# ------------------------------------------------------------------------------------------------ worker side


@dataclass(frozen=True)
class Job:
    """A sample to be rendered: the scene of `ask` as it is drawn, or after an intervention of `kind`."""

    ask: planning.Ask
    kind: str = ""

    def key(self, subset: str) -> str:
        """The key of its sample."""
        return self.ask.key(subset) + (f"-{self.kind}" if self.kind else "")


def plan_jobs(config: SceneConfig, world: World, name: str) -> list[Job]:
    """The samples of subset `name`: every scene followed by its interventions, whose kinds are dealt evenly."""
    part = config.parts[name]
    asks = planning.plan(part.asked(config.questions), world, part.formats, part.count, config.seed, name)
    if part.counterfactuals is None:
        return [Job(ask) for ask in asks]
    used, jobs = Counter[str](), []
    for ask in asks:
        jobs.append(Job(ask))
        drafted = planning.draft_of(ask, world, config.questions, config.seed, name)
        order = rooms.seeded("kinds", config.seed, name, ask.index).permutation(len(interventions.KINDS))
        kinds = [interventions.KINDS[place] for place in order]
        made = 0
        for kind in sorted(kinds, key=used.__getitem__):
            allowed = kind in (part.counterfactuals.kinds or kinds) and made < part.counterfactuals.per_sample
            if allowed and intervention(config, world, ask, drafted, kind, name):
                jobs.append(Job(ask, kind))
                used[kind] += 1
                made += 1
    return jobs


def intervention(
    config: SceneConfig, world: World, ask: planning.Ask, drafted: tuple[Draft, list[str]], kind: str, name: str
) -> interventions.Intervention | None:
    """What an intervention of `kind` makes of a question's scene; None where there is none."""
    draft, choices = drafted
    asked = Asked(ask.kind, ask.target, tuple(item.clip.label for item in draft.placed), tuple(choices))
    where = draft.placed, world, asked, config.questions, config.rooms, config.audio.layout
    return interventions.intervene(kind, *where, config.seed, name, ask.index)


class Renderer:
    """What a worker process knows: worlds, the bank and the head. Built once per process."""

    imports = ("scipy.signal",)

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

    def scenes(self, job: tuple[str, str, list[Job]]) -> list[Rendered]:
        """Render and encode some items of a subset."""
        name, split, jobs = job
        return [self._scene(name, split, one) for one in jobs]

    def _scene(self, name: str, split: str, job: Job) -> Rendered:
        world, config, ask = self.worlds[split], self.config, job.ask
        source = Source(self.dataset, split, licence=self.licence)
        draft, choices = planning.draft_of(ask, world, config.questions, config.seed, name)
        seed = (config.seed, name, ask.index)
        key = job.key(name)
        try:
            if not job.kind:
                sample = planning.sample_of(ask, draft, choices, world, key, source)
                waveform, done = render.render_scene(draft.placed, world, self.bank, self.head, config.audio, *seed)
                heard = [(item.clip.name, *world.places[item.source]) for item in draft.placed]
                sources = [{"clip": clip, "response": f"{room}/{number}.npy"} for clip, room, number in heard]
                sample.meta |= done | {"sources": sources}
                return Rendered(key, pack(sample, waveform))
            found = intervention(config, world, ask, (draft, choices), job.kind, name)
            assert found is not None  # it was planned
            then = planning.after(
                ask, draft, list(found.after.placed), found.answer, found.after.world, config.questions
            )
            sample = planning.sample_of(ask, then, choices, found.after.world, key, source)
            how = self.bank, self.head, config.rooms, config.audio
            waveform, done = interventions.render_after(draft.placed, world, found, *how, *seed)
        except AudioLLMError as error:
            return Rendered(key, None, str(error))
        sample.meta |= done | {"counterfactual": found.meta(ask.key(name))}
        return Rendered(key, pack(sample, waveform))


# ------------------------------------------------------------------------------------------------ the run


def sounds_digest(library: sounds.Library) -> str:
    """The corpus, with a hash of its list and of what :func:`audio_llm.files.glance` sees of its files."""
    seen = hashlib.sha256(library.fingerprint.encode())
    for path in (clip.path for clip in library.clips if clip.path):
        seen.update(glance(path).encode())
    return f"{library.dataset} {seen.hexdigest()[:16]}"


def identity(config: SceneConfig, library: sounds.Library) -> Identity:
    """Everything that decides the data: recipe, sounds, a measured head, version of the simulator."""
    digests = {"format": FORMAT_VERSION, "sounds": sounds_digest(library)} | head_digest(config)
    return identity_of(config, digests, ("sounds.folder", "head.sofa"))


def head_digest(config: SceneConfig) -> dict[str, str]:
    """SHA-256 of the file of a measured head, where the recipe names one."""
    return {"head": content_hash(config.head.sofa)} if config.head.sofa else {}


def config_hash(config: SceneConfig, library: sounds.Library) -> str:
    """As version 0.1 knew a recipe with its sounds."""
    tree = dataclasses.asdict(config)
    tree["sounds"].pop("folder")  # the same sounds in another place are the same
    return digest(FORMAT_VERSION, tree, library.dataset, library.fingerprint)


def prepare(
    config: SceneConfig, out: Path, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
) -> Summary:
    """Make the dataset in `out`: one shard folder per subset, ``text.jsonl``, ``responses/``, ``dataset.json``.

    Raises :class:`ConfigError` when `out` holds a dataset of another recipe, unless `overwrite`.
    """
    config.check()
    library = find_sounds(config)
    head = {"version": FORMAT_VERSION, "config_hash": config_hash(config, library)}
    ledger = Ledger(out, head, identity(config, library), sorted(config.subsets), overwrite)
    if ledger.finished and _intact(out, config):
        return ledger.finished
    ledger.begin()
    workers = workers or machine.cpus()
    if workers > 1:
        pool.forking(__name__, *Renderer.imports)  # which takes a second, while sounds and questions are chosen
    library, groups, rejects = split_sounds(config, out, library, workers, quiet)
    worlds = build_worlds(config, groups)
    plans = {name: plan_jobs(config, worlds[part.split], name) for name, part in config.parts.items()}
    rows = check_text(config, worlds)
    _say(text_check.table(rows), quiet)
    _write_text(config, worlds, library, out)
    args = (config, groups, out / "responses", library.dataset, library.licence)
    with pool.open_pool(workers, Renderer, args) as jobs:
        render_bank(config, worlds, out, jobs, quiet)
        counts = {name: _render_subset(config, name, plans[name], out, jobs, groups, quiet) for name in plans}
    biased = [row for row in rows if row.biased]
    return ledger.finish(
        rejects,
        biased=biased,
        config=plain(config),
        **describe_world(library, groups, worlds),
        subsets=counts,
        text=config.text.count,
        text_only_check=[row.as_dict() for row in rows],
        text_only_biased=[f"{row.question_type} ({row.predictor})" for row in biased],
    )


def split_sounds(
    config: SceneConfig, out: Path, library: sounds.Library, workers: int, quiet: bool
) -> tuple[sounds.Library, dict[str, list[sounds.Clip]], list[dict[str, str]]]:
    """The clips that can be used, by split too, and what had to be left out, which is told and written down."""
    library = scan_sounds(config, out, library, workers, quiet)
    groups, left_out = sounds.split(library, config.split, config.recordings_seed, config.folds)
    rejects = library.rejects + left_out
    write_lines(out / REJECTS, rejects)
    for reject in left_out:
        _say(f"left out: {reject['item']} ({reject['reason']})", quiet)
    return library, groups, rejects


def scan_sounds(config: SceneConfig, out: Path, library: sounds.Library, workers: int, quiet: bool) -> sounds.Library:
    """Fill in the audible parts, from ``sounds.json`` where an earlier run has them."""
    if config.sounds.folder is None:
        return library
    cache = out / "sounds.json"
    key = [sounds_digest(library), config.sounds.shortest]
    if cache.is_file() and (tree := read_own(cache, "Delete it: sounds are scanned again.")).get("key") == key:
        places = {clip.name: clip.path for clip in library.clips}  # where they lie now
        clips = [sounds.Clip(**item | {"path": places[item["name"]]}) for item in tree["clips"]]
        return dataclasses.replace(library, clips=clips, rejects=tree["rejects"])
    with pool.plain_pool(workers) as executor:
        found = sounds.scan(
            library,
            executor,
            shortest=config.sounds.shortest,
            progress=lambda items, n: pool.bar(items, n, "sounds", quiet),
        )
    if not found.clips:
        first = ": ".join(found.rejects[0].values()) if found.rejects else "none"
        raise ConfigError(describe("sounds", "files that can be used", f"none of {len(library.clips)}; {first}"))
    tree = {"key": key, "clips": [dataclasses.asdict(clip) for clip in found.clips], "rejects": found.rejects}
    write_json(cache, tree)
    return found


def check_text(config: SceneConfig, worlds: dict[str, World]) -> list[text_check.Row]:
    """Fit text-only predictors on the train subsets (at most 20,000 items of each), measure them on the test ones."""
    sides: dict[str, list[Sample]] = {"train": [], "test": []}
    for name, part in config.parts.items():
        if part.split in sides:
            count = part.count if part.split == "test" else min(part.count, 20_000)
            source = Source("builtin", part.split)
            asked = part.asked(config.questions)
            sides[part.split] += scene_corpus(config, worlds[part.split], part.formats, count, name, source, asked)
    return text_check.check(sides["train"], sides["test"])


def _write_text(config: SceneConfig, worlds: dict[str, World], library: sounds.Library, out: Path) -> None:
    path, text = out / "text.jsonl", config.text
    if not text.count or path.is_file():
        return
    asked, source = config.text_questions, Source(library.dataset, "train")
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for sample in scene_corpus(config, worlds["train"], text.formats, text.count, "text", source, asked):
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
    wanted: list[Job],
    out: Path,
    jobs: pool.Jobs,
    groups: dict[str, list[sounds.Clip]],
    quiet: bool,
) -> dict[str, Any]:
    part, folder = config.parts[name], out / name
    if finished(folder) != len(wanted):
        plan = {job.key(name): job for job in wanted}
        limits = {"samples_per_shard": config.samples_per_shard}
        fill(folder, plan, jobs, "scenes", name, part.split, quiet=quiet, **limits)
        _write_records(folder, part, {clip.name: clip for clip in groups[part.split]}, config.audio.sample_rate)
    return {"split": part.split, "samples": finished(folder), "shards": len(sizes(folder)["shards"])}


def _write_records(folder: Path, part: SubsetConfig, clips: dict[str, sounds.Clip], rate: int) -> None:
    """The questions of a test subset as other people's files: MMAU, DCASE and SpatialSoundQA JSON.

    SpatialSoundQA renders its scenes anew, so that the dry clips that it names are written beside it, at `rate` (Hz).
    """
    if part.split != "test" or part.counterfactuals:
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
    for record in records["spatialsoundqa"]["data"]:
        for key in ("audio_id", "audio_id2"):
            if record[key] is not None:
                record[key] = _write_dry(folder, clips[record[key]], rate)
    for name, tree in records.items():
        if by_format[name]:
            write_json(folder / f"{name}.json", tree)


def _write_dry(folder: Path, clip: sounds.Clip, rate: int) -> str:
    """Write a clip under ``dry/``, once; its name below `folder`."""
    stem = re.sub(r"[^\w.-]+", "_", clip.name).removesuffix(".wav")
    name = f"{DRY}/{stem}.wav"
    if not (folder / name).is_file():
        (folder / DRY).mkdir(exist_ok=True)
        waveform = limit_peak(Waveform(sounds.load(clip, rate)[None].astype(np.float32), rate, "mono"))
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(encode(waveform, "wav"))
    return name


def describe_world(
    library: sounds.Library, groups: dict[str, list[sounds.Clip]], worlds: dict[str, World]
) -> dict[str, Any]:
    """What a manifest says of sounds, classes and rooms."""
    by_class = Counter(clip.label for clips in groups.values() for clip in clips)
    return {
        "sounds": {
            "dataset": library.dataset,
            "fingerprint": library.fingerprint,
            "clips": {split: len(clips) for split, clips in groups.items()},
            "recordings": {split: len({clip.recording for clip in clips}) for split, clips in groups.items()},
            "clips_by_class": dict(sorted(by_class.items())),
        },
        "labels": sorted({label for world in worlds.values() for label in world.labels}),
        "rooms": {split: [room.name for room in world.rooms] for split, world in worlds.items()},
    }


def _intact(out: Path, config: SceneConfig) -> bool:
    text = config.text.count == 0 or (out / "text.jsonl").is_file()
    return text and all(finished(out / name) > 0 for name in config.subsets)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
