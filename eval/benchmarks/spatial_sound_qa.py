"""SpatialSoundQA (Zheng et al. 2024, "BAT: Learning to Reason about Spatial Sounds with Large Language Models").

Records name one or two dry clips and room responses; what is heard is rendered when it is asked for, as the published
code renders it (:mod:`audio_llm.datasets.reverberation`). Peaks above full scale are legal there and stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from audio_llm.audio import LAYOUT_CHANNELS, Waveform, decode
from audio_llm.datasets.records import SUFFIXES, Record, read_records
from audio_llm.datasets.reverberation import SAMPLE_RATE, Rendering, Response, dry, hear, load_response
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import content_hash, write_atomically
from eval.benchmarks.base import BenchmarkError, Collection, Item, check_options, one_of, refuse_doubles, whole_number
from eval.predictions import Prediction
from eval.scorers.open_answers import SPATIAL_SOUND_QA

# The letter a type has in the paper's tables.
LETTERS = {"CLASSIFICATION": "A", "DOA": "B", "MIXUP_SINGLE_CLASSIFICATION": "C", "MIXUP_SINGLE_DOA": "D"} | {
    name: "E" for name in SPATIAL_SOUND_QA if name.startswith("MIXUP_") and "SINGLE" not in name
}
OPTIONS = ("audio", "responses", "layout", "sample_rate", "missing")
PLACES = ("audio_id", "reverb_id", "audio_id2", "reverb_id2")
RATES = range(4_000, 192_001)  # in Hz, as of simulated rooms
NO_ANSWER = "(no answer)"  # the published script cannot read a line whose answer is empty


@dataclass(frozen=True)
class Heard:
    """The dry clips of an item and the response each is heard through."""

    clips: tuple[Path, ...]
    responses: tuple[Path, ...]

    def missing(self) -> str:
        """Which file is not there; "" where all are."""
        for what, paths in (("dry clip", self.clips), ("room response", self.responses)):
            for path in paths:
                if not path.is_file():
                    return describe(f"{what} {path}", "a file", "none")
        return ""

    def render(self, rendering: Rendering) -> Waveform:
        """The scene. Raises :class:`AudioError` naming the file that cannot be used."""
        clips = [dry(decode(path), rendering, str(path)) for path in self.clips]
        names = [f"{path.parent.name}/{path.name}" for path in self.responses]
        found = [
            load_response(Response(name, str(path), 0.0, 0.0, 0.0), rendering.layout)
            for name, path in zip(names, self.responses, strict=True)
        ]
        return Waveform(hear(clips, found, rendering), rendering.sample_rate, rendering.layout)


class SpatialSoundQA:
    """``{"data": […]}`` files, JSON lines or Parquet; a folder stands for all of its files, in order of name.

    Options: ``audio``, the folder of the dry clips; ``responses``, the folder that holds ``<layout>/<scene>/<n>.npy``
    (default: ``responses`` beside the questions); ``layout`` (binaural) and ``sample_rate`` (32000) of the responses;
    ``missing=skip`` leaves questions without their sound out, with a count, instead of listing them as errors.
    """

    name = "spatial_sound_qa"
    title = "SpatialSoundQA"
    scorers = ("spatial-sound-qa", "label-similarity")
    groups = ("question_type", "paper_type", "file")

    def open(self, data: Path, **options: str) -> Collection:
        """Items of `data`. Raises :class:`BenchmarkError` or :class:`DataError` naming file, row and key."""
        check_options(self.name, options, OPTIONS)
        files = question_files(data)
        root = data if data.is_dir() else data.parent
        audio, responses = Path(options.get("audio", root)), Path(options.get("responses", root / "responses"))
        rendering = rendering_of(options)
        skip = one_of(options, "missing", ("list", "skip")) == "skip"
        items: list[Item] = []
        scenes: list[Heard] = []
        errors: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for path in files:
            name = path.relative_to(root).with_suffix("").as_posix()
            for number, record in enumerate(read_records(path)):
                item, heard = read_item(record, f"{name}/{number}", audio, responses / rendering.layout)
                if missing := heard.missing():
                    counts["dry clip missing" if missing.startswith("dry") else "room response missing"] += 1
                    if skip:
                        continue
                    errors[item.id] = missing
                items.append(item)
                scenes.append(heard)
        if not items:
            found = f"{sum(counts.values())} questions, none of them with its sound" if counts else "none"
            raise BenchmarkError(describe(str(data), "questions", found, "Name the folders: audio=…, responses=…."))
        refuse_doubles(items, str(data))
        digests = [content_hash(path) for path in files]
        return Collection(items, errors, dict(counts), digests, lambda index: scenes[index].render(rendering))

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """``<file>_pred`` and ``<file>_gt``, a line ``id<TAB>answer`` each: what the published ``calculate_map.py``
        and SLAM-LLM's decoding logs hold. An empty answer is written as ``(no answer)``; a question that could not be
        asked has no line."""
        check_options(self.name, options, ())
        groups: dict[str, list[Prediction]] = {}
        for row in (row for row in rows if not row.error):
            groups.setdefault(str(row.meta.get("file", "questions")), []).append(row)
        written = []
        for name, group in groups.items():
            said = [_line(row.id, row.reply().answer) for row in group]
            for suffix, lines in (("pred", said), ("gt", [_line(row.id, row.gold) for row in group])):
                path = out / f"{name.replace('/', '-')}_{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, "".join(lines))
                written.append(path)
        return written


def question_files(data: Path) -> list[Path]:
    """The file, or the files of a folder that may hold questions, sorted. Raises :class:`BenchmarkError`."""
    if data.is_file():
        return [data]
    files = sorted(path for path in data.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        found = "none" if data.is_dir() else "no such path"
        raise BenchmarkError(describe(str(data), f"a file or a folder of files {', '.join(SUFFIXES)}", found))
    return files


def rendering_of(options: dict[str, str]) -> Rendering:
    """The published rendering with the layout and rate that the responses have."""
    rate = whole_number(options, "sample_rate", SAMPLE_RATE)
    if rate not in RATES:
        raise ConfigError(describe("option sample_rate", f"{RATES[0]} to {RATES[-1]} Hz", f"{rate}"))
    layout = one_of(options, "layout", ("binaural", *(name for name in LAYOUT_CHANNELS if name != "binaural")))
    return Rendering(sample_rate=rate, layout=layout, silent="keep")


def read_item(record: Record, identity: str, audio: Path, responses: Path) -> tuple[Item, Heard]:
    """One record as an item and as what is heard. `question_id` restarts per type, so ids are file and row."""
    kind = record.text("question_type")
    if kind.upper() not in SPATIAL_SOUND_QA:
        found = f"'{kind}'{nearest(kind.upper(), SPATIAL_SOUND_QA)}"
        raise BenchmarkError(describe(f"{record.where}: 'question_type'", "one of the nine types", found))
    clips, rooms = [record.text("audio_id")], [record.text("reverb_id")]
    second = [record.text(key, default="") for key in ("audio_id2", "reverb_id2")]
    if all(second):
        clips.append(second[0])
        rooms.append(second[1])
    elif any(second):
        found = "one of them"
        raise BenchmarkError(describe(record.where, "both 'audio_id2' and 'reverb_id2', or neither", found))
    for key, name in zip(
        ("audio_id", "reverb_id", "audio_id2", "reverb_id2"), [clips[0], rooms[0], *second], strict=True
    ):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BenchmarkError(describe(f"{record.where}: '{key}'", "a path inside its folder", f"'{name}'"))
    item = Item(
        id=identity,
        question=record.text("question"),
        choices=[],
        gold=record.text("answer"),
        question_type=kind.upper(),
        format="spatialsoundqa",
        clip="+".join(sorted(clips)),
        meta={
            "file": identity.rpartition("/")[0],
            "paper_type": LETTERS[kind.upper()],
            "sources": [{"clip": clip, "response": room} for clip, room in zip(clips, rooms, strict=True)],
            "question_id": record.values.get("question_id"),
        },
    )
    return item, Heard(tuple(_sound(audio / clip) for clip in clips), tuple(responses / room for room in rooms))


def _sound(path: Path) -> Path:
    """Published clips are named without ``.wav``; other corpora name them with their ending."""
    return path if path.is_file() else path.with_name(f"{path.name}.wav")


def _line(identity: str, text: str) -> str:
    return f"{identity}\t{' '.join(text.split()) or NO_ANSWER}\n"


BENCHMARK = SpatialSoundQA()
