"""Worker processes: what they begin with, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from data_prep import text_check
from data_prep.scenes import pool

SCRIPT = """
import os, sys, time
from data_prep.scenes import pool

class Worker:
    imports = ("colorsys",)  # of the standard library, and of nothing else here
    def told(self, job):
        return os.getpid(), os.getppid(), "colorsys" in sys.modules, os.environ["OMP_NUM_THREADS"]
    def wait(self, job):
        time.sleep(60)

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "7"
    with pool.open_pool(2, Worker, ()) as jobs:
        for told in jobs.run("told", range(8)):
            print(*told, flush=True)
        assert os.environ["OMP_NUM_THREADS"] == "7" and "PYTHONSAFEPATH" not in os.environ
        if sys.argv[1:] == ["wait"]:
            jobs.submit("wait", 0)
            print("waiting", flush=True)
            time.sleep(60)
"""


def script(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Runs `SCRIPT` in a folder whose files have names of modules that it needs."""
    for name in ("scipy", "numpy", "colorsys", "audio_llm"):
        (folder / f"{name}.py").write_text("raise SystemExit('the current folder was searched')")
    (folder / "code").mkdir()
    (folder / "code" / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join(filter(None, [str(Path(pool.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(folder / "code" / "script.py"), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def there(process: int) -> bool:
    """Whether a process runs; what nobody has waited for is none."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_workers_are_forked_from_one_that_has_their_imports_and_none_is_left(tmp_path: Path) -> None:
    run = script(tmp_path)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    told = [line.split() for line in output.splitlines()]
    assert len(told) == 8 and {(has, threads) for _, _, has, threads in told} == {("True", "1")}
    workers, servers = {int(line[0]) for line in told}, {int(line[1]) for line in told}
    assert len(servers) == 1 and run.pid not in servers
    assert not any(there(process) for process in workers | servers)


def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    run = script(tmp_path, "wait")
    assert run.stdout is not None
    told = [run.stdout.readline().split() for _ in range(8)]
    assert run.stdout.readline().strip() == "waiting"
    processes = {int(number) for line in told for number in line[:2]}
    assert any(there(process) for process in processes)
    run.send_signal(signal.SIGKILL)
    run.wait()
    end = time.monotonic() + 60
    while any(there(process) for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(there(process) for process in processes)


def test_without_a_place_for_its_socket_workers_begin_by_themselves(tmp_path: Path) -> None:
    """The name of a socket has at most 107 bytes, and it lies under ``TMPDIR``."""
    place = tmp_path / ("long" * 30)
    place.mkdir()
    run = script(tmp_path, TMPDIR=str(place))
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    told = [line.split() for line in output.splitlines()]
    assert len(told) == 8 and {int(line[1]) for line in told} == {run.pid}


@given(st.integers(1, 3000), st.data())
def test_the_interval_of_guessing_is_that_of_scipy(items: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, items))
    low, high = binomtest(right, items).proportion_ci(text_check.CONFIDENCE, method="exact")
    found = text_check._interval(right, items)
    assert abs(found[0] - low) < 1e-9 and abs(found[1] - high) < 1e-9
