"""Kinds of data sets: found by their files, or by name in a module of one's own; recipes come before heavy imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from audio_llm.cli import main
from data_prep.tasks import KINDS
from tests.paths import ROOT


def test_a_kind_of_ones_own_is_one_file(tmp_path: Path, monkeypatch, capsys) -> None:
    page = (ROOT / "docs" / "extending" / "prep.md").read_text()
    (tmp_path / "guest_kind.py").write_text(page.split("```python")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recipe.yaml").write_text("kind: guest_kind:KIND\ncount: 3\n")
    command = ["prep", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--sounds", "a: b"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"made: {tmp_path / 'out'} (train 3; rejects 0)\n"
    assert '"folder": "a: b"' in (tmp_path / "out" / "dataset.json").read_text()
    assert main(command) == 0 and "up to date" in capsys.readouterr().out
    assert main([*command, "count=4"]) == 2
    assert "another run: count is 4 here and 3 there" in capsys.readouterr().err
    assert main([*command, "count=4", "--overwrite"]) == 0
    for flag in ("--plot", "--folds=train=1"):
        assert main([*command, flag]) == 2 and "not for kind: copy" in capsys.readouterr().err
    assert main([*command, "count=0"]) == 2 and main([*command, "cuont=4"]) == 2
    assert "did you mean 'count'" in capsys.readouterr().err


@pytest.mark.parametrize("name", KINDS.files)
def test_a_recipe_is_refused_before_anything_heavy_is_imported(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"verb: prep\nkind: {name}\nno_such_key: 1\n")
    program = (
        "import sys; from audio_llm.cli import main; code = main(['prep', 'recipe.yaml', 'out'])\n"
        "print(code, [name for name in ('torch', 'scipy', 'transformers', 'pyroomacoustics') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert found.stdout.strip() == "2 []" and "no_such_key" in found.stderr
