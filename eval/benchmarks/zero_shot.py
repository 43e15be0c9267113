"""Sound classification without training: ESC-50 (Piczak 2015), UrbanSound8K (Salamon et al. 2014) or any folder of
classes, asked as questions with one right choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from audio_llm.datasets.sounds import Clip, Library, SoundFolder, find, official_folds
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import content_hash
from audio_llm.shards.schema import MOST_CHOICES
from eval.benchmarks.base import Collection, Item, check_options, whole_number
from eval.controls import item_seed
from eval.predictions import Prediction

QUESTION = "Which of these sounds is heard in the recording?"
DRAWN = 10  # of more classes than letters: the right one and nine others


class ZeroShot:
    """One question a clip. Options: ``folds``, official folds such as ``1,2`` (default: all); ``choices``, how many
    (default: all classes, or 10 where there are more than 26); ``question``, other words; ``seed``.

    The choices of a clip, and their order, depend on the seed and the clip's name alone.
    """

    name = "zero_shot"
    title = "Zero-shot sound classification"
    scorers = ("option-resolution", "letter", "mmau-official-extracted")
    groups = ("label", "fold")

    def open(self, data: Path, **options: str) -> Collection:
        """Items of a sound folder. Raises :class:`AudioError` where it is none, :class:`ConfigError` for its folds."""
        check_options(self.name, options, ("folds", "choices", "question", "seed"))
        library = find(data)
        clips = chosen_clips(library, options.get("folds"))
        labels = library.labels
        if len(labels) < 2:
            raise ConfigError(describe(str(data), "at least two classes", f"{len(labels)}"))
        count, seed = _count(options, len(labels)), whole_number(options, "seed", 0)
        question = options.get("question", QUESTION)
        items = [item_of(clip, labels, count, question, seed, library.dataset) for clip in clips]
        errors = {
            clip.name: describe(str(clip.path), "an audio file", "no such file")
            for clip in clips
            if not Path(str(clip.path)).is_file()
        }
        counts = {"audio file missing": len(errors)} if errors else {}
        tables = [
            path for path in (data / "meta" / "esc50.csv", data / "metadata" / "UrbanSound8K.csv") if path.is_file()
        ]
        digests = [library.fingerprint, *(content_hash(path) for path in tables)]
        folder = SoundFolder(clips, library.dataset)
        return Collection(items, errors, counts, digests, folder.load_waveform)

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        raise ConfigError(
            "benchmark 'zero_shot': there is nobody to submit its answers to; predictions.jsonl has them."
        )


def chosen_clips(library: Library, folds: str | None) -> list[Clip]:
    """The clips of the official `folds`, in order; all clips without. A shuffled corpus is refused either way."""
    if folds is None and library.dataset not in ("esc50", "urbansound8k"):
        return library.clips
    official = official_folds(library)
    if folds is None:
        return [clip for clips in official.values() for clip in clips]
    wanted = [fold.strip() for fold in folds.split(",")]
    for fold in wanted:
        if fold not in official:
            raise ConfigError(describe("option folds", ", ".join(official), f"'{fold}'{nearest(fold, official)}"))
    if len(set(wanted)) < len(wanted):
        raise ConfigError(describe("option folds", "each fold once", f"'{folds}'"))
    return [clip for fold in wanted for clip in official[fold]]


def item_of(clip: Clip, labels: Sequence[str], count: int, question: str, seed: int, dataset: str) -> Item:
    """One clip as a question with `count` choices."""
    rng = np.random.default_rng(item_seed(seed, "zero_shot", clip.name))
    others = [label for label in labels if label != clip.label]
    drawn = [others[int(place)] for place in rng.permutation(len(others))[: count - 1]]
    choices = [clip.label, *drawn]
    return Item(
        id=clip.name,
        question=question,
        choices=[choices[int(place)] for place in rng.permutation(count)],
        gold=clip.label,
        question_type="sound classification",
        format=dataset,
        clip=clip.recording,
        meta={"label": clip.label, **({} if clip.fold is None else {"fold": clip.fold})},
    )


def _count(options: dict[str, str], classes: int) -> int:
    count = whole_number(options, "choices", classes if classes <= MOST_CHOICES else DRAWN)
    if not 2 <= count <= min(MOST_CHOICES, classes):
        raise ConfigError(describe("option choices", f"2 to {min(MOST_CHOICES, classes)}", f"{count}"))
    return count


BENCHMARK = ZeroShot()
