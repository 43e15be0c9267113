"""How numbers and words of the report become HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.figures.estimates import Comparison, Estimate
from eval.figures.scores import Cell

# SpatialSoundQA's types of question in words.
KINDS = {
    "CLASSIFICATION": "which sounds",
    "DOA": "where and how far",
    "MIXUP_SINGLE_CLASSIFICATION": "which of two sounds is there",
    "MIXUP_SINGLE_DOA": "where one of two is",
    "MIXUP_DIRECTION": "is one on that side of the other",
    "MIXUP_DISTANCE_BOTH": "is one nearer than the other",
    "MIXUP_NONBINARY_DISTANCE": "how far apart two are",
    "MIXUP_NONBINARY_SOURCE": "which is on that side of the other",
    "MIXUP_NONBINARY_DIRECTION": "on which side of the other",
}


def kind_of(name: str) -> str:
    """A type of question, in words where the benchmark has it in capitals alone."""
    return f"{KINDS[name.upper()]} ({name})" if name.upper() in KINDS else name


def escape(text: Any) -> str:
    """Whatever a model or a data file says is text, never markup."""
    return html.escape(str(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: Mapping[int, str] | None = None) -> str:
    """An HTML table of cells that are HTML already; `classes` by column number."""
    css = {index: f' class="{name}"' for index, name in (classes or {}).items()}
    top = "".join(f"<th{css.get(i, '')}>{escape(cell)}</th>" for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{css.get(i, '')}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    """A small paragraph that says how to read what stands above it; `text` is HTML already."""
    return f'<p class="note">{text}</p>'


def accuracy(cell: Cell | None) -> str:
    return estimate(cell.accuracy) if cell is not None and cell.accuracy.n else "–"


def estimate(value: Estimate) -> str:
    bounds = f"{100 * value.low:.1f} – {100 * value.high:.1f}{value.few}"
    return f"<b>{100 * value.value:.1f}</b> <small>{bounds}</small>"


def signed(value: Estimate) -> str:
    """A difference in points; coloured where its interval lies on one side of zero."""
    css = "good" if value.low > 0 else "bad" if value.high < 0 else ""
    bounds = f"{100 * value.low:+.1f} – {100 * value.high:+.1f}{value.few}"
    text = f"<b>{100 * value.value:+.1f}</b> <small>{bounds}</small>"
    return f'<span class="{css}">{text}</span>'


def won_and_lost(found: Comparison) -> str:
    """Questions that the second : the first alone did better on, and the test."""
    return f"{found.only_second} : {found.only_first}, p {_p(found.p_value)}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def plain(value: Any) -> str:
    """A value of a manifest in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def _p(value: float) -> str:
    return "&lt; 0.0001" if value < 1e-4 else f"= {value:.4f}"
