"""Tags of samples by how much their sound contributes: what models answer with it and in silence, and what is a copy.

Every model is asked by :mod:`eval.runner`, so that answers are rows of predictions as of any run; what they are worth
is said by the first scorer of shard folders. Of a question with choices the value is 1 or 0, so that its mean over K
tries is the share that is right.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from audio_llm.answering.base import Engine
from audio_llm.audio import sha256
from audio_llm.errors import AudioLLMError
from audio_llm.files import append_line, read_lines
from audio_llm.inspection.fingerprints import Fingerprint, fingerprint, pairs
from audio_llm.language.replies import normalise
from audio_llm.shards.reader import ShardDataset
from eval import predictions, runner
from eval.benchmarks.base import Collection
from eval.figures.scores import score_rows
from eval.predictions import Prediction
from eval.scorers.base import Scorer

PRINTS = "sounds.jsonl"  # fingerprints by the SHA-256 of the samples of a sound
SILENCE = "silence"  # the control
# Pass rates up to which a question is called so; from none and from all right answers GRPO learns nothing.
BANDS = ((0.0, "never"), (1 / 3, "hard"), (2 / 3, "medium"), (np.nextafter(1.0, 0.0), "easy"), (math.inf, "always"))

Row = dict[str, float | str]


@dataclass
class Asked:
    """The questions that one model is asked, and where its answers are kept."""

    questions: Collection
    settings: runner.EvalSettings
    out: Path
    manifest: dict[str, Any]

    def answers(
        self, engine: Callable[[], Engine], *, overwrite: bool, max_errors: float | None, progress: bool
    ) -> list[Prediction]:
        """All answers; `engine` is opened where some are missing. Raises what :func:`eval.runner.evaluate` does."""
        if overwrite or not runner.is_complete(self.out, self.manifest):
            if not overwrite:  # now: loading a model takes long
                runner.check_free(self.out, self.manifest)
            opened = engine()
            self.manifest["engine"] = opened.name
            try:
                if overwrite:
                    runner.clean(self.out)
                runner.evaluate(
                    opened,
                    self.questions,
                    self.settings,
                    self.out,
                    self.manifest,
                    max_errors=max_errors,
                    progress=progress,
                )
            finally:
                opened.close()
        return predictions.read(self.out)


def contributions(rows: Sequence[Prediction], scorer: Scorer) -> dict[str, tuple[float, float]]:
    """Of every sample whose tries have all been answered, the mean value with its sound and in silence."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    failed = {row.id for row in rows if row.error}
    for one in score_rows(rows, scorer):
        if one.score is not None and one.row.id not in failed and one.row.control in ("", SILENCE):
            values[one.row.id][one.row.control].append(one.score.value)
    return {
        name: (float(np.mean(found[""])), float(np.mean(found[SILENCE])))
        for name, found in values.items()
        if found[""] and found[SILENCE]
    }


def band(rate: float) -> str:
    """What a share of right answers is called: never 0, hard to 1/3, medium to 2/3, easy below 1, always 1."""
    return next(name for limit, name in BANDS if rate <= limit)


def joined(ids: Sequence[str], found: Mapping[str, Mapping[str, tuple[float, float]]], seed: int) -> dict[str, Row]:
    """Tags of all samples `ids` from what each model's answers are worth, by its name.

    ``with_sound``, ``in_silence`` and their difference ``gain`` are means over the models, and ``band`` is that of the
    first (:func:`band`); with ``@NAME`` behind it each is that of one model, where there are several. ``rank`` orders
    the samples that every model was asked: the share of them whose sound contributes more, so that ``{max: 0.5}`` is
    half of them. ``draw`` is another order, by the seed alone, of all samples.
    """
    rows: dict[str, Row] = {key: {} for key in ids}
    asked = [key for key in ids if all(key in values for values in found.values())]
    for key in asked:
        loud, quiet = (float(np.mean([values[key][side] for values in found.values()])) for side in (0, 1))
        rows[key] = {"with_sound": _rounded(loud), "in_silence": _rounded(quiet), "gain": _rounded(loud - quiet)}
        rows[key]["band"] = band(loud)
    for name, values in found.items() if len(found) > 1 else ():
        for key in ids:
            if key in values:
                loud, quiet = values[key]
                each = {"with_sound": loud, "in_silence": quiet, "gain": loud - quiet}
                rows[key] |= {f"{tag}@{name}": _rounded(value) for tag, value in each.items()}
    gains = {key: float(rows[key]["gain"]) for key in asked}
    for tag, order in (
        ("rank", sorted(asked, key=lambda key: (-gains[key], _drawn(seed, "rank", key)))),
        ("draw", sorted(ids, key=lambda key: _drawn(seed, "draw", key))),
    ):
        for place, key in enumerate(order):
            rows[key][tag] = _rounded((place + 0.5) / len(order), 6)
    return rows


def _rounded(value: float, digits: int = 4) -> float:
    return round(value, digits) + 0.0  # no minus zero


def _drawn(seed: int, what: str, key: str) -> str:
    return hashlib.sha256(f"{seed}:{what}:{key}".encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- copies


def copies(dataset: ShardDataset, out: Path, *, progress: bool = True) -> dict[str, Row]:
    """Of every sample, ``sound_copies``: how many samples before it have the same sounds, or copies of them at another
    level, coded, shifted, cropped or with noise; and ``copies``: how many of these ask the same in the same words.

    Fingerprints are kept in `out`, so that a stopped run goes on. A sample whose sound cannot be read has neither tag.
    """
    known = {str(line["sound"]): str(line["print"]) for line in read_lines(out / PRINTS) if "print" in line}
    sounds: dict[int, list[str]] = {}
    for place in tqdm(range(len(dataset)), desc="sounds", unit=" samples", disable=not progress, leave=False):
        try:
            sounds[place] = _sounds_of(dataset, place, known, out)
        except AudioLLMError:
            continue
    names = sorted({name for each in sounds.values() for name in each})
    group = dict(zip(names, _groups([Fingerprint.decode(known[name]) for name in names]), strict=True))
    seen: dict[Any, int] = defaultdict(int)
    rows: dict[str, Row] = {}
    for place, each in sounds.items():
        sample, heard = dataset.load_sample(place), tuple(group[name] for name in each)
        words = (normalise(sample.question or ""), tuple(sorted(map(normalise, sample.choices))))
        rows[sample.id] = {"copies": seen[heard, words], "sound_copies": seen[heard]}
        seen[heard, words] += 1
        seen[heard] += 1
    return rows


def _sounds_of(dataset: ShardDataset, place: int, known: dict[str, str], out: Path) -> list[str]:
    """The digests of a sample's sounds; those that are new are put into `known`, and into its file."""
    told = [info.sha256 for info in dataset.load_sample(place).audio]
    if told and all(name in known for name in told):
        return [name for name in told if name]
    names = []
    for waveform in dataset.load_waveforms(place):
        names.append(name := sha256(waveform))
        if name not in known:
            known[name] = fingerprint(waveform).encode()
            append_line(out / PRINTS, {"sound": name, "print": known[name]})
    return names


def _groups(prints: Sequence[Fingerprint]) -> Iterable[int]:
    """The number of the group of each: those that are copies of each other, also by chains."""
    alike = [(one, two) for one, two, _ in pairs(prints)]
    first, second = zip(*alike, strict=True) if alike else ((), ())
    links = coo_array((np.ones(len(alike)), (first, second)), shape=(len(prints), len(prints)))
    return connected_components(links, directed=False)[1].tolist()
