"""Curves of training runs, from what they logged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_llm.errors import ConfigError, describe
from audio_llm.files import read_lines
from eval.figures import charts
from eval.figures.runs import split_name
from eval.report.markup import escape

# Which logged quantities become curves, in this order; a name that matches none of them is left to metrics.jsonl.
CURVES = (
    r"^loss$",
    r"^(train|eval|validation)[_/]loss$",
    r"^reward$",
    r"^rewards/.*mean$",
    r"^(eval|validation)[_/](.*accuracy|mean_ap|exact|left_right|front_back|direction_mae|frame_f1)$",
    r"^.*(accuracy|parity|delta_logp|max_abs).*$",
    r"^(kl|entropy)$",
    r"^completions/mean_length$",
    r"^groups/zero_variance_share$",
)
MAX_CURVES = 12


def learning(training: Sequence[str]) -> str:
    """Curves of every training run that has a ``metrics.jsonl``. Raises :class:`ConfigError` for a path that is not
    there."""
    blocks = []
    for argument in training:
        name, path = split_name(argument)
        if not Path(path).exists():
            raise ConfigError(describe(f"--training {path}", "a training folder with metrics.jsonl", "nothing there"))
        records = read_metrics(Path(path))
        drawn = [charts.lines(key, [(key, *_series(records, key))]) for key in curve_names(records)]
        text = "".join(chart for chart in drawn if chart)
        where = escape(name) if records else f"{escape(name)} <small>no metrics.jsonl found</small>"
        blocks.append(f'<h3>{where}</h3><div class="curves">{text}</div>')
    return "".join(blocks)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Complete lines of ``metrics.jsonl`` (a running training may be writing the last one)."""
    return read_lines(folder / "metrics.jsonl" if folder.is_dir() else folder)


def curve_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Logged numbers worth a curve: those of ``CURVES`` with at least three values, best known first."""
    counts: dict[str, int] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                counts[key] = counts.get(key, 0) + 1
    chosen: list[str] = []
    for pattern in CURVES:
        chosen += [key for key, n in counts.items() if n >= 3 and key not in chosen and re.match(pattern, key)]
    return chosen[:MAX_CURVES]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [
        (float(record.get("step", index)), float(record[key]))
        for index, record in enumerate(records)
        if isinstance(record.get(key), (int, float))
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]
