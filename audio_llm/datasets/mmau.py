"""MMAU's files (Sakshi et al., ICLR 2025) as they lie: one JSON array of questions, and a folder of sounds."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from audio_llm.errors import DataError, describe
from audio_llm.files import within


def question_file(data: Path) -> Path:
    """The JSON file that `data` is or holds. Raises :class:`DataError` where there is none or more than one."""
    if not data.is_dir():
        if not data.is_file():
            raise DataError(describe(str(data), "MMAU's JSON file or the folder that holds it", "nothing there"))
        return data
    found = sorted(data.glob("mmau*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(describe(f"folder {data}", "one mmau*.json", names, "Name the file itself."))
    return found[0]


def audio_file(folder: Path, audio_id: str) -> Path:
    """The named file under `folder`, else the one of its last name there."""
    with contextlib.suppress(DataError):
        if os.path.isfile(file := within(folder, audio_id)):  # False as well for a name that no disk can have
            return file
    return folder / Path(audio_id).name


def word_set(text: str) -> frozenset[str]:
    """What MMAU's rule compares: the maximal runs of word characters (letters, digits, underscore) of the lowercased
    text, as a set."""
    return frozenset(_WORD.findall(text.lower()))


_WORD = re.compile(r"\b\w+\b")
