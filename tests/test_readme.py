"""The Python of the README, on a small checkpoint; what all pages import and name is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.paths import ROOT


def run_block(page: str, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict]:
    """The first block of Python of a page, run where its model and its clip are: the block, and what it names."""
    block = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert block is not None
    (folder / "runs" / "quickstart" / "grpo").mkdir(parents=True)
    (folder / "runs" / "quickstart" / "grpo" / "merged").symlink_to(checkpoint)
    noise = 0.1 * np.random.default_rng(0).standard_normal((4000, 2))
    soundfile.write(folder / "clip.wav", noise, 16000)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(block[1], page, "exec"), names)
    return block[1], names


def test_a_few_lines_answer_about_a_file(
    checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    block, names = run_block("README.md", tmp_path, checkpoint(), monkeypatch)
    assert len([line for line in block.splitlines() if line.strip()]) <= 5
    assert isinstance(names["reply"], str) and capsys.readouterr().out.endswith(names["reply"] + "\n")


def test_transformers_own_classes_answer_about_a_file(
    checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As the engine of Transformers does."""
    from audio_llm.answering.ask import ask

    folder = checkpoint()
    run_block("docs/how_do_i.md", tmp_path, folder, monkeypatch)
    said = capsys.readouterr().out.rstrip("\n")
    assert said == ask(str(folder), "On which side is the sound?", ["clip.wav"], max_tokens=64)


ROOMS = ("audio_llm", "data_prep", "eval")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_pages_import_what_there_is() -> None:
    """What the blocks of Python take from our packages; docs/extending and the README are run as well."""
    missing = []
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ROOMS:
                    module = importlib.import_module(str(node.module))
                    absent = [name.name for name in node.names if not hasattr(module, name.name)]
                    missing += [f"{page.name}: {node.module}.{name}" for name in absent if not is_module(module, name)]
    assert not missing


def is_module(package: object, name: str) -> bool:
    try:
        return bool(importlib.import_module(f"{package.__name__}.{name}"))  # type: ignore[attr-defined]
    except ImportError:
        return False


def test_pages_name_files_that_there_are() -> None:
    folders = "audio_llm|eval|data_prep|tests|docs|scripts|recipes|benchmarks"
    pattern = re.compile(rf"`((?:{folders})/[\w./-]+)`")
    named = {(page.name, name) for page in PAGES for name in pattern.findall(page.read_text())}
    made_up = re.compile(r"NAME|/\.")
    assert not [pair for pair in sorted(named) if not (ROOT / pair[1]).exists() and not made_up.search(pair[1])]
