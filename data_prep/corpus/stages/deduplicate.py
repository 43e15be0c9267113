"""Which items are of one sound, and which of a benchmark's: the same samples, a copy of them, or the same words."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.datasets import folders
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, DataError, ShardError, describe
from audio_llm.files import glance
from audio_llm.inspection import fingerprints
from audio_llm.inspection.fingerprints import Fingerprint
from audio_llm.language.replies import normalise
from audio_llm.shards.splits import joined
from data_prep.corpus import films
from data_prep.corpus.ledger import hashed
from data_prep.corpus.stage import Item, Reject, Step

EXACT, NEAR, TEXT, CONTAMINATED = "exact_duplicate", "near_duplicate", "same_text", "contaminated"
# What is done with items that are alike: nothing; they lie on one side; all but one are rejects.
Alike = Literal["keep", "join", "remove"]


@dataclass
class Deduplicate(Step):
    """Finds items that are alike, and gives each a ``component``: what must not be divided between sides, named after
    its first recording. Items of one recording are of one component, and so are all that hang together by chains.

    Of those that are removed the longest stays. `against` are folders of sounds or of shards, of benchmarks: an item
    that is a copy of a sound there, or of a part of one, is a reject. Comes after ``cut`` and ``fingerprint``.
    """

    name: ClassVar[str] = "deduplicate"
    whole: ClassVar[bool] = True
    reasons: ClassVar[tuple[str, ...]] = (EXACT, NEAR, TEXT, CONTAMINATED)
    gives: ClassVar[tuple[str, ...]] = ("component",)
    free: ClassVar[tuple[str, ...]] = ("against",)

    exact: Alike = "remove"  # with items of the same samples: keep, join or remove
    near: Alike = "remove"  # with copies at another level, coded, shifted, cropped, with noise
    text: Alike = "keep"  # with items of the same text, case and marks aside
    threshold: float = fingerprints.THRESHOLD  # score of a copy (audio_llm.inspection.fingerprints); higher finds fewer
    against: list[Path] = field(default_factory=list)  # folders of benchmarks

    @property
    def needs(self) -> tuple[str, ...]:
        return ("content", "fingerprint", "seconds", "source", *(["text"] if self.text != "keep" else []))

    def check(self) -> None:
        if not 2 <= self.threshold <= 20:
            raise ConfigError(describe("deduplicate.threshold", "2 to 20", f"{self.threshold:g}"))

    def digests(self) -> Mapping[str, str]:
        return {f"against {number}": _listed(path) for number, path in enumerate(self.against)}

    def facts(self) -> Mapping[str, Any]:
        return {"components": self._components, "pairs": self._pairs}

    def open(self, folder: Path) -> None:
        self._components, self._pairs = 0, 0

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        items = sorted(items_given := items, key=lambda item: (-item.fields["seconds"], item.id))
        prints = [_print(item) for item in items]
        refused = self._contaminated(items, prints)
        edges: list[tuple[str, str]] = []
        for how, reason, found in (
            (self.exact, EXACT, lambda: _equal(items, lambda item: item.fields["content"])),
            (self.near, NEAR, lambda: self._near(prints)),
            (self.text, TEXT, lambda: _equal(items, lambda item: normalise(str(item.fields.get("text") or "")))),
        ):
            if how == "keep":
                continue
            alike = list(found())
            edges += [(items[one].fields["source"], items[two].fields["source"]) for one, two in alike]
            if how == "remove":
                self._remove(items, alike, reason, refused)
        whole = joined([*((item.fields["source"],) for item in items), *edges])
        self._components = len({whole[item.fields["source"]] for item in items if item.id not in refused})
        return [refused.get(item.id) or item.adding(component=whole[item.fields["source"]]) for item in items_given]

    def _near(self, prints: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
        for one, two, _ in fingerprints.pairs(prints, threshold=self.threshold):
            self._pairs += 1
            yield one, two

    def _remove(
        self, items: Sequence[Item], alike: Sequence[tuple[int, int]], reason: str, refused: dict[str, Reject]
    ) -> None:
        """Reject all but the first of those that hang together; one that is gone already keeps none."""
        there = [(one, two) for one, two in alike if items[one].id not in refused and items[two].id not in refused]
        whole = joined([(f"{one:09}", f"{two:09}") for one, two in there])
        for place, first in sorted(whole.items()):
            if place != first:
                item, kept = items[int(place)], items[int(first)]
                refused[item.id] = Reject(item.id, reason, f"as {kept.id}, which is kept")

    def _contaminated(self, items: Sequence[Item], prints: Sequence[Fingerprint]) -> dict[str, Reject]:
        refused: dict[str, Reject] = {}
        for path in self.against:
            contents: dict[str, str] = {}
            names, others = [], []
            for name, waveform in _sounds(path):
                contents.setdefault(audio.sha256(waveform), name)
                names.append(name)
                others.append(fingerprints.fingerprint(waveform))
            if not names:
                raise DataError(describe(f"deduplicate.against {path}", "sounds, or shards", "none"))
            for item in items:
                if found := contents.get(item.fields["content"]):
                    refused.setdefault(item.id, Reject(item.id, CONTAMINATED, f"{found} of {path.name}: equal samples"))
            for one, two, score in fingerprints.pairs(prints, others, self.threshold):
                detail = f"{names[two]} of {path.name}: score {score:.1f}"
                refused.setdefault(items[one].id, Reject(items[one].id, CONTAMINATED, detail))
        return refused


def _print(item: Item) -> Fingerprint:
    try:
        return Fingerprint.decode(item.fields["fingerprint"])
    except (ValueError, AttributeError) as error:
        raise DataError(describe(f"item '{item.id}'", "a fingerprint, by the stage of that name", "another")) from error


def _equal(items: Sequence[Item], value: Callable[[Item], str]) -> Iterator[tuple[int, int]]:
    """The first of those of each value, with each of the others; an empty one is none."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        groups[value(item)].append(place)
    return ((first, other) for key, (first, *others) in groups.items() if key for other in others)


def _sounds(path: Path) -> Iterator[tuple[str, Waveform]]:
    """The sounds of a benchmark's folder, those of shards and those of files, as far as they can be read; a note tells
    of the others. Raises :class:`DataError` for shards of which much is lost: copies of it would be learnt."""
    unread: list[str] = []
    yield from _sounds_of_shards(path, unread)
    for file in _files(path):
        try:
            if file.suffix.lower() in folders.OTHERS:
                yield str(file), films.decode(path / file, str(file), max_seconds=3600)
            else:
                yield str(file), audio.decode(path / file, name=str(file), max_seconds=3600)
        except AudioError as error:
            unread.append(str(error))
    if unread:
        told = f"{len(unread)} of its sounds cannot be read, and no copies of them are looked for"
        print(f"note: deduplicate.against {path}: {told}; the first: {unread[0]}", file=sys.stderr)


def _sounds_of_shards(path: Path, unread: list[str]) -> Iterator[tuple[str, Waveform]]:
    if any(path.glob("*.tar")):
        from audio_llm.shards.reader import ShardDataset

        try:
            dataset = ShardDataset(path)
        except ShardError as error:
            cure = "Mend that folder, or take it out of deduplicate.against."
            raise DataError(f"deduplicate.against: {error} {cure}") from error
        unread += [reject.reason for index in dataset.indexes for reject in index.rejects]
        for number in range(len(dataset)):
            try:
                found = dataset[number]
            except AudioLLMError as error:
                unread.append(str(error))
                continue
            for waveform in found["waveforms"]:
                yield found["sample"].id, waveform


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        raise DataError(describe(f"deduplicate.against {path}", "a folder", "none"))
    suffixes = folders.SUFFIXES | folders.OTHERS if films.installed() else folders.SUFFIXES
    found = folders.listing(path, suffixes)
    folders.tell(path, found.left_out)
    return found.files


def _listed(path: Path) -> str:
    """What tells a folder's sounds from others."""
    tars = sorted(path.glob("*.tar"))
    return hashed([(folders.readable(file), glance(path / file)) for file in [*_files(path), *tars]])


STAGE = Deduplicate
