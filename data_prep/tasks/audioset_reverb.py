"""From dry clips and a folder of room responses to shards: ``audio-llm prep`` with ``kind: audioset_reverb``.

Which clip is heard through which response is decided before anything is rendered and written down in a manifest: JSON
lines under a header with their hash. The same manifest renders to the same samples anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from audio_llm import audio, machine
from audio_llm import config as recipes
from audio_llm.audio import Waveform
from audio_llm.datasets.reverberation import (
    DRY_MIX_ALPHA,
    DryClip,
    Response,
    load_response,
    pair_partners,
    read_audioset,
    read_classes,
    read_responses,
    read_sounds,
)
from audio_llm.errors import AudioLLMError, ConfigError, describe
from audio_llm.files import glance, write_lines
from audio_llm.identity import identity_of
from audio_llm.shards.rendering import Array, Rendering, check_rate, dry, hear
from audio_llm.shards.schema import Event, Sample, Source
from audio_llm.shards.writer import pack
from data_prep.ledger import REJECTS, Ledger, Rendered, Summary, digest, fill, finished, plain
from data_prep.scenes import pool
from data_prep.tasks.base import Kind

KIND_NAME = "audioset_reverb"
FORMAT_VERSION = 2  # raise it when the same recipe would give other bytes
MANIFEST_VERSION = 1  # ... and this one when the same rows would mean other scenes


@dataclass(frozen=True)
class SubsetConfig:
    """A folder of shards: clips of an AudioSet-style `metadata` file or of a labelled folder (`sounds`)."""

    responses: str  # train or eval: which <split>_reverberation.json
    metadata: str | None = None
    sounds: str | None = None
    folds: list[int | str] | None = None  # of `sounds`: these official folds
    recordings: list[float] | None = None  # [0, 0.95]: this stretch of the recordings in an order drawn by the seed
    scenes: list[float] | None = None  # ... and this one of the responses' scenes; [0.95, 1] is what it leaves over
    split: str = "train"
    count: int | None = None  # by default every clip once, in order
    pairs: float = 0.0  # share of samples with two sources
    manifest: str | None = None  # render what this file says instead of drawing


@dataclass(frozen=True)
class ReverbConfig:
    """Recipe of ``audio-llm prep`` with ``kind: audioset_reverb``; `subsets` are folders of shards by name."""

    verb: ClassVar[str] = "prep"
    responses: str  # folder with <split>_reverberation.json and <layout>/<scene>/<n>.npy
    kind: Literal["audioset_reverb"] = "audioset_reverb"  # the kind of data set
    classes: str | None = None  # CSV of class names, for subsets with `metadata`; in `root`, like that, or as it stands
    root: str = "."  # folder of the dry clips that `metadata` lists
    seed: int = 0  # of everything that is drawn
    rendering: Rendering = field(default_factory=Rendering)  # how a clip sounds in a room
    subsets: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples_per_shard: int = 256  # samples in a tar file
    max_reject_share: float = 0.01  # share of unusable clips beyond which the run stops

    @property
    def parts(self) -> dict[str, SubsetConfig]:
        """The subsets, checked."""
        return {name: recipes.build(SubsetConfig, tree, f"subsets.{name}") for name, tree in self.subsets.items()}

    def file(self, name: str) -> Path:
        """The file of that name in `root`; where only the working directory has it, that one."""
        inside, plain = Path(self.root) / name, Path(name)
        return plain if plain.is_file() and not inside.is_file() else inside

    def named_classes(self) -> dict[str, str]:
        """Identifier → name of every class, in order; empty without `classes`."""
        return read_classes(self.file(self.classes)) if self.classes else {}

    def check(self) -> None:
        """Raise :class:`ConfigError` for values that contradict each other."""
        self.rendering.check()
        if not self.subsets:
            raise ConfigError("subsets: expected at least one, for instance test: {responses: eval, metadata: FILE}.")
        for name, part in self.parts.items():
            if (part.metadata is None) == (part.sounds is None):
                found = "neither" if part.metadata is None else "both"
                raise ConfigError(describe(f"subsets.{name}", "either 'metadata' or 'sounds'", found))
            if part.metadata is not None and (self.classes is None or part.folds is not None):
                found = "folds" if part.folds is not None else "no classes"
                raise ConfigError(describe(f"subsets.{name}", "with 'metadata', 'classes' and no 'folds'", found))
            for key, stretch in (("recordings", part.recordings), ("scenes", part.scenes)):
                if stretch is not None and not (len(stretch) == 2 and 0 <= stretch[0] < stretch[1] <= 1):
                    expected = "two shares of the whole, for instance [0, 0.95]"
                    raise ConfigError(describe(f"subsets.{name}.{key}", expected, str(stretch)))
            if not 0 <= part.pairs <= 1 or (part.count is not None and part.count < 1):
                found = f"pairs {part.pairs}, count {part.count}"
                raise ConfigError(describe(f"subsets.{name}", "pairs in [0, 1] and a positive count", found))


# ------------------------------------------------------------------------------------------------ what is heard where


@dataclass(frozen=True)
class Heard:
    """A clip through a response."""

    clip: DryClip
    response: Response

    def row(self) -> dict[str, Any]:
        """Its entry in a manifest: names, and what they stand for, so that other data by the same names is noticed."""
        azimuth, elevation, distance = self.response.place
        place = {"azimuth": round(azimuth, 3), "elevation": round(elevation, 3), "distance": round(distance, 4)}
        return {"clip": self.clip.name, "response": self.response.name, "labels": list(self.clip.labels), **place}


@dataclass(frozen=True)
class Item:
    """One sample to be: its sources; `share` is the first one's where both are heard from one place."""

    key: str
    seed: int
    heard: tuple[Heard, ...]
    share: float | None = None

    def row(self) -> dict[str, Any]:
        row = {"id": self.key, "seed": self.seed, "sources": [heard.row() for heard in self.heard]}
        return row if self.share is None else {**row, "share": self.share}


def plan(
    name: str, part: SubsetConfig, clips: Sequence[DryClip], responses: Sequence[Response], config: ReverbConfig
) -> list[Item]:
    """The items of subset `name`: each a function of the recipe's seed, the subset's name and its own number.

    Without `count`, every clip once in order; with it, as many passes over shuffled clips as that takes. Responses are
    drawn uniformly; the two of a pair are of one scene.
    """
    if not clips:
        raise ConfigError(describe(f"subsets.{name}", "clips", "none"))
    count = part.count or len(clips)
    scenes = pair_partners(responses)
    if part.pairs and (not scenes or len({clip.recording for clip in clips}) < 2):
        found = "one recording" if scenes else "no scene with responses from two places"
        raise ConfigError(describe(f"subsets.{name}: pairs", "two recordings, and scenes with two places", found))
    drawn = _Draw(part, clips, responses, scenes, config.rendering.places == "shared")
    items, order = [], np.arange(len(clips))
    for number in range(count):
        if part.count is not None and number % len(clips) == 0:
            order = np.random.default_rng(_seed(config.seed, name, "order", number)).permutation(len(clips))
        first = clips[number if part.count is None else int(order[number % len(clips)])]
        items.append(drawn.item(f"{name}-{number:06d}", _seed(config.seed, name, number), first))
    return items


class _Draw:
    """What items are drawn from."""

    def __init__(
        self,
        part: SubsetConfig,
        clips: Sequence[DryClip],
        responses: Sequence[Response],
        scenes: dict[str, list[Response]],
        shared: bool,
    ) -> None:
        self.part, self.clips, self.responses, self.scenes, self.shared = part, clips, responses, scenes, shared
        self.paired = [response for found in scenes.values() for response in found]

    def item(self, key: str, seed: int, first: DryClip) -> Item:
        rng = np.random.default_rng(seed)
        if rng.random() >= self.part.pairs:
            return Item(key, seed, (Heard(first, self.responses[int(rng.integers(len(self.responses)))]),))
        second = first
        while second.recording == first.recording:
            second = self.clips[int(rng.integers(len(self.clips)))]
        if self.shared:
            response = self.responses[int(rng.integers(len(self.responses)))]
            share = round(float(rng.beta(DRY_MIX_ALPHA, DRY_MIX_ALPHA)), 6)
            return Item(key, seed, (Heard(first, response), Heard(second, response)), share)
        response = self.paired[int(rng.integers(len(self.paired)))]
        others = [other for other in self.scenes[response.scene] if other.place != response.place]
        return Item(key, seed, (Heard(first, response), Heard(second, others[int(rng.integers(len(others)))])))


def _seed(*words: object) -> int:
    """53 bits, so that any JSON reader keeps them."""
    digest = hashlib.sha256("\0".join(map(str, (KIND_NAME, *words))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


# ------------------------------------------------------------------------------------------------ manifests


def manifest_hash(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the rows as JSON with sorted keys, a line each."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def write_manifest(path: str | Path, items: Sequence[Item]) -> str:
    """Write header and rows; returns their hash."""
    rows = [item.row() for item in items]
    digest = manifest_hash(rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [{"version": MANIFEST_VERSION, "items": len(rows), "sha256": digest}, *rows])
    return digest


def read_manifest(path: str | Path, clips: Sequence[DryClip], responses: Sequence[Response]) -> list[Item]:
    """The items of a manifest, found in `clips` and `responses` by name.

    Raises :class:`ConfigError` when the file is not what its hash says, or names what is not there or is not the same.
    """
    try:
        header, *rows = (json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines())
        expected, found = (header["version"], header["items"], header["sha256"]), (MANIFEST_VERSION, len(rows))
        if expected != (*found, manifest_hash(rows)):
            raise ConfigError(describe(f"manifest {path}", f"rows of SHA-256 {expected[2]}", "other rows"))
        known = {clip.name: clip for clip in clips}, {response.name: response for response in responses}
        return [_find(row, *known, f"manifest {path}: {row['id']}") for row in rows]
    except OSError as error:
        raise ConfigError(describe(f"manifest {path}", "a file", error.strerror or str(error))) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(describe(f"manifest {path}", "a header and rows of JSON", repr(error))) from error


def _find(row: dict[str, Any], clips: dict[str, DryClip], responses: dict[str, Response], where: str) -> Item:
    heard = []
    for source in row["sources"]:
        clip, response = clips.get(source["clip"]), responses.get(source["response"])
        if clip is None or response is None:
            missing = f"clip '{source['clip']}'" if clip is None else f"response '{source['response']}'"
            raise ConfigError(describe(where, missing, "none by that name"))
        heard.append(Heard(clip, response))
        if heard[-1].row() != source:
            raise ConfigError(describe(where, json.dumps(source), json.dumps(heard[-1].row())))
    return Item(row["id"], row["seed"], tuple(heard), row.get("share"))


# ------------------------------------------------------------------------------------------------ samples


class Renderer:
    """What a worker process knows. Items in, samples with audio (or the reason why not) out."""

    imports = ("scipy.signal",)

    def __init__(self, rendering: Rendering, splits: dict[str, tuple[str, str]]) -> None:
        self.rendering, self.splits = rendering, splits  # by subset: corpus and split

    def samples(self, job: tuple[str, list[Item]]) -> list[Rendered]:
        """Every item, rendered and encoded."""
        name, items = job
        found: list[Rendered] = []
        for item in items:
            try:
                waveform, facts = render_item(item, self.rendering)
                form = "flac" if waveform.peak <= 1 else "float"  # the level is a cue of distance
                found.append(Rendered(item.key, pack(sample_of(item, facts, *self.splits[name]), waveform, form)))
            except AudioLLMError as error:
                found.append(Rendered(item.key, None, str(error)))
        return found


def render_item(item: Item, rendering: Rendering) -> tuple[Waveform, dict[str, Any]]:
    """The sound of an item, also beyond full scale, and what was done to it: seconds of dry sound that were cut."""
    decoded = [audio.decode(heard.clip.path) for heard in item.heard]
    clips = [dry(waveform, rendering, heard.clip.name) for waveform, heard in zip(decoded, item.heard, strict=True)]
    responses = [load_response(heard.response, rendering.layout) for heard in item.heard]
    if item.share is not None:
        clips = [_weighted_sum(clips, (item.share, 1 - item.share))]
    mixed = hear(clips, responses[: len(clips)], rendering)
    if rendering.gain_db:
        mixed = mixed * np.float32(10 ** (rendering.gain_db / 20))
    facts: dict[str, Any] = {}
    cut = max(len(samples) for samples in clips) / rendering.sample_rate - rendering.seconds
    if cut > 0:
        facts["cut_seconds"] = round(cut, 4)
    return Waveform(mixed, rendering.sample_rate, rendering.layout), facts


def _weighted_sum(clips: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros(max(map(len, clips)))
    for samples, weight in zip(clips, weights, strict=True):
        total[: len(samples)] += weight * samples
    return total


def sample_of(item: Item, facts: dict[str, Any], dataset: str, split: str) -> Sample:
    """One event per class and place, without times: labels hold for the whole clip."""
    events: dict[tuple[str, str], Event] = {}
    for heard in item.heard:
        row = heard.row()
        for label in heard.clip.labels:
            place = {name: row[name] for name in ("azimuth", "elevation", "distance")}
            events[label, heard.response.name] = Event(label, **place)
    meta: dict[str, Any] = {
        "recordings": [heard.clip.recording for heard in item.heard],
        "sources": [{"clip": heard.clip.name, "response": heard.response.name} for heard in item.heard],
        "seed": item.seed,
        **({} if item.share is None else {"share": item.share}),
        **facts,
    }
    source = Source(dataset, split, item.heard[0].clip.recording)
    return Sample(item.key, "localisation", events=list(events.values()), source=source, meta=meta)


# ------------------------------------------------------------------------------------------------ the run


def prepare(
    config: ReverbConfig, out: Path, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
) -> Summary:
    """Make the dataset in `out`: a shard folder per subset, ``manifests/<subset>.jsonl``, ``dataset.json``.

    A run that was stopped goes on after its last finished shard. Raises :class:`ConfigError` when `out` holds a
    dataset of another recipe, unless `overwrite`, and when recordings are on both sides of a split.
    """
    config.check()
    check_rate("rendering.sample_rate", config.rendering.sample_rate, Path(config.responses))
    plans, corpora, rejects, scenes = _plans(config)
    digests = {name: manifest_hash([item.row() for item in items]) for name, items in plans.items()}
    tree = dataclasses.asdict(config)
    for key in ("responses", "root", "classes"):  # the same data in another place are the same
        tree.pop(key)
    head = {"version": FORMAT_VERSION, "kind": KIND_NAME, "config_hash": digest(FORMAT_VERSION, tree, digests)}
    known = {f"manifest of {name}": found for name, found in digests.items()} | {"sounds": _sounds_digest(plans)}
    places = ("responses", "root", "classes", "max_reject_share")
    identity = identity_of(config, {"format": FORMAT_VERSION, **known}, places)
    ledger = Ledger(out, head, identity, sorted(plans), overwrite)
    if ledger.finished and all(finished(out / name) for name in plans):
        return ledger.finished
    ledger.begin()
    write_lines(out / REJECTS, rejects)
    splits = {name: (corpora[name], part.split) for name, part in config.parts.items()}
    limits = {"samples_per_shard": config.samples_per_shard, "max_reject_share": config.max_reject_share}
    counts = {}
    with pool.open_pool(workers or machine.cpus(), Renderer, (config.rendering, splits)) as jobs:
        for name, items in plans.items():
            write_manifest(out / "manifests" / f"{name}.jsonl", items)
            plan = {item.key: item for item in items}
            rejects += fill(out / name, plan, jobs, "samples", name, quiet=quiet, **limits)
            counts[name] = {"split": splits[name][1], "samples": finished(out / name), "manifest": digests[name]}
    labels = _labels(config, plans)
    return ledger.finish(rejects, config=plain(config), labels=labels, shared_scenes=scenes, subsets=counts)


def _sounds_digest(plans: Mapping[str, Sequence[Item]]) -> str:
    """Of a glance at the clips and the responses, of which a manifest has the names alone. They may be two millions:
    one look at each."""
    heard = [heard for items in plans.values() for item in items for heard in item.heard]
    paths = {path for one in heard for path in (one.clip.path, one.response.path)}
    return hashlib.sha256("".join(sorted(glance(path, pieces=1) for path in paths)).encode()).hexdigest()


def _plans(config: ReverbConfig) -> tuple[dict[str, list[Item]], dict[str, str], list[dict[str, str]], list[str]]:
    """Items by subset, corpora by subset, clips left out, and scenes that lie on more than one side of the split."""
    classes = config.named_classes()
    plans, corpora, rejects = {}, {}, []
    sides: dict[str, set[str]] = defaultdict(set)
    scenes: dict[str, set[str]] = defaultdict(set)
    responses: dict[str, list[Response]] = {}
    for name, part in config.parts.items():
        if part.responses not in responses:
            responses[part.responses] = read_responses(config.responses, part.responses, config.rendering.layout)
        clips, corpora[name], left_out = _clips(config, part, classes)
        if len(left_out) > config.max_reject_share * (len(clips) + len(left_out)):
            found = f"{len(left_out)} of {len(clips) + len(left_out)}; {left_out[0]['item']}: {left_out[0]['reason']}"
            cure = "Mend them, or raise max_reject_share."
            raise ConfigError(
                describe(f"subsets.{name}", f"at most {config.max_reject_share:.1%} unusable clips", found, cure)
            )
        rejects += left_out
        held = _held(part.recordings, {clip.recording for clip in clips}, config.seed, corpora[name])
        clips = [clip for clip in clips if clip.recording in held]
        rooms = _held(part.scenes, {response.scene for response in responses[part.responses]}, config.seed, "scenes")
        known = [response for response in responses[part.responses] if response.scene in rooms]
        if not known:
            raise ConfigError(describe(f"subsets.{name}.scenes", "at least one scene", f"none in {part.scenes}"))
        plans[name] = (
            read_manifest(part.manifest, clips, known) if part.manifest else plan(name, part, clips, known, config)
        )
        for heard in (heard for item in plans[name] for heard in item.heard):
            sides[f"{corpora[name]}/{heard.clip.recording}"].add(part.split)
            scenes[heard.response.scene].add(part.split)
    crossing = sorted(recording for recording, found in sides.items() if len(found) > 1)
    if crossing:
        found = f"{crossing[0]} in {', '.join(sorted(sides[crossing[0]]))} ({len(crossing)} recordings so)"
        raise ConfigError(describe("subsets", "recordings on one side of the split each", found))
    return plans, corpora, rejects, sorted(scene for scene, found in scenes.items() if len(found) > 1)


def _held(stretch: Sequence[float] | None, names: set[str], *words: object) -> set[str]:
    """The part of `names` from one share to the other, in an order drawn by `words`; all of them by default.

    Stretches that meet have nothing in common and leave nothing over.
    """
    if stretch is None:
        return names
    order = sorted(names, key=lambda name: (_seed(*words, name), name))
    first, end = (round(share * len(order)) for share in stretch)
    return set(order[first:end])


def _clips(
    config: ReverbConfig, part: SubsetConfig, classes: dict[str, str]
) -> tuple[list[DryClip], str, list[dict[str, str]]]:
    if part.metadata is not None:
        clips, left_out = read_audioset(config.file(part.metadata), classes, config.root)
        return clips, "audioset", left_out
    folds = None if part.folds is None else [str(fold) for fold in part.folds]
    clips, corpus = read_sounds(str(part.sounds), folds)
    return clips, corpus, []


def _labels(config: ReverbConfig, plans: dict[str, list[Item]]) -> list[str]:
    """Classes in order of the CSV (the published class numbers), or sorted where there is none."""
    heard = {label for items in plans.values() for item in items for one in item.heard for label in one.clip.labels}
    listed = list(config.named_classes().values())
    return listed + sorted(heard - set(listed))


def _shared(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Say it when rooms of the test data were heard in training."""
    if shared := manifest.get("shared_scenes"):
        yield f"note: {len(shared)} scenes are on both sides of the split, {shared[0]} for one"


KIND = Kind(KIND_NAME, ReverbConfig, prepare, details=_shared)
