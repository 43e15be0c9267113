"""``scripts/gpu.sh``: all parts run on a CPU at tiny shapes; what fails or is missing is told, and the next runs."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from benchmarks import gpu
from tests.paths import ROOT


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """``parts(*results)`` → (exit code, JSON) of a run whose parts give these."""

    def run(*results: dict) -> tuple[int, dict]:
        named = {str(number): result for number, result in enumerate(results)}
        monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name) for name in named))
        monkeypatch.setattr(gpu, "run_part", lambda part, *args: named[part.name])
        code = gpu.main(["--dry-run", "--out", str(tmp_path / "gpu.json")])
        return code, json.loads((tmp_path / "gpu.json").read_text())["parts"]

    return run


def figure(met: bool | None) -> dict:
    return {"rows": [{"what": "a figure", "value": 1.0, "unit": "s", "limit": "at most 2", "met": met}]}


def test_limits_failures_and_skips_decide_the_exit_code(parts, capsys):
    assert parts(figure(True), figure(None), {"skipped": "needs vllm"})[0] == 0
    code, found = parts({"failed": "ended with -9"}, figure(False))
    assert code == 1 and list(found) == ["0", "1"]  # the second part still ran
    text = capsys.readouterr().out
    assert "ended with -9" in text and "at most 2: MISSED" in text


def test_a_part_without_its_package_is_skipped_by_name():
    assert gpu.run_part(gpu.Part("p", "sft", needs=("no_such_package",)), "cpu", True, 60) == {
        "skipped": "needs no_such_package"
    }
    assert "no time" in gpu.run_part(gpu.Part("p", "sft"), "cpu", True, 0)["skipped"]


def test_a_part_that_fails_or_hangs_is_told(tmp_path, monkeypatch):
    assert "AttributeError" in gpu.run_part(gpu.Part("p", "no_such_function"), "cpu", True, 60)["failed"]
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "longer" in gpu.run_part(gpu.Part("p", command=["sleeper"]), "cuda", False, 0.5)["failed"]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    """Those that vLLM makes have benchmarks and tests of their own."""
    names = [part.name for part in gpu.PARTS if "vllm" not in part.needs]
    command = ["bash", "scripts/gpu.sh", "--dry-run", "--out", str(tmp_path / "gpu.json"), "--only", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert list(found) == names and all(result.get("rows") for result in found.values())
