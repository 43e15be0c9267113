"""A native audio model through our vLLM plugin, by its own folder: the answers of Transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from audio_llm.cli import main
from eval import predictions
from tests.native_models import make_native
from tests.paths import ROOT

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("kind", ["qwen2_audio", pytest.param("omni", marks=pytest.mark.slow)])
def test_it_answers_what_transformers_does(kind: str, made_once, shards, tmp_path: Path) -> None:
    model = made_once(f"native-{kind}", lambda folder: make_native(kind, folder))
    rows = {}
    for engine in ("transformers", "vllm"):
        out = tmp_path / engine
        command = ["eval", str(model), str(shards(channels=1)), "--out", str(out), "--engine", engine, "--quiet"]
        command += ["--limit", "8", "--max-tokens", "12", "--controls", "silence,text_only"]
        if engine == "transformers":
            assert main(command) == 0
        else:  # an engine of vLLM's would leave its marks in this process
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, "-m", "audio_llm", *command], cwd=ROOT, env=environment, timeout=600)
            assert done.returncode == 0
        rows[engine] = predictions.read(out)
    theirs, ours = ([(row.raw, row.prompt_tokens, row.error) for row in rows[name]] for name in rows)
    assert theirs == ours and len(ours) == 24 and not any(error for _, _, error in ours)
    heard = {row.control: row.raw for row in rows["vllm"] if row.id == rows["vllm"][0].id}
    assert len(set(heard.values())) == 3  # the sound, its silence and its absence make a difference
