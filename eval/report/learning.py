"""Curves of training runs, from what they logged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_llm import config
from audio_llm.errors import ConfigError, describe
from audio_llm.files import read_lines
from eval.figures import charts
from eval.figures.runs import split_name
from eval.report.markup import escape, note

# Which logged quantities become curves, in this order, and their titles ({0} is what the pattern's group holds); a name
# that matches none of them is left to metrics.jsonl.
CURVES = {
    r"loss": "loss on training samples",
    r"(?:train|eval|validation)[_/]loss": "loss on validation samples",
    r"eval_audio_contribution": "gain by the sound over silence (nats per token)",
    r"reward": "mean reward",
    r"rewards/(.*)/mean": "reward for {0}",
    r"(?:eval|validation)[_/]mean_ap": "mean average precision of classes",
    r"(?:eval|validation)[_/]exact": "exact validation replies",
    r"(?:eval|validation)[_/]direction_mae": "error of the direction (degrees)",
    r"(?:eval|validation)[_/](left_right|front_back)": "right side: {0}",
    r"(?:eval|validation)[_/]frame_f1": "F1 of frames with events",
    r"(?:eval|validation)[_/](.*accuracy)": "validation {0}",
    r"eval_accuracy_silence": "validation accuracy in silence",
    r"parity/max_abs_logp_difference": "largest |Δ log p| to the engine",
    r"kl": "KL from the reference model (nats)",
    r"entropy": "entropy of replies (nats)",
    r"completions/mean_length": "mean length of replies (tokens)",
    r"groups/zero_variance_share": "groups with one and the same reward",
}
MAX_CURVES = 12
PARITY = "parity/max_abs_logp_difference"
OTHER = 5  # the colour of a training run that no evaluation is named after


def learning(training: Sequence[str], runs: Sequence[str] = ()) -> str:
    """Curves of every training run that has a ``metrics.jsonl``, side by side, in the colours of the evaluation `runs`
    of the same names. Raises :class:`ConfigError` for a path that is not there."""
    figures, silent = [], []
    for argument in training:
        name, path = split_name(argument)
        folder = Path(path)
        if not folder.exists():
            raise ConfigError(describe(f"--training {path}", "a training folder with metrics.jsonl", "nothing there"))
        records = read_metrics(folder)
        series = runs.index(name) if name in runs else OTHER
        drawn = [_curve(name, key, words, records, series, folder) for key, words in curve_names(records).items()]
        figures += [chart for chart in drawn if chart]
        if not any(drawn):
            silent.append(f"{escape(name)}: no curve in its metrics.jsonl")
    text = "".join(f"<div>{chart}</div>" for chart in figures)
    return (f'<div class="curves">{text}</div>' if text else "") + "".join(map(note, silent))


def _curve(run: str, key: str, words: str, records: Sequence[Mapping[str, Any]], series: int, folder: Path) -> str:
    parity = key == PARITY
    limit = _parity_bound(folder) if parity else None
    return charts.lines(f"{run}: {words}", *_series(records, key), series=series, log=parity, limit=limit)


def _parity_bound(folder: Path) -> float | None:
    """The limit that a GRPO run's recipe holds its parity to, None where it says none."""
    path = folder / "recipe.yaml"
    bound = config.read(path).get("parity_bound") if path.is_file() else None
    return float(bound) if isinstance(bound, (int, float)) else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Complete lines of ``metrics.jsonl`` (a running training may be writing the last one)."""
    return read_lines(folder / "metrics.jsonl" if folder.is_dir() else folder, tell=True)


def curve_names(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Logged numbers worth a curve and their titles: those of ``CURVES`` with two values at least, best known first."""
    counts: dict[str, int] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                counts[key] = counts.get(key, 0) + 1
    chosen: dict[str, str] = {}
    for pattern, words in CURVES.items():
        for key, count in counts.items():
            if count >= 2 and key not in chosen and (match := re.fullmatch(pattern, key)):
                chosen[key] = words.format(*(group.replace("_", " ") for group in match.groups()))
    return dict(list(chosen.items())[:MAX_CURVES])


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [
        (float(record.get("step", index)), float(record[key]))
        for index, record in enumerate(records)
        if isinstance(record.get(key), (int, float))
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]
