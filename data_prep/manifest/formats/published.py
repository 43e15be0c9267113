"""Published sets of questions whose readers the benchmarks use as well: DCASE 2025 task 5, MMAU, SpatialSoundQA."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_llm.audio import LAYOUT_CHANNELS, Waveform, limit_peak
from audio_llm.datasets import dcase_aqa, mmau, spatial_sound_qa
from audio_llm.datasets.records import Record
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, describe
from audio_llm.shards.rendering import SAMPLE_RATE, Recipe, Rendering, check_rate
from data_prep.manifest.formats.base import Format, Place
from data_prep.manifest.formats.tables import rows_of
from data_prep.manifest.rows import Reject
from data_prep.manifest.sounds import File, TableCell


def _dcase(place: Place) -> Iterator[Record | Reject]:
    """One JSON file a question, or all of them in one file; letters before options are taken away."""
    top = place.path if place.path.is_dir() else place.path.parent
    audio = place.options.get("audio")
    for path in dcase_aqa.question_files(place.path):
        for row in rows_of(path, top):
            if isinstance(row, Reject):
                yield row
                continue
            try:
                asked = dcase_aqa.read_question(row, path, top, audio, Counter())
            except AudioLLMError as error:
                yield Reject.of(row.where, error)
                continue
            said = str(row.values.get("answer") or "")
            sound: Any = asked.audio
            yield Record(
                {
                    **row.values,
                    "audio": _file(sound, top) if isinstance(sound, Path) else TableCell(sound, place.root),
                    "id": asked.id,
                    "question": asked.question,
                    "choices": list(asked.choices),
                    "answer": asked.gold or said,
                    "kind": asked.question_type,
                    "part": asked.part,
                },
                row.where,
            )


def _file(path: Path, top: Path) -> File:
    """Known by its place below `top`: other folders may have other clips of its name."""
    return File(path, Path(os.path.relpath(path, top)).as_posix())


def _mmau(place: Place) -> Iterator[Record | Reject]:
    """The official JSON array; sounds are found under the root by their path or by their name."""
    path = mmau.question_file(place.path)
    for row in rows_of(path, path.parent):
        if isinstance(row, Reject):
            yield row
            continue
        values = dict(row.values)
        if isinstance(name := values.get("audio_id"), str):
            values["audio"] = _file(mmau.audio_file(place.root, name), place.root)
        yield Record(values, row.where)


@dataclass(frozen=True)
class Scene:
    """Dry clips heard through room responses."""

    heard: spatial_sound_qa.Heard
    rendering: Rendering
    name: str
    roots: tuple[Path, Path]  # of clips and of responses

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(File(path, path.name).size for path in (*self.heard.clips, *self.heard.responses))

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def hear(self, max_seconds: float) -> Waveform:
        return limit_peak(self.exact())  # sums go beyond full scale, which 16 bits do not hold

    def exact(self) -> Waveform:
        """As published, sample for sample."""
        self._check()
        return self.heard.render(self.rendering)

    def recipe(self) -> Recipe:
        """To render it when it is read. Its files have to be there; whether they can be used is not looked at."""
        self._check()
        clips, responses = (
            tuple(path.relative_to(root).as_posix() for path in paths)
            for paths, root in zip((self.heard.clips, self.heard.responses), self.roots, strict=True)
        )
        return Recipe(clips, responses, self.rendering, self.sizes)

    def _check(self) -> None:
        if missing := self.heard.missing():
            raise AudioError(missing, "missing")


def _responses(place: Place) -> Path:
    """The folder of the responses of the layout that is asked for."""
    layout = str(place.options.get("layout", "binaural"))
    return Path(place.options.get("responses", place.root / "responses")) / layout


def _roots(place: Place) -> dict[str, str]:
    return {"clips": str(place.root.absolute()), "responses": str(_responses(place).absolute())}


def _spatial_sound_qa(place: Place) -> Iterator[Record | Reject]:
    """``{"data": […]}``, JSON lines or Parquet; the scenes are rendered as published."""
    layout = str(place.options.get("layout", "binaural"))
    rate = place.options.get("sample_rate", SAMPLE_RATE)
    if layout not in LAYOUT_CHANNELS:
        raise ConfigError(describe("options.layout", ", ".join(LAYOUT_CHANNELS), f"'{layout}'"))
    if not isinstance(rate, int) or rate not in spatial_sound_qa.RATES:
        bounds = spatial_sound_qa.RATES
        raise ConfigError(describe("options.sample_rate", f"{bounds[0]} to {bounds[-1]} Hz", f"{rate!r}"))
    responses = _responses(place)
    check_rate("options.sample_rate", rate, responses.parent)
    rendering = Rendering(sample_rate=rate, layout=layout, silent="keep")
    top = place.path if place.path.is_dir() else place.path.parent
    files = spatial_sound_qa.question_files(place.path)
    if spatial_sound_qa.without_training(files, place.path)[1]:
        expected, found = "questions of one split", "train.json beside others"
        raise ConfigError(describe(f"path {place.path}", expected, found, "Name the file."))
    for path in files:
        name = path.relative_to(top).with_suffix("").as_posix()
        for number, row in enumerate(rows_of(path, top)):
            where = f"{name}/{number}"
            if isinstance(row, Reject):
                yield row
                continue
            try:
                asked = spatial_sound_qa.read_question(row)
            except AudioLLMError as error:
                yield Reject.of(where, error)
                continue
            heard = "+".join(f"{clip}@{room}" for clip, room in zip(asked.clips, asked.rooms, strict=True))
            values = {
                "id": where,
                "audio": Scene(asked.heard(place.root, responses), rendering, heard, (place.root, responses)),
                "question": asked.question,
                "answer": asked.answer,
                "kind": asked.question_type,
                "group": asked.recordings,
            }
            yield Record({**row.values, **values}, where)


FORMAT = (
    Format("dcase_aqa", _dcase, options=("audio",), answer_as="key"),
    Format("mmau", _mmau, {"kind": "task"}, answer_as="key"),
    Format(
        "spatial_sound_qa",
        _spatial_sound_qa,
        {"group": "group"},
        options=("responses", "layout", "sample_rate"),
        roots=_roots,
    ),
)
