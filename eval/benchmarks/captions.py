"""Captions of sounds: Clotho (Drossos et al. 2020), AudioCaps (Kim et al. 2019), or any file of sounds and captions.

A sound has several captions: Clotho in columns of one row (``file_name``, ``caption_1`` …), AudioCaps in rows of their
own (``youtube_id``, ``start_time``, ``caption``), others as a list under ``captions``.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from audio_llm.audio import Waveform, decode
from audio_llm.datasets.records import SEPARATORS, SUFFIXES, Cell, Record, each_row
from audio_llm.errors import DataError, describe
from audio_llm.files import atomic_file, content_hash
from eval.benchmarks.base import BenchmarkError, Collection, Item, check_options, without_sound
from eval.benchmarks.sounds import located
from eval.predictions import Prediction
from eval.scorers.captions import check_installed

INSTRUCTION = "Describe in one sentence what is heard in this recording."
NAMES = ("file_name", "audio", "path", "youtube_id")
SECONDS = 10  # of an AudioCaps clip; some name the files by both ends in milliseconds


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
        name, sounds = _sound(row, number)
        captions = [" ".join(text.split()) for text in _captions(row)]
        counts.update("caption that is empty, left away" for text in captions if not text)
        clips.setdefault(name, _Clip(sounds, [])).captions.extend(filter(None, captions))
    for name, clip in clips.items():
        if not clip.captions:
            raise BenchmarkError(describe(f"{data}: sound '{name}'", "a caption", "none that is not empty"))
    if not clips:
        raise BenchmarkError(describe(str(data), "at least one sound", "no rows"))
    counts.update(f"sound with {len(clip.captions)} captions" for clip in clips.values())
    return clips, counts


def _sound(row: Record, number: int) -> tuple[str, list[str | Cell]]:
    """A sound's name in tables, and the names its file may have."""
    key = next((key for key in NAMES if row.values.get(key) not in (None, "")), None)
    if key is None:
        raise row.lacks(*NAMES)
    value = row.values[key]
    if isinstance(value, Cell):
        return row.identity("id", default="") or f"row {number}", [value]
    name = row.identity(key)
    if key != "youtube_id":
        return name, [name]
    start = str(row.values.get("start_time") or "").removesuffix(".0")
    if not start.isdecimal():
        raise DataError(describe(f"{row.where}: 'start_time'", "whole seconds", f"'{start}'"))
    span = f"{name}_{1000 * int(start)}_{1000 * (int(start) + SECONDS)}"
    return f"{name}_{start}", [f"{name}_{start}", name, f"Y{name}", f"Y{name}_{start}", span]


def _captions(row: Record) -> Iterator[str]:
    """Those of one row: a list, numbered columns in order, or one."""
    numbered = {int(match[1]): key for key in row.values if (match := re.fullmatch(r"caption_(\d+)", key))}
    if isinstance(row.values.get("captions"), list):
        yield from row.texts("captions")
    elif numbered:
        yield from (row.text(numbered[place], default="") for place in sorted(numbered))
    elif "caption" in row.values or "captions" in row.values:
        yield row.text("caption", "captions", default="")
    else:
        raise row.lacks("caption", "captions", "caption_1")


BENCHMARK = Captions()
