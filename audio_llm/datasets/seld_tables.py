"""Tables of sound events in time as DCASE writes them: frames of 100 ms, degrees, centimetres."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from audio_llm.errors import ShardError, describe
from audio_llm.files import write_atomically

COLUMNS = ("frame", "class", "source", "azimuth", "distance", "onscreen")
FRAME_SECONDS = 0.1
# Degrees either way of counting, centimetres up to a kilometre, a day of frames.
BOUNDS = {
    "frame": (0, 864_000),
    "class": (0, 10_000),
    "source": (0, 10_000),
    "azimuth": (-360, 360),
    "distance": (0, 100_000),
    "onscreen": (0, 1),
}


def fold_azimuth(azimuth: np.ndarray) -> np.ndarray:
    """What two coincident microphones can tell of an azimuth: the back mirrored to the front, in −90 to 90 degrees."""
    wrapped = (np.asarray(azimuth, dtype=np.float64) + 180.0) % 360.0 - 180.0
    return np.where(wrapped < -90, -180.0 - wrapped, np.where(wrapped > 90, 180.0 - wrapped, wrapped))


def parse_rows(text: str, name: str = "table") -> np.ndarray:
    """Rows ``(n, 6)`` of a CSV text, its columns by the names in its header; tables of other years have others, and in
    another order. Without the columns source and onscreen these are 0; elevation, which two microphones do not hear, is
    left out. Raises :class:`ShardError` naming the line, for columns that are not known, and for values that cannot be.
    """
    lines = text.removeprefix("\ufeff").splitlines()
    if not any(line.strip() for line in lines):
        return np.zeros((0, len(COLUMNS)))
    mark = next((mark for mark in ",;\t" if mark in lines[0]), ",")
    header = [cell.strip().strip('"').lower() for cell in lines[0].split(mark)]
    known = {*COLUMNS, "elevation", ""}  # a column without a name is a counter that a program added
    twice = len({*header}) < len(header)
    if twice or not known.issuperset(header) or not {"frame", "class", "azimuth", "distance"}.issubset(header):
        expected = f"the header {','.join(COLUMNS)} (source, onscreen and elevation as they are)"
        raise ShardError(describe(f"{name}, line 1", expected, repr(lines[0][:60])))
    places = [header.index(column) if column in header else None for column in COLUMNS]
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split(mark)
        try:
            row = [0.0 if place is None else float(cells[place]) for place in places]
        except (ValueError, IndexError):
            row = [math.nan]
        if len(cells) != len(header) or not all(map(math.isfinite, row)):
            raise ShardError(describe(f"{name}, line {number}", f"numbers {','.join(header)}", repr(line.strip())))
        _check(row, f"{name}, line {number}")
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS))


def _check(row: list[float], where: str) -> None:
    for column, value in zip(COLUMNS, row, strict=True):
        low, high = BOUNDS[column]
        if not low <= value <= high:
            raise ShardError(describe(where, f"{column} of {low:g} to {high:g}", f"{value:g}"))
        if column not in ("azimuth", "distance") and value != int(value):
            raise ShardError(describe(where, f"a whole number as {column}", f"{value:g}"))


def read_rows(path: str | Path) -> np.ndarray:
    """:func:`parse_rows` of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ShardError(describe(str(path), "a CSV text", "a file that is no UTF-8")) from error
    return parse_rows(text, str(path))


def format_rows(rows: np.ndarray) -> str:
    """The CSV text of rows, header included; numbers rounded half to even, as the evaluation server wants them."""
    lines = [",".join(COLUMNS)] + [",".join(str(round(value)) for value in row) for row in rows.tolist()]
    return "\n".join(lines) + "\n"


def write_rows(path: str | Path, rows: np.ndarray) -> None:
    """Write rows as CSV, whole or not at all; a file of no events is its header."""
    write_atomically(Path(path), format_rows(rows))
