"""BAT's table: the paper's columns of a run, with intervals, beside what others reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from audio_llm.cli import main
from audio_llm.errors import DataError
from eval.figures import bat
from eval.predictions import Prediction, PredictionWriter

GOLD = {
    "CLASSIFICATION": ["car", "dog"],
    "DOA": ["left, front, below; 1m", "right, front, below; 2m"],
    "MIXUP_SINGLE_CLASSIFICATION": ["car", "dog"],
    "MIXUP_SINGLE_DOA": ["left, behind, above; 3m", "right, behind, above; 1.5m"],
    "MIXUP_DIRECTION": ["Yes", "No"],
    "MIXUP_DISTANCE_BOTH": ["Yes", "No"],
    "MIXUP_NONBINARY_DISTANCE": ["2m", "1m"],
}


def asked(kind: str, right: int, count: int = 40) -> list[Prediction]:
    """`count` questions, the first `right` of them answered rightly and the others with the other answer."""
    rows = []
    for number in range(count):
        gold, other = GOLD[kind][number % 2], GOLD[kind][1 - number % 2]
        raw = gold if number < right else other
        fields = {"format": "spatialsoundqa", "question": "?", "choices": [], "clip": f"c{number // 2}"}
        rows.append(Prediction(id=f"{kind}-{number}", question_type=kind, gold=gold, raw=raw, **fields))  # type: ignore[arg-type]
    return rows


def test_the_columns_are_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = dict(zip(GOLD, (40, 30, 20, 10, 24, 36, 7), strict=True))
    rows = [row for kind, right in counts.items() for row in asked(kind, right)]
    found = bat.figures_of("mine", rows).figures
    values = {name: figure.value for name, figure in found.items()}
    assert list(values) == list(bat.COLUMNS) or set(values) == set(bat.COLUMNS)
    assert values["mAP A"] == 1.0 and values["mAP C"] < 0.8
    assert values["DoA B"] == pytest.approx(0.75) and values["DoA D"] == pytest.approx(0.25)
    assert values["DER B"] == pytest.approx(0.25) and values["DER D"] == pytest.approx(0.75)
    assert (values["Direction"], values["Distance"]) == pytest.approx((0.6, 0.9))
    assert values["BA"] == pytest.approx(0.75)
    assert all(figure.low <= figure.value <= figure.high for figure in found.values())
    assert found["DoA B"].clusters == 20 and found["DoA B"].n == 40
    (tmp_path / "run").mkdir()
    with PredictionWriter(tmp_path / "run" / "predictions.jsonl") as writer:
        writer.write(rows)
    assert main(["bat", f"mine={tmp_path}/run", "--out", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1 and lines[1][0] == "| mine"
    theirs = [line for line in lines if "reported" in line[0]]
    assert len(theirs) == len(bat.PUBLISHED) and all(
        cell.strip(" |").startswith("*") for line in theirs for cell in line
    )


def test_the_interval_of_a_mean_average_precision_lies_around_it() -> None:
    """Resamples hold repeats, which lift average precision: percentiles of them would begin at the figure itself."""
    figure = bat.figures_of("mine", asked("MIXUP_SINGLE_CLASSIFICATION", 11)).figures["mAP C"]
    assert figure.low < figure.value - 0.02 and figure.high == pytest.approx(2 * figure.value - figure.low)
    assert figure.clusters == 20 and figure.n == 40


def test_the_reported_means_are_means() -> None:
    for name, row in bat.PUBLISHED.items():
        assert row[8] == pytest.approx(np.mean(row[6:8]), abs=0.006), name


def test_columns_without_questions_stay_empty() -> None:
    row = bat.figures_of("part", asked("DOA", 3))
    assert set(row.figures) == {"DoA B", "DER B"}
    assert "| part | – | – |" in bat.table([row])
    with pytest.raises(DataError, match="types A to E"):
        bat.figures_of("none", asked("MIXUP_NONBINARY_DISTANCE", 3))
