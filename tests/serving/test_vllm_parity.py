"""vLLM and Transformers compute the same: greedy ids equal, |Δ log p| ≤ 1e-4 in float32.

The engines run in a process of their own, because an engine in the test's process would leave its marks there (torch's
thread count, global seeds, environment). ``pytest -m slow tests/serving/test_vllm_parity.py`` runs the whole matrix.
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
from tests.conftest import make_checkpoint
from tests.model.test_projector import with_marks
from tests.paths import ROOT
from tests.serving.vllm_tools import adapted_encoder, make_adapter

pytestmark = pytest.mark.vllm


def parity(models: list[Path], adapters: list[Path], report: Path) -> dict[str, dict[str, dict]]:
    """The tables of ``python -m benchmarks.parity``: model → name of the row → row; every row is asserted equal."""
    command = [sys.executable, "-m", "benchmarks.parity", *map(str, models), "--json", str(report)]
    for adapter in adapters:
        command += ["--adapter", str(adapter)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert report.is_file(), result.stderr[-3000:]
    tables = json.loads(report.read_text())
    for model, rows in tables.items():
        for row in rows:
            assert row["same_ids"] == row["prompts"], f"{model}: {row}"
            assert row["max_difference"] <= BOUND, f"{model}: {row}"
    assert result.returncode == 0
    return {model: {row["name"]: row for row in rows} for model, rows in tables.items()}


def test_an_adapter_four_channels_and_a_mono_encoder_that_hears_two(checkpoint, tmp_path: Path) -> None:
    """Two families; the third, with two channels and adapters, is the server's (``test_vllm_server.py``)."""
    beats = {"name": "beats", "preset": "tiny", "window_seconds": 0.64, "hidden_size": 48, "depth": 2}
    mono = {"family": "llama", "tie": True, "encoder": {**beats, "hearing": "each"}, "projector": "mlp"}
    models = [checkpoint("qwen3", 4), make_checkpoint(tmp_path / "mono", **mono)]
    tables = parity(models, [make_adapter(models[0], tmp_path / "adapter")], tmp_path / "report.json")
    single_and_batch = {"vLLM, single", "vLLM, batch"}
    with_adapter = {"vLLM + LoRA, single", "vLLM + LoRA, batch", "vLLM, merged"}
    assert single_and_batch | with_adapter <= set(tables[str(models[0])])
    assert single_and_batch <= set(tables[str(models[1])])


@pytest.mark.slow
def test_a_convolutional_encoder_with_adapters_folded_in(tmp_path: Path) -> None:
    encoder = {"name": "urbansound_cnn", "preset": "tiny", "hearing": "mean"}
    start = make_checkpoint(tmp_path / "start", encoder=encoder)
    adapted_encoder(start, tmp_path / "run")
    rows = parity([tmp_path / "run" / "merged"], [], tmp_path / "report.json")[str(tmp_path / "run" / "merged")]
    assert {"vLLM, single", "vLLM, batch"} <= set(rows)


@pytest.mark.slow
def test_families_that_scale_their_embeddings_or_cap_their_logits(tmp_path: Path) -> None:
    models = [
        make_checkpoint(tmp_path / family, family, tie=family != "mistral")  # every Gemma's head is its embeddings
        for family in ("mistral", "gemma", "gemma2", "gemma3_text")
    ]
    parity(models, [], tmp_path / "report.json")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_projectors(checkpoint, tmp_path: Path, family: str) -> None:
    """Every kind with every family, a fixed number a window or one for each token or group of tokens of a clip; and the
    marks of audio that a published model has."""
    models = [checkpoint(family, 1, projector == "mlp", projector) for projector in ("linear", "mlp", "qformer")]
    marked = with_marks(models[1], tmp_path / "marked")
    parity([*models, marked], [make_adapter(models[0], tmp_path / "adapter")], tmp_path / "report.json")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_matrix(checkpoint, tmp_path: Path, family: str, channels: int) -> None:
    models = [checkpoint(family, channels, tie) for tie in (False, True)]
    adapters = [make_adapter(model, tmp_path / str(i)) for i, model in enumerate(models)]
    parity(models, adapters, tmp_path / "report.json")
