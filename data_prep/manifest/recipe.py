"""The recipe of ``audio-llm prep`` with ``kind: manifest``."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from audio_llm.audio import HEARINGS, LAYOUT_CHANNELS, MAX_SECONDS, Hearing, audible
from audio_llm.datasets.tables import OWN_META
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.shards.schema import MOST_CHOICES
from data_prep.manifest.formats import FORMATS
from data_prep.manifest.formats.base import FIELDS, Format

# How an answer names its choice: in its words; by its letter; by its place, from 0 or from 1; or as published keys do,
# by words, letter or both.
AnswerAs = Literal["text", "letter", "index", "number", "key"]
LISTED = ("choices", "audio", "start", "end", "group")  # fields that several columns may hold
MOST_DRAWS = 100  # of one row: each is a sample with its sound
CONTENT = "sound"  # the key of meta that tells a whole sound from others, where a sample is a stretch of one
CORPUS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class AudioConfig:
    """What is done to sounds, and which are refused. Without `sample_rate` and `layouts` they stay as they are."""

    sample_rate: int | None = None  # Hz
    layouts: list[str] | None = None
    hearing: Hearing = "refuse"  # of sound in another layout
    max_sounds: int = 4  # of one row; one that names more is a reject
    two_channels: Literal["stereo", "binaural"] = "stereo"  # what two channels of a file are
    min_seconds: float = 0.05  # a shorter sound is a reject
    max_seconds: float = 30.0  # a longer sound is a reject
    max_file_seconds: float = MAX_SECONDS  # of a file that a stretch is cut from
    min_peak: float = 1e-4  # of full scale; below it there is nothing to hear
    # flac: 16 bits; float: 32 bits, whatever the level; recipe: nothing, a scene is rendered when it is read.
    store: Literal["flac", "float", "recipe"] = "flac"
    max_peak: float = 1.0  # of full scale; a louder sound is a reject, one between full scale and this is turned down

    def check(self) -> None:
        if self.sample_rate is not None and not 1000 <= self.sample_rate <= 384_000:
            raise ConfigError(describe("audio.sample_rate", "1000 to 384000 Hz", f"{self.sample_rate}"))
        for layout in self.layouts or ():
            if layout not in LAYOUT_CHANNELS:
                found = f"'{layout}'{nearest(layout, LAYOUT_CHANNELS)}"
                raise ConfigError(describe("audio.layouts", ", ".join(LAYOUT_CHANNELS), found))
        if self.hearing != "refuse" and not self.layouts:
            expected = f"audio.layouts as well, such as [{HEARINGS[self.hearing][1][0]}]"
            raise ConfigError(describe(f"audio.hearing: {self.hearing}", expected, "none"))
        audible(self.layouts, self.hearing)
        if not 0 <= self.min_seconds <= self.max_seconds <= self.max_file_seconds:
            found = f"{self.min_seconds:g}, {self.max_seconds:g} and {self.max_file_seconds:g}"
            raise ConfigError(describe("audio", "min_seconds ≤ max_seconds ≤ max_file_seconds", found))
        if self.max_sounds < 1:
            raise ConfigError(describe("audio.max_sounds", "1 or more", f"{self.max_sounds}"))
        if self.store == "recipe" and (self.sample_rate or self.layouts):
            given = "sample_rate" if self.sample_rate else "layouts"
            cure = "Give the layout and the rate that the responses have (options)."
            raise ConfigError(describe("audio.store: recipe", "scenes as they are rendered", f"audio.{given}", cure))
        if self.max_peak < 1:
            raise ConfigError(describe("audio.max_peak", "1 (full scale) or more", f"{self.max_peak:g}"))


@dataclass(frozen=True)
class ManifestConfig:
    """`path` holds the rows in `format`; sounds are named under `root`, by default the folder that `path` is in, or is.
    `columns` says what the source calls our fields. `corpus` begins every id, so that corpora can be used together."""

    verb: ClassVar[str] = "prep"
    corpus: str
    format: str
    path: Path
    kind: Literal["manifest"] = "manifest"  # the kind of data set
    root: Path | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of the format
    keep: list[str] = field(default_factory=list)  # columns that go into a sample's meta as they are
    question: str | None = None  # for rows that have none
    choices_separator: str = "|"  # where the choices are one text
    audio_separator: str | None = None  # where several sounds, or their starts and ends, are one text
    answer_as: AnswerAs | None = None  # how an answer names its choice; the format's own way where nothing is said
    draw_choices: int = 0  # for rows without choices: so many, drawn among all answers by the seed
    open_share: float = 0.0  # of these rows, asked without choices
    draws: int = 1  # how often such a row is asked at most: openly once, and with the same choices once
    licence: str | None = None  # of the sounds, written into every sample
    # Shares of what is never divided (`columns.group`), or lists of values of `columns.split`.
    splits: dict[str, Any] = field(default_factory=lambda: {"train": 0.8, "validation": 0.1, "test": 0.1})
    seed: int = 0  # of everything that is drawn
    audio: AudioConfig = field(default_factory=AudioConfig)
    samples_per_shard: int = 256  # samples in a tar file
    max_rejects: int | None = None  # rejects beyond which the run stops, in place of a share
    max_reject_share: float = 0.01  # share of rejects beyond which the run stops

    @cached_property
    def reader(self) -> Format:
        found: Format = FORMATS.find(self.format)
        return found

    @property
    def folder(self) -> Path:
        """Where sounds are named under."""
        return self.root if self.root is not None else self.path if self.path.is_dir() else self.path.parent

    @property
    def by_value(self) -> bool:
        """Whether sides are told by a column, not drawn."""
        return any(isinstance(part, list) for part in self.splits.values())

    def check(self) -> None:
        """Raise :class:`ConfigError` for values that do not go together; no file is looked at."""
        if not CORPUS.fullmatch(self.corpus):
            expected = "a name of letters, digits, - and _, at most 32"
            raise ConfigError(describe("corpus", expected, f"'{self.corpus}'", "Every id begins with it."))
        self.reader.check_options(self.options)
        self._check_columns()
        self._check_splits()
        if self.audio.store == "recipe" and self.reader.roots is None:
            expected = "a format whose sounds are rendered (spatial_sound_qa)"
            raise ConfigError(describe("audio.store: recipe", expected, self.format))
        self.audio.check()
        if self.draw_choices and not 2 <= self.draw_choices <= MOST_CHOICES:
            raise ConfigError(describe("draw_choices", f"0, or 2 to {MOST_CHOICES}", f"{self.draw_choices}"))
        if self.draw_choices and "choices" in self.columns:
            raise ConfigError(describe("draw_choices", "rows without choices", "columns.choices as well"))
        if self.open_share and not self.draw_choices:
            raise ConfigError(describe("open_share", "draw_choices as well: the other rows' number", "none"))
        if self.draws != 1 and not (self.draw_choices and 1 < self.draws <= MOST_DRAWS):
            expected = f"1, or 2 to {MOST_DRAWS} with draw_choices as well"
            raise ConfigError(describe("draws", expected, f"{self.draws}" + ("" if self.draw_choices else " alone")))
        for name in ("open_share", "max_reject_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(describe(name, "a share from 0 to 1", f"{getattr(self, name):g}"))
        for name, least in (("samples_per_shard", 1), ("max_rejects", 0), ("seed", 0)):
            if (number := getattr(self, name)) is not None and number < least:
                raise ConfigError(describe(name, f"{least} or more", f"{number}"))
        for name, parts in (("audio_separator", "sounds"), ("choices_separator", "choices")):
            if getattr(self, name) == "":
                raise ConfigError(describe(name, f"what stands between two {parts}", "nothing"))
        if self.question is not None and not self.question.strip():
            raise ConfigError(describe("question", "words", "none"))

    def _check_columns(self) -> None:
        for name, column in self.columns.items():
            if name not in FIELDS:
                found = f"'{name}'{nearest(str(name), FIELDS)}"
                raise ConfigError(describe("columns", f"keys among {', '.join(FIELDS)}", found))
            several = name in LISTED and isinstance(column, list) and column
            if not all(isinstance(part, str) and part for part in (column if several else [column])):
                expected = "the name of a column" + (", or a list of names" if name in LISTED else "")
                raise ConfigError(describe(f"columns.{name}", expected, f"{column!r}"))
        if taken := [name for name in self.keep if name in OWN_META]:
            cure = "Give the column another name" + (", or say columns.kind." if taken[0] == OWN_META[0] else ".")
            expected = f"names other than meta's own {', '.join(OWN_META)}"
            raise ConfigError(describe("keep", expected, f"'{taken[0]}'", cure))

    def _check_splits(self) -> None:
        if not self.splits:
            raise ConfigError(describe("splits", "at least one", "none"))
        for name, part in self.splits.items():
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]{0,31}", name):
                raise ConfigError(describe("splits", "names of letters, digits, - and _", f"{name!r}"))
            if isinstance(part, list) != self.by_value:
                raise ConfigError(describe("splits", "shares alone, or lists of values alone", f"{self.splits}"))
        if self.by_value:
            values = [str(value) for part in self.splits.values() for value in part]
            if twice := [value for value in values if values.count(value) > 1]:
                raise ConfigError(describe("splits", "each value once", f"'{twice[0]}' twice"))
            if "split" not in self.columns and "split" not in self.reader.columns:
                raise ConfigError(describe("splits by values", "columns.split, which holds them", "none"))
        elif any(isinstance(part, bool) or not isinstance(part, (int, float)) for part in self.splits.values()):
            raise ConfigError(describe("splits", "shares, such as {train: 0.9, test: 0.1}", f"{self.splits}"))
        elif min(self.splits.values()) <= 0 or abs(sum(self.splits.values()) - 1) > 1e-6:
            raise ConfigError(describe("splits", "shares above 0 that sum to 1", f"{self.splits}"))
        elif "split" in self.columns:
            raise ConfigError(describe("columns.split", "splits as lists of its values", "shares", "Name its values."))

    def columns_of(self, name: str) -> list[str]:
        """What the source calls our field `name`."""
        found = self.columns.get(name, self.reader.columns.get(name, name))
        return found if isinstance(found, list) else [found]

    def plain(self) -> dict[str, Any]:
        """What changes the data. Where rows and sounds lie, and how many rejects are borne, does not."""
        left_out = ("path", "root", "max_rejects", "max_reject_share")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
