"""SpatialSoundQA (Zheng et al. 2024, "BAT: Learning to Reason about Spatial Sounds with Large Language Models").

Records name one or two dry clips and room responses; what is heard is rendered when it is asked for, as the published
code renders it (:mod:`audio_llm.shards.rendering`). Peaks above full scale are legal there and stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from audio_llm.audio import LAYOUT_CHANNELS
from audio_llm.datasets.records import Record, read_records
from audio_llm.datasets.spatial_sound_qa import RATES, Heard, question_files, read_question, without_training
from audio_llm.errors import ConfigError, describe
from audio_llm.files import content_hash, write_atomically
from audio_llm.shards.rendering import SAMPLE_RATE, Rendering, check_rate
from eval.benchmarks.base import BenchmarkError, Collection, Item, check_options, one_of, refuse_doubles, whole_number
from eval.predictions import Prediction
from eval.scorers.open_answers import SPATIAL_SOUND_QA

# The letter a type has in the paper's tables.
LETTERS = {"CLASSIFICATION": "A", "DOA": "B", "MIXUP_SINGLE_CLASSIFICATION": "C", "MIXUP_SINGLE_DOA": "D"} | {
    name: "E" for name in SPATIAL_SOUND_QA if name.startswith("MIXUP_") and "SINGLE" not in name
}
OPTIONS = ("audio", "responses", "layout", "sample_rate", "missing")
NO_ANSWER = "(no answer)"  # the published script cannot read a line whose answer is empty


class SpatialSoundQA:
    """``{"data": […]}`` files, JSON lines or Parquet; a folder stands for all of its files, in order of name, but those
    of training questions (``train.json``) that lie beside others, as in the published folders; they are counted.

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
        files, training = without_training(question_files(data), data)
        root = data if data.is_dir() else data.parent
        audio, responses = Path(options.get("audio", root)), Path(options.get("responses", root / "responses"))
        rendering = rendering_of(options)
        check_rate("option sample_rate", rendering.sample_rate, responses)
        skip = one_of(options, "missing", ("list", "skip")) == "skip"
        items: list[Item] = []
        scenes: list[Heard] = []
        errors: dict[str, str] = {}
        counts = Counter({"file of training questions left out": training} if training else {})
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
        if len(errors) == len(items):
            found = f"{sum(counts.values())} questions, none of them with its sound" if counts else "none"
            if first := next(iter(errors.values()), ""):
                found += f" (the first one's {first})"
            cure = "Name the folders: --option audio=FOLDER --option responses=FOLDER."
            raise BenchmarkError(describe(str(data), "questions", found, cure))
        refuse_doubles(items, str(data))
        digests = [content_hash(path) for path in files]
        return Collection(items, errors, dict(counts), digests, lambda index: scenes[index].render(rendering))

    def submission(self, rows: Sequence[Prediction], out: Path, **options: str) -> list[Path]:
        """``<file>_pred`` and ``<file>_gt``, a line ``{question_type}-{question_id}<TAB>answer`` each, in one order, as
        SLAM-LLM's decoding logs have it and the published ``calculate_map.py`` reads it. A record without a question_id
        has its own id. An empty answer is written as ``(no answer)``; what could not be asked has no line."""
        check_options(self.name, options, ())
        groups: dict[str, list[Prediction]] = {}
        for row in (row for row in rows if not row.error):
            groups.setdefault(str(row.meta.get("file", "questions")), []).append(row)
        written = []
        for name, group in groups.items():
            said = [_line(_key(row), row.reply().answer) for row in group]
            for suffix, lines in (("pred", said), ("gt", [_line(_key(row), row.gold) for row in group])):
                path = out / f"{name.replace('/', '-')}_{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, "".join(lines))
                written.append(path)
        return written


def rendering_of(options: dict[str, str]) -> Rendering:
    """The published rendering with the layout and rate that the responses have."""
    rate = whole_number(options, "sample_rate", SAMPLE_RATE)
    if rate not in RATES:
        raise ConfigError(describe("option sample_rate", f"{RATES[0]} to {RATES[-1]} Hz", f"{rate}"))
    layout = one_of(options, "layout", ("binaural", *(name for name in LAYOUT_CHANNELS if name != "binaural")))
    return Rendering(sample_rate=rate, layout=layout, silent="keep")


def read_item(record: Record, identity: str, audio: Path, responses: Path) -> tuple[Item, Heard]:
    """One record as an item and as what is heard. `question_id` restarts per type, so ids are file and row."""
    asked = read_question(record)
    item = Item(
        id=identity,
        question=asked.question,
        choices=[],
        gold=asked.answer,
        question_type=asked.question_type,
        format="spatialsoundqa",
        clip=asked.recordings,
        meta={
            "file": identity.rpartition("/")[0],
            "paper_type": LETTERS[asked.question_type],
            "sources": [{"clip": clip, "response": room} for clip, room in zip(asked.clips, asked.rooms, strict=True)],
            "question_id": record.values.get("question_id"),
        },
    )
    return item, asked.heard(audio, responses)


def _key(row: Prediction) -> str:
    number = row.meta.get("question_id")
    return row.id if number is None else f"{row.question_type}-{number}"


def _line(identity: str, text: str) -> str:
    return f"{identity}\t{' '.join(text.split()) or NO_ANSWER}\n"


BENCHMARK = SpatialSoundQA()
