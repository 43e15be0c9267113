"""The Python of the README, on a small checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.paths import ROOT


def test_a_few_lines_answer_about_a_file(
    checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.strip()]
    assert len(lines) <= 5
    (tmp_path / "runs" / "quickstart" / "grpo").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "grpo" / "merged").symlink_to(checkpoint())
    noise = 0.1 * np.random.default_rng(0).standard_normal((4000, 2))
    soundfile.write(tmp_path / "clip.wav", noise, 16000)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block[1], "README.md", "exec"), names)
    assert isinstance(names["reply"], str) and capsys.readouterr().out.endswith(names["reply"] + "\n")
