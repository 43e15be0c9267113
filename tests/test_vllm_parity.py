"""vLLM and Transformers compute the same: greedy ids equal, |Δ log p| ≤ 1e-4 in float32.

Each checkpoint gets a process of its own, because an engine in the test's process would leave its marks there (torch's
thread count, global seeds, environment). ``pytest -m slow tests/test_vllm_parity.py`` runs the whole matrix.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from benchmarks.parity import BOUND
from tests.vllm_tools import make_adapter

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[1]


def parity(checkpoint: Path, adapter: Path | None, report: Path) -> dict[str, dict]:
    """The table of ``python -m benchmarks.parity``, by name of the row."""
    command = [sys.executable, "-m", "benchmarks.parity", str(checkpoint), "--json", str(report)]
    command += ["--adapter", str(adapter)] if adapter else []
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert report.is_file(), result.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads(report.read_text())}
    assert result.returncode == 0, result.stdout
    return rows


def assert_equal(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        assert row["same_ids"] == row["prompts"], name
        assert row["max_difference"] <= BOUND, name


def test_qwen2_binaural_with_lora_and_merged(checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen2", 2)
    adapter = make_adapter(model, tmp_path / "adapter")
    rows = parity(model, adapter, tmp_path / "report.json")
    assert_equal(rows)
    assert {"vLLM, single", "vLLM, batch", "vLLM + LoRA, single", "vLLM + LoRA, batch", "vLLM, merged"} <= set(rows)


@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_matrix(checkpoint, tmp_path: Path, family: str, channels: int, tie: bool) -> None:
    model = checkpoint(family, channels, tie)
    adapter = make_adapter(model, tmp_path / "adapter")
    assert_equal(parity(model, adapter, tmp_path / "report.json"))


@pytest.mark.parametrize(("family", "channels"), [("qwen3", 4), ("llama", 1)])
def test_other_families_and_channel_counts(checkpoint, tmp_path: Path, family: str, channels: int) -> None:
    assert_equal(parity(checkpoint(family, channels), None, tmp_path / "report.json"))
