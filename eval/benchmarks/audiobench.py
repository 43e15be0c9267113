"""AudioBench's audio-scene, captioning and music sets (Wang et al. 2024, "AudioBench: A Universal Benchmark for Audio
Large Language Models").

Rows have ``context`` (the sound), ``instruction`` and ``answer``, as the published Parquet files do; JSON and JSON
lines name sound files instead (``audio`` is understood too, and ``reference`` for the answer).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_llm.audio import Waveform, decode
from audio_llm.datasets.captions import INSTRUCTION
from audio_llm.datasets.folders import files_below
from audio_llm.datasets.records import SUFFIXES, Cell, Record, read_records
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import content_hash, within, write_json
from audio_llm.language.replies import read_key, strip_letters
from eval.benchmarks.base import BenchmarkError, Collection, Item, check_options, refuse_doubles
from eval.predictions import Prediction

# What each set asks for. The judge is graded but for music, where an answer is right or wrong.
SETS = {
    "clotho_aqa": "question",
    "audiocaps_qa": "question",
    "wavcaps_qa": "question",
    "audiocaps": "caption",
    "wavcaps": "caption",
    "muchomusic": "choice",
}
SOUND, ANSWER = ("context", "audio"), ("answer", "reference")
_OPTION_LINE = re.compile(r"\s*\(?[A-Z][).]\s*\S.*")


class AudioBench:
    """One of the sets. Options: ``set`` (default: the one that the path names), ``instruction``, other words for
    captions (the published ones are drawn from five at random, so that no two runs ask alike)."""

    name = "audiobench"
    title = "AudioBench"
    scorers = ("audiobench", "judge", "judge-binary", "string-contains", "string-exact", "meteor-exact-stem")
    groups = ("set",)

    def open(self, data: Path, **options: str) -> Collection:
        """Items of a file or of a folder of files. Raises :class:`DataError` naming file, row and key."""
        check_options(self.name, options, ("set", "instruction"))
        name = _set_of(data, options.get("set"))
        files = [data] if data.is_file() else files_below(data, endings=SUFFIXES)
        if not files:
            raise BenchmarkError(describe(str(data), f"a file or a folder of files {', '.join(SUFFIXES)}", "none"))
        items: list[Item] = []
        sounds: list[Path | Cell] = []
        errors: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for path in files:
            place = path.stem if path == data else path.relative_to(data).with_suffix("").as_posix()
            for number, record in enumerate(read_records(path)):
                sound = _sound_of(record, path.parent)
                item, repaired = read_item(record, name, f"{place}/{number}", options.get("instruction", INSTRUCTION))
                if isinstance(sound, Path) and not sound.is_file():
                    errors[item.id] = describe(str(sound), "an audio file", "no such file")
                    counts["audio file missing"] += 1
                elif not item.gold:
                    errors[item.id] = f"{record.where}: {repaired}"
                    counts["answer is none of the options"] += 1
                elif repaired:
                    counts[repaired] += 1
                items.append(item)
                sounds.append(sound)
        refuse_doubles(items, str(data))
        digests = [content_hash(path) for path in files]
        return Collection(items, errors, dict(counts), digests, lambda index: _hear(sounds[index], items[index].id))

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """``<set>.json``: what AudioBench's scoring scripts read, the answer under ``model_prediction``."""
        check_options(self.name, options, ())
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if not row.error:
                entry = {"instruction": row.question, "reference": row.gold, "model_prediction": row.reply().answer}
                groups.setdefault(str(row.meta.get("set", "audiobench")), []).append(entry)
        paths = [out / f"{name}.json" for name in groups]
        for path, entries in zip(paths, groups.values(), strict=True):
            write_json(path, entries)
        return paths


def read_item(record: Record, name: str, identity: str, caption: str) -> tuple[Item, str]:
    """One row as an item, and what had to be repaired. Lettered options inside an instruction become choices."""
    kind = SETS[name]
    question = caption if kind == "caption" else _text(record, "instruction", "question")
    gold, further = _text(record, *ANSWER), record.values.get("references")
    choices: tuple[str, ...] = ()
    repaired = ""
    if kind == "choice":
        question, options = _options(record, question)
        choices = strip_letters(options)
        index, repaired = read_key(gold, choices)
        gold = "" if index is None else choices[index]
    meta: dict[str, Any] = {"set": name}
    if isinstance(further, list) and all(isinstance(text, str) for text in further):
        meta["references"] = list(further)
    item = Item(
        id=identity,
        question=question,
        choices=list(choices),
        gold=gold,
        question_type=kind,
        format="audiobench",
        clip=_clip(record, identity),
        meta=meta,
    )
    return item, repaired


def _set_of(data: Path, name: str | None) -> str:
    """The set that is asked for, or the one whose name the path holds: the longest, for names hold each other."""
    if not data.exists():
        raise BenchmarkError(describe(str(data), "a file or a folder", "no such path"))
    if name is None:
        flat = re.sub(r"[^a-z]", "", "/".join(data.resolve().parts[-2:]).lower())
        name = max((key for key in SETS if key.replace("_", "") in flat), key=len, default=None)
        if name is None:
            raise ConfigError(
                describe(f"{data}", "a path that names its set", "none", "Say set=clotho_aqa, or another.")
            )
    if name not in SETS:
        raise ConfigError(describe("option set", ", ".join(SETS), f"'{name}'{nearest(name, SETS)}"))
    return name


def _text(record: Record, *keys: str) -> str:
    """A text, which some of the sets wrap as ``{"text": …}``."""
    for key in keys:
        value = record.values.get(key)
        if isinstance(value, Mapping) and isinstance(value.get("text"), str):
            return str(value["text"]).strip()
    return record.text(*keys).strip()


def _options(record: Record, question: str) -> tuple[str, tuple[str, ...]]:
    """The question and its options: those under ``choices``, else the lettered lines that end the instruction."""
    if record.values.get("choices") is not None:
        return question, tuple(record.texts("choices"))
    lines = question.splitlines()
    start = next((n for n, line in enumerate(lines) if _OPTION_LINE.fullmatch(line)), len(lines))
    options = tuple(line.strip() for line in lines[start:] if line.strip())
    if len(options) < 2 or strip_letters(options) == options:
        raise BenchmarkError(describe(record.where, "'choices', or lettered lines at the end", "neither"))
    return "\n".join(lines[:start]).strip(), options


def _sound_of(record: Record, folder: Path) -> Path | Cell:
    for key in SOUND:
        value = record.values.get(key)
        if isinstance(value, Cell):
            return value
        if isinstance(value, str) and value:
            return within(folder, value)
    raise record.lacks(*SOUND)


def _hear(sound: Path | Cell, name: str) -> Waveform:
    if isinstance(sound, Path):
        return decode(sound)
    return decode(sound.data(), name=f"audio of '{name}'")


def _clip(record: Record, identity: str) -> str:
    """A file's name; of sound inside a Parquet file, the row: its bytes are not read to tell clips apart."""
    value = next((record.values[key] for key in SOUND if isinstance(record.values.get(key), str)), None)
    return hashlib.sha256(value.encode()).hexdigest()[:16] if value else identity


BENCHMARK = AudioBench()
