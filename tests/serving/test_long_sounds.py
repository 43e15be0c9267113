"""Sounds of minutes through vLLM: as long as the model has positions for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from audio_llm.audio import Waveform
from audio_llm.shards.schema import Sample
from audio_llm.shards.writer import ShardWriter
from eval import predictions
from tests.native_models import make_native
from tests.paths import ROOT


@pytest.mark.slow
@pytest.mark.vllm
def test_minutes_of_sound_are_heard(made_once, tmp_path: Path) -> None:
    """Of 190 seconds Omni has 4,750 embeddings. In a process of its own: an engine of vLLM's would leave its marks."""
    model = made_once("native-omni-long", lambda folder: make_native("omni", folder, positions=8192))
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 190 * 16000)).astype(np.float32)
    with ShardWriter(tmp_path / "shards") as writer:
        question = {"question": "What is heard?", "choices": ["rain", "dog"], "answer": "rain"}
        writer.write(Sample("long", "qa", **question), Waveform(noise, 16000, "mono"))
    command = [
        "eval",
        str(model),
        str(tmp_path / "shards"),
        "--controls",
        "none",
        "--max-tokens",
        "8",
        "--engine",
        "vllm",
    ]
    words = [sys.executable, "-m", "audio_llm", *command, "--quiet", "--out", str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [reply] = predictions.read(tmp_path / "run")
    assert not reply.error and reply.prompt_tokens > 4750 and reply.completion_tokens == 8
    assert "Failed to import" not in done.stderr  # of kernels for other machines
