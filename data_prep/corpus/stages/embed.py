"""Vectors of clips, and how far each lies from the others or from a reference collection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from audio_llm.audio import HEARINGS, Hearing
from audio_llm.errors import AudioError, ConfigError, DataError, describe
from audio_llm.files import atomic_file, content_hash, write_lines
from audio_llm.identity import start_digest
from data_prep.corpus import vectors
from data_prep.corpus.sounds import hear
from data_prep.corpus.stage import Item, Reject, Step

UNREADABLE, DISAGREEMENT, FAR, NEAR = "unreadable", "disagreement", "far", "near"
_BLOCK = 1024  # vectors that are compared with all others at once


@dataclass
class Embed(Step):
    """Gives ``vector`` (:mod:`data_prep.corpus.vectors`) and ``windows``, of how many it is the mean; where
    `min_agreement` is set, also ``agreement``: the cosine of the sound and the item's ``text``. Comes after ``cut``."""

    name: ClassVar[str] = "embed"
    reasons: ClassVar[tuple[str, ...]] = (UNREADABLE, DISAGREEMENT)
    retryable: ClassVar[tuple[str, ...]] = (UNREADABLE,)
    gives: ClassVar[tuple[str, ...]] = ("vector", "windows", "agreement")
    free: ClassVar[tuple[str, ...]] = ("model",)

    model: Path  # folder of one of our encoders, or of a ClapModel
    seconds: float = 10.0  # of a window; shorter where the model takes less
    hearing: Hearing = "mean"  # of sound in another layout than the model's
    min_agreement: float | None = None  # a lower cosine of sound and text is a reject; needs a CLAP model

    @property
    def needs(self) -> tuple[str, ...]:
        return ("content", *(["text"] if self.min_agreement is not None else []))

    def check(self) -> None:
        if self.seconds <= 0:
            raise ConfigError(describe("embed.seconds", "seconds above 0", f"{self.seconds:g}"))
        if self.hearing not in HEARINGS:
            raise ConfigError(describe("embed.hearing", ", ".join(HEARINGS), self.hearing))

    def digests(self) -> Mapping[str, str]:
        return {"model": start_digest(self.model)}

    def open(self, folder: Path) -> None:
        self._folder, self._embedder = folder, vectors.open_embedder(self.model)
        if self.min_agreement is not None and not self._embedder.texts:
            raise ConfigError(describe("embed.min_agreement", "a CLAP model", f"{self.model}, an encoder"))

    def close(self) -> None:
        del self._embedder

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        return [self._result(item) for item in items]

    def _result(self, item: Item) -> Item | Reject:
        try:
            waveform = hear(item.fields, self._folder, max_seconds=3600)
            vector, windows = vectors.vector_of(waveform, self._embedder, self.seconds, self.hearing)
        except AudioError as error:
            return Reject(item.id, UNREADABLE, str(error))
        found: dict[str, Any] = {"vector": vectors.encode(vector), "windows": windows}
        if self.min_agreement is not None:
            text = str(item.fields.get("text") or "")
            cosine = float(vectors.unit(self._embedder.text(text)) @ vector) if text else 0.0
            found["agreement"] = round(cosine, 5)
            if cosine < self.min_agreement:
                detail = f"cosine of sound and text: expected {self.min_agreement:g} or more, found {cosine:.3f}."
                return Reject(item.id, DISAGREEMENT, detail)
        return item.adding(**found)


@dataclass
class Distance(Step):
    """Gives ``centroid_distance``, the mean of 1 − cosine to all vectors of a reference collection, by default of the
    items themselves, and ``nearest``: id and cosine of the nearest other item. Writes ``vectors/vectors.npy`` (items,
    dimensions) float16 and ``vectors/index.jsonl``, a line a row."""

    name: ClassVar[str] = "distance"
    whole: ClassVar[bool] = True
    reasons: ClassVar[tuple[str, ...]] = (FAR, NEAR)
    needs: ClassVar[tuple[str, ...]] = ("vector",)
    gives: ClassVar[tuple[str, ...]] = ("centroid_distance", "nearest")
    free: ClassVar[tuple[str, ...]] = ("reference",)

    reference: Path | None = None  # vectors.npy of another corpus, by the same model
    max_distance: float | None = None  # items farther from the reference are rejects
    min_distance: float | None = None  # items nearer to the reference are rejects: only what is new stays

    def digests(self) -> Mapping[str, str]:
        return {"reference": content_hash(self.reference)} if self.reference else {}

    def open(self, folder: Path) -> None:
        self._folder = folder

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        found = np.stack([vectors.decode(item.fields["vector"]) for item in items])  # (items, dimensions)
        units = vectors.unit(found)
        self._write(items, found)
        against = units if self.reference is None else self._read(units.shape[1])
        # The mean of 1 − a·b over all b is 1 − a·(mean of b): one product in place of as many as there are pairs.
        distances = 1 - units @ against.mean(0, dtype=np.float64)
        nearest = _nearest(units)
        return [
            self._result(item, float(distance), items[place].id if place >= 0 else None, cosine)
            for item, distance, (place, cosine) in zip(items, distances, nearest, strict=True)
        ]

    def _result(self, item: Item, distance: float, other: str | None, cosine: float) -> Item | Reject:
        if self.max_distance is not None and distance > self.max_distance:
            return Reject(item.id, FAR, f"expected a distance of at most {self.max_distance:g}, found {distance:.3f}.")
        if self.min_distance is not None and distance < self.min_distance:
            return Reject(
                item.id, NEAR, f"expected a distance of at least {self.min_distance:g}, found {distance:.3f}."
            )
        nearest = None if other is None else [other, round(cosine, 5)]
        return item.adding(centroid_distance=round(distance, 7), nearest=nearest)

    def _read(self, dimensions: int) -> np.ndarray:
        """(vectors, dimensions) of the reference, of length one."""
        try:
            found = np.load(self.reference, mmap_mode="r", allow_pickle=False)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise DataError(describe(f"distance.reference {self.reference}", "a .npy file", f"{error}")) from error
        if found.ndim != 2 or found.shape[1] != dimensions or not len(found):
            expected = f"vectors of {dimensions} dimensions, by the same model"
            raise DataError(describe(f"distance.reference {self.reference}", expected, f"shape {found.shape}"))
        return vectors.unit(np.asarray(found, np.float32))

    def _write(self, items: Sequence[Item], found: np.ndarray) -> None:
        folder = self._folder / "vectors"
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / "vectors.npy") as temporary, open(temporary, "wb") as stream:
            np.save(stream, found.astype(np.float16))
        lines = ({"row": row, "id": item.id, "content": item.fields.get("content")} for row, item in enumerate(items))
        write_lines(folder / "index.jsonl", lines)


def _nearest(units: np.ndarray) -> list[tuple[int, float]]:
    """Place and cosine of the nearest other row of each, of (rows, dimensions); −1 where there is no other."""
    if len(units) < 2:
        return [(-1, 0.0)] * len(units)
    found: list[tuple[int, float]] = []
    for start in range(0, len(units), _BLOCK):
        cosines = units[start : start + _BLOCK] @ units.T  # (block, rows)
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        places = cosines.argmax(1)
        found += zip(places.tolist(), cosines[rows, places].tolist(), strict=True)
    return found


STAGE = (Embed, Distance)
