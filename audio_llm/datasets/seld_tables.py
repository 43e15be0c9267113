"""Tables of sound events in time as DCASE writes them: frames of 100 ms, degrees, centimetres."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from audio_llm.errors import ShardError, describe
from audio_llm.files import write_atomically

COLUMNS = ("frame", "class", "source", "azimuth", "distance", "onscreen")
FRAME_SECONDS = 0.1


def fold_azimuth(azimuth: np.ndarray) -> np.ndarray:
    """What two coincident microphones can tell of an azimuth: the back mirrored to the front, in −90 to 90 degrees."""
    wrapped = (np.asarray(azimuth, dtype=np.float64) + 180.0) % 360.0 - 180.0
    return np.where(wrapped < -90, -180.0 - wrapped, np.where(wrapped > 90, 180.0 - wrapped, wrapped))


def parse_rows(text: str, name: str = "table") -> np.ndarray:
    """Rows ``(n, 6)`` of a CSV text with its header line. Raises :class:`ShardError` naming the line."""
    rows = []
    for number, line in enumerate(io.StringIO(text), 1):
        if number == 1 or not line.strip():
            continue
        cells = line.split(",")
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            row = []
        if len(row) != len(COLUMNS) or not all(map(math.isfinite, row)) or min(row[:3]) < 0:
            raise ShardError(describe(f"{name}, line {number}", f"numbers {','.join(COLUMNS)}", repr(line.strip())))
        rows.append(row)
    if text.strip() and not text.lower().startswith("frame"):
        found = repr(text.splitlines()[0][:60])
        raise ShardError(describe(f"{name}, line 1", f"the header {','.join(COLUMNS)}", found))
    return np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS))


def read_rows(path: str | Path) -> np.ndarray:
    """:func:`parse_rows` of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
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
