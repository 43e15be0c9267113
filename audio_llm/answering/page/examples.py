"""Clips with questions for the page's visitors, from any folder of shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from audio_llm.answering.page.cards import Scene
from audio_llm.shards.reader import ShardDataset

MOST = 24  # rows that a visitor can look over


@dataclass(frozen=True)
class Example:
    """A sound file with a question about it, and what it really holds."""

    file: Path
    question: str
    choices: tuple[str, ...]
    scene: Scene


def read_examples(shards: Path, folder: Path) -> list[Example]:
    """The first ``MOST`` samples of `shards` that ask about one sound, their files written to `folder`.

    Raises :class:`audio_llm.errors.ShardError` for a folder without shards.
    """
    dataset = ShardDataset(shards)
    found: list[Example] = []
    try:
        for place in range(len(dataset)):
            sample = dataset.load_sample(place)
            sounds = dataset.load_audio_bytes(place)
            if len(sounds) != 1 or not sample.question:
                continue
            file = folder / f"example-{len(found) + 1:02d}.flac"
            file.write_bytes(sounds[0])
            scene = Scene(tuple(sample.events), sample.answer or "", str(sample.meta.get("caption") or ""))
            found.append(Example(file, sample.question, tuple(sample.choices), scene))
            if len(found) == MOST:
                break
    finally:
        dataset.close()
    return found
