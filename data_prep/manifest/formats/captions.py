"""Captioned sounds, a row a caption: the files that the benchmark ``captions`` reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audio_llm.datasets.captions import captioned
from audio_llm.datasets.records import SEPARATORS, Cell, Record, located
from audio_llm.errors import AudioLLMError
from data_prep.manifest.formats.base import Format, Place
from data_prep.manifest.formats.tables import records, separated
from data_prep.manifest.rows import Reject
from data_prep.manifest.sounds import TableCell


def _captions(place: Place) -> Iterator[Record | Reject]:
    """Each caption as the answer of a row of its own."""
    separator = SEPARATORS.get(place.path.suffix.lower())
    told = Counter[str]()
    for number, row in enumerate(separated(place, separator) if separator else records(place)):
        if isinstance(row, Reject):
            yield row
            continue
        try:
            found = captioned(row, number)
        except AudioLLMError as error:
            yield Reject.of(row.where, error)
            continue
        sound = next((one for one in located(found.sounds, place.root) if one is not None), found.sounds[0])
        audio: Any = TableCell(sound, place.root) if isinstance(sound, Cell) else sound
        if isinstance(sound, Path):
            audio = Path(os.path.relpath(sound, place.root)).as_posix()
        for caption in found.captions:
            name = f"{found.name}/{told[found.name]}"
            told[found.name] += 1
            said = {"audio": audio, "id": name, "answer": caption, "group": found.recording}
            yield Record({**row.values, **said}, row.where)


FORMAT = Format("captions", _captions, several_answers=True)
