"""A set in the format of DCASE 2025 task 5 (audio question answering) from simulated scenes, its defects included.

Three parts as in the challenge, each a recipe of scenes and questions of its own; splits share no recording and no
room, and every letter is right equally often. One JSON file a question (``OUT/<split>/<id>.json``), the sound in
``OUT/audio/<split>/``. Some sounds are MPEG audio under a name that ends in ``.wav``, some answers carry a stray comma,
and a few cannot be read at all: readers have to live with all three. The shards the questions come from stay in
``OUT/scenes``, with the events' ground truth.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from audio_llm import audio
from audio_llm import config as recipes
from audio_llm.datasets.sounds import find
from audio_llm.errors import ConfigError, DataError, describe
from audio_llm.files import atomic_folder, read_lines, write_json
from audio_llm.identity import identity_of
from data_prep.ledger import REJECTS, Ledger, Summary, digest, plain
from data_prep.procedural import CLASSES
from data_prep.questions.records import dcase_record
from data_prep.scenes import pool, simulate
from data_prep.scenes.rooms import seeded
from data_prep.tasks.base import Kind

FORMAT_VERSION = 2  # raise it when the same recipe would give other files
KIND_NAME = "dcase_aqa"
# How the challenge's parts name their sounds; readers may tell the part by it.
FOLDERS = ("audio", "scenes")  # of a set, beside its splits
PARTS = {"part1": "clip", "part2": "fold", "part3": "audio"}


@dataclass(frozen=True)
class SplitConfig:
    """Questions of a split by part; `split` says whose recordings and rooms, `hidden` leaves the answers out."""

    split: str
    count: dict[str, int]
    hidden: bool = False


@dataclass(frozen=True)
class Defects:
    """Shares of items with the defects of the published files."""

    mpeg: float = 0.1  # MPEG audio under a name that ends in .wav
    comma: float = 0.004  # an answer that differs from its option by a trailing comma
    broken: float = 0.002  # an answer that is no option: an order of letters, a blend of two, another option's letter


@dataclass(frozen=True)
class AudioQuestionsConfig:
    """The recipe of ``audio-llm prep`` with ``kind: dcase_aqa``."""

    verb: ClassVar[str] = "prep"
    kind: str = KIND_NAME  # the kind of data set
    seed: int = 0  # of everything that is drawn
    scenes: dict[str, Any] = field(default_factory=dict)  # a recipe of scenes, without subsets
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # what differs in it, by part
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)  # {split, count by part, hidden} by name
    defects: Defects = field(default_factory=Defects)  # shares of items with the defects of the published files

    def of(self, part: str) -> simulate.SceneConfig:
        """The scenes of one part. A part has a seed of its own for rooms, scenes and built-in sounds; a folder's
        recordings are split by one seed for all parts, so that none is on two sides.

        Classes that name built-in sounds say nothing of a folder without them: such a part hears all of its classes.
        """
        tree = _merged(self.scenes, self.parts[part])
        tree["seed"] = self.seed * len(PARTS) + list(PARTS).index(part)
        tree["split_seed"] = self.seed
        if self.of_built_in_sounds(part):
            tree["sounds"] = {**tree["sounds"], "classes": None}
        tree["subsets"] = {
            name: {"split": split.split, "count": split.count[part], "formats": {KIND_NAME: 1.0}}
            for name, split in self.split_configs.items()
            if split.count.get(part)
        }
        return recipes.build(simulate.SceneConfig, tree, where=f"parts.{part}")

    def of_built_in_sounds(self, part: str) -> bool:
        """Whether the classes of `part` are built-in ones, and its sounds those of a folder that has none of them."""
        chosen = _merged(self.scenes, self.parts[part]).get("sounds", {})
        folder, classes = chosen.get("folder"), set(chosen.get("classes") or ())
        return bool(folder and classes) and classes <= set(CLASSES) and not classes & set(find(folder).labels)

    @property
    def split_configs(self) -> dict[str, SplitConfig]:
        return {name: recipes.build(SplitConfig, tree, f"splits.{name}") for name, tree in self.splits.items()}

    def check(self) -> None:
        """Raise :class:`ConfigError` for parts or splits that there are not, and for values that cannot be drawn by."""
        if self.seed < 0:
            raise ConfigError(describe("seed", "0 or more", f"{self.seed}"))
        for name, share in dataclasses.asdict(self.defects).items():
            if not 0 <= share <= 1:
                raise ConfigError(describe(f"defects.{name}", "a share between 0 and 1", f"{share}"))
        for name in self.parts:
            if name not in PARTS:
                raise ConfigError(describe("parts", f"names among {', '.join(PARTS)}", f"'{name}'"))
        if not self.parts or not self.splits:
            raise ConfigError(describe("recipe", "'parts' and 'splits'", "none"))
        for name, split in self.split_configs.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in FOLDERS:
                found = f"{name!r}"
                raise ConfigError(describe("splits", f"names of letters and digits beside {', '.join(FOLDERS)}", found))
            if not sum(split.count.values()):
                raise ConfigError(describe(f"splits.{name}.count", "at least one question", "none"))
            unknown = sorted(set(split.count) - set(self.parts))
            if unknown:
                raise ConfigError(describe(f"splits.{name}.count", f"names among {', '.join(self.parts)}", unknown[0]))
        for part in self.parts:
            self.of(part).check()


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with `changes`, group by group; a mix of questions replaces the other as a whole."""
    result = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key != "choice"
        result[key] = _merged(result[key], value) if both else value
    return result


def prepare(
    config: AudioQuestionsConfig, out: Path, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
) -> Summary:
    """Make the set in `out`. A run that was stopped goes on; the same recipe gives the same bytes.

    Raises :class:`ConfigError` when `out` holds a dataset of another recipe, unless `overwrite`.
    """
    config.check()
    tree, splits = plain(config), config.split_configs
    head = {"version": FORMAT_VERSION, "kind": KIND_NAME, "config_hash": digest(FORMAT_VERSION, tree)}
    sounds = {part: simulate.sounds_digest(simulate.find_sounds(config.of(part))) for part in config.parts}
    digests: dict[str, Any] = {"format": FORMAT_VERSION, "scenes": simulate.FORMAT_VERSION}
    digests |= {f"sounds of {part}": found for part, found in sounds.items()}
    ledger = Ledger(out, head, identity_of(config, digests, ("scenes.sounds.folder",)), [*splits, *FOLDERS], overwrite)
    if ledger.finished and all((out / name).is_dir() for name in splits):
        return ledger.finished
    ledger.begin()
    for part in filter(config.of_built_in_sounds, config.parts):
        print(f"{part}: its classes are built-in sounds; it hears all classes of the folder", file=sys.stderr)
    made = [
        simulate.prepare(config.of(part), out / "scenes" / part, workers=workers, quiet=quiet) for part in config.parts
    ]
    counts = {name: write_split(config, name, out, quiet) for name in splits}
    _refuse_shared_recordings(config, out)
    biased = [row for part in made for row in part.biased]
    rejects = [reject for part in made for reject in read_lines(part.out / REJECTS)]
    return ledger.finish(rejects, biased=biased, config=tree, subsets=counts)


def write_split(config: AudioQuestionsConfig, name: str, out: Path, quiet: bool) -> dict[str, Any]:
    """Write one split's questions and sounds; returns how many, by defect."""
    split = config.split_configs[name]
    counts: Counter[str] = Counter()
    total = sum(split.count.values())
    with atomic_folder(out / "audio" / name) as sounds, atomic_folder(out / name) as texts:
        for part, sample, waveform in pool.bar(_samples(config, name, out), total, name, quiet):
            number = int(sample.id.rpartition("-")[2])
            rng = seeded("defects", config.seed, part, name, number)
            record = dcase_record(dataclasses.replace(sample, choices=in_order(sample.choices)))
            record["id"] = f"{part}_{name}_{number:05d}"
            file = f"{PARTS[part]}_{name}_{number:05d}.wav"
            record["audio_url"] = f"../audio/{name}/{file}"
            mpeg, answer = rng.random() < config.defects.mpeg, rng.random()
            (sounds / file).write_bytes(_encoded(waveform, mpeg))
            if answer < config.defects.broken:
                record["answer"] = broken_answer(rng, record["choice"], record["answer"])
            elif answer < config.defects.broken + config.defects.comma:
                record["answer"] += ","
            counts.update(
                {
                    "samples": 1,
                    "mpeg": int(mpeg),
                    "broken": int(answer < config.defects.broken),
                    "comma": int(config.defects.broken <= answer < config.defects.broken + config.defects.comma),
                }
            )
            if split.hidden:
                del record["answer"]
            write_json(texts / f"{record['id']}.json", record)
    return {"split": split.split, **counts}


def _refuse_shared_recordings(config: AudioQuestionsConfig, out: Path) -> None:
    """No recording is in two splits, whichever parts it is in. Raises :class:`DataError`."""
    from audio_llm.shards.reader import ShardDataset

    owners: dict[str, tuple[str, str]] = {}
    for name, split in config.split_configs.items():
        for part in (part for part in config.parts if split.count.get(part)):
            dataset = ShardDataset(out / "scenes" / part / name, decode=False)
            for sample in map(dataset.load_sample, range(len(dataset))):
                for recording in sample.meta["recordings"]:
                    owner = owners.setdefault(recording, (split.split, part))
                    if owner[0] != split.split:
                        found = f"{split.split} ({part})"
                        raise DataError(describe(f"recording {recording}", f"only {owner[0]} ({owner[1]})", found))


def _samples(config: AudioQuestionsConfig, name: str, out: Path) -> Iterator[tuple[str, Any, audio.Waveform]]:
    from audio_llm.shards.reader import ShardDataset

    for part in config.parts:
        folder = out / "scenes" / part / name
        if config.split_configs[name].count.get(part):
            dataset = ShardDataset(folder)
            for index in range(len(dataset)):
                item = dataset[index]
                yield part, item["sample"], item["waveforms"][0]


def in_order(choices: list[str]) -> list[str]:
    """Choices that have an order of their own keep it: yes before no, numbers ascending. Others stay as drawn."""
    if set(choices) == {"yes", "no"}:
        return ["yes", "no"]
    return sorted(choices, key=int) if all(choice.isdecimal() for choice in choices) else choices


def _encoded(waveform: audio.Waveform, mpeg: bool) -> bytes:
    if mpeg:
        return audio.encode(waveform, "mp3", "MPEG_LAYER_III")
    return audio.encode(waveform, "wav")


def broken_answer(rng: Any, options: list[str], answer: str) -> str:
    """An answer that names none of `options` or more than one: the three kinds that published files have."""
    other = options[(options.index(answer) + 1) % len(options)]
    kinds: tuple[Callable[[], str], ...] = (
        lambda: ", ".join(option[0] for option in reversed(options)),  # an order of letters
        lambda: f"{answer} and {other.partition('. ')[2]}",  # a blend of two options
        lambda: f"{other[0]}. {answer.partition('. ')[2]}",  # one option's letter, another's text
    )
    return kinds[int(rng.integers(len(kinds)))]()


def _defects(manifest: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in manifest["subsets"].items():
        counts = ", ".join(f"{entry[key]} {key}" for key in ("mpeg", "comma", "broken"))
        yield f"{name:<8} {entry['samples']:>6} questions of split {entry['split']} ({counts})"


KIND = Kind(KIND_NAME, AudioQuestionsConfig, prepare, flags={"sounds": "scenes.sounds.folder"}, details=_defects)
