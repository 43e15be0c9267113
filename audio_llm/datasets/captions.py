"""Captions of sounds as Clotho (Drossos et al. 2020) and AudioCaps (Kim et al. 2019) publish them, and tables alike.

A sound has several captions: Clotho in columns of one row (``file_name``, ``caption_1`` …), AudioCaps in rows of their
own (``youtube_id``, ``start_time``, ``caption``), others as a list under ``captions``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from audio_llm.datasets.records import Cell, Record
from audio_llm.errors import DataError, describe

INSTRUCTION = "Describe in one sentence what is heard in this recording."
NAMES = ("file_name", "audio", "path", "youtube_id")
SECONDS = 10  # of an AudioCaps clip; some name the files by both ends in milliseconds


@dataclass(frozen=True)
class Captioned:
    """A sound by `name`, cut from `recording`, the names that its file may have, or its bytes in a table, and captions,
    of which some may be empty."""

    name: str
    recording: str
    sounds: list[str | Cell]
    captions: list[str]


def captioned(row: Record, number: int) -> Captioned:
    """What one row says; `number` names a sound in a table whose row has no id. Raises :class:`DataError` naming row
    and key."""
    captions = [" ".join(text.split()) for text in _captions(row)]
    key = next((key for key in NAMES if row.values.get(key) not in (None, "")), None)
    if key is None:
        raise row.lacks(*NAMES)
    value = row.values[key]
    if isinstance(value, Cell):
        name = row.identity("id", default="") or f"row {number}"
        return Captioned(name, name, [value], captions)
    name = row.identity(key)
    if key != "youtube_id":
        return Captioned(name, name, [name], captions)
    start = str(row.values.get("start_time") or "").removesuffix(".0")
    if not start.isdecimal():
        raise DataError(describe(f"{row.where}: 'start_time'", "whole seconds", f"'{start}'"))
    span = f"{name}_{1000 * int(start)}_{1000 * (int(start) + SECONDS)}"
    sounds: list[str | Cell] = [f"{name}_{start}", name, f"Y{name}", f"Y{name}_{start}", span]
    return Captioned(f"{name}_{start}", name, sounds, captions)


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
