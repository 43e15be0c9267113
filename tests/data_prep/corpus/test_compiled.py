"""What Numba compiles for librosa: one process at a time fills the cache, and what it left can be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.corpus import compiled
from tests.paths import ROOT

MEASURE = """
import numpy as np
from audio_llm.audio import Waveform
from data_prep.corpus.acoustics import measured
clicks = np.zeros((1, 32000), np.float32)
clicks[:, ::4000] = 0.9
print([(fact.kind, fact.value) for fact in measured(Waveform(clicks, 16000, "mono"))])
"""


def test_the_cache_lies_where_it_is_said_and_else_in_the_users_own(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "here"))
    assert compiled.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / "audio-llm" / "numba"


@pytest.mark.slow
def test_three_first_runs_at_once_leave_a_cache_that_can_be_loaded(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "numba"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", MEASURE]
    how = {"cwd": ROOT, "env": environment, "text": True}
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, **how) for _ in range(3)]
    told = {process.communicate(timeout=300)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0] and len(told) == 1 and "tempo" in told.pop()
    assert len(list((tmp_path / "numba").rglob("*.nbi"))) > 3
    assert subprocess.run(line, stdout=subprocess.DEVNULL, timeout=300, **how).returncode == 0
    (tmp_path / "file").write_text("no folder")  # a place where nothing can be kept
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "file" / "numba")
    assert subprocess.run(line, stdout=subprocess.DEVNULL, timeout=300, **how).returncode == 0
