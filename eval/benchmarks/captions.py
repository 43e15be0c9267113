"""Captions of sounds: Clotho's and AudioCaps' own files, or any that ``audio_llm.datasets.captions`` reads."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from audio_llm.audio import Waveform, decode
from audio_llm.datasets.captions import INSTRUCTION, captioned
from audio_llm.datasets.records import SEPARATORS, SUFFIXES, Cell, each_row, located
from audio_llm.errors import describe
from audio_llm.files import atomic_file, content_hash
from eval.benchmarks.base import BenchmarkError, Collection, Item, check_options, without_sound
from eval.predictions import Prediction
from eval.scorers.captions import check_installed


@dataclass
class _Clip:
    sounds: list[str | Cell]  # the names it may have
    captions: list[str]


class Captions:
    """One question a sound. Options: ``audio``, the folder of the sounds (default: where the file lies);
    ``instruction``, other words to ask in."""

    name = "captions"
    title = "Captions"
    scorers = ("captions", "meteor-exact-stem")
    groups = ()

    def open(self, data: Path, **options: str) -> Collection:
        """The sounds of a CSV, TSV, JSON, JSON lines or Parquet file. Raises children of ``AudioLLMError`` naming file,
        row and key, and :class:`PrerequisiteError` where the captions could not be scored."""
        check_options(self.name, options, ("audio", "instruction"))
        check_installed()
        if not data.is_file():
            there = ", ".join(sorted(path.name for path in data.glob("*.csv"))[:6]) if data.is_dir() else ""
            cure = f"Name the file: {there}." if there else ""
            expected = f"a file of captions ({', '.join((*SEPARATORS, *SUFFIXES))})"
            raise BenchmarkError(describe(str(data), expected, "a folder" if data.is_dir() else "no such file", cure))
        folder = Path(options["audio"]) if "audio" in options else data.parent
        if not folder.is_dir():
            raise BenchmarkError(describe(f"option audio={folder}", "a folder of sounds", "none"))
        clips, counts = _clips(data)
        items = [self._item(name, clip, options.get("instruction", INSTRUCTION)) for name, clip in clips.items()]
        places = iter(located([name for clip in clips.values() for name in clip.sounds], folder))
        found = [[next(places) for _ in clip.sounds] for clip in clips.values()]
        sounds = [next((sound for sound in there if sound), None) for there in found]
        missing = {
            item.id: " or ".join(map(str, clip.sounds))
            for item, clip, sound in zip(items, clips.values(), sounds, strict=True)
            if sound is None
        }
        errors = without_sound(missing, folder, data, len(items), counts)

        def load(index: int) -> Waveform:
            sound = sounds[index]
            source = sound.data() if isinstance(sound, Cell) else sound or folder / ""
            return decode(source, name=f"item '{items[index].id}'")

        return Collection(items, errors, dict(counts), [content_hash(data)], load)

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """``captions.csv`` as DCASE's captioning tasks asked for it: ``file_name,caption_predicted``."""
        check_options(self.name, options, ())
        path = out / "captions.csv"
        with atomic_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file_name", "caption_predicted"])
            table.writerows([row.id, row.reply().said] for row in rows if not row.error)
        return [path]

    def _item(self, name: str, clip: _Clip, question: str) -> Item:
        meta = {"references": clip.captions}
        return Item(name, question, [], clip.captions[0], "caption", self.name, name, meta)


def _clips(data: Path) -> tuple[dict[str, _Clip], Counter[str]]:
    """The sounds by name, in first-seen order, each with all captions that the file has of it; and what was odd."""
    clips: dict[str, _Clip] = {}
    counts = Counter[str]()
    for number, row in enumerate(each_row(data)):
        found = captioned(row, number)
        counts.update("caption that is empty, left away" for text in found.captions if not text)
        clips.setdefault(found.name, _Clip(found.sounds, [])).captions.extend(filter(None, found.captions))
    for name, clip in clips.items():
        if not clip.captions:
            raise BenchmarkError(describe(f"{data}: sound '{name}'", "a caption", "none that is not empty"))
    if not clips:
        raise BenchmarkError(describe(str(data), "at least one sound", "no rows"))
    counts.update(f"sound with {len(clip.captions)} captions" for clip in clips.values())
    return clips, counts


BENCHMARK = Captions()
