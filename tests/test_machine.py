"""What a container leaves to a process: by recorded trees of control groups, and by real ones where there are any."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from audio_llm import machine
from audio_llm.inspection import doctor
from audio_llm.inspection.doctor import Facts

GIB = 2**30
NONE = 9223372036854771712  # what version 1 calls no limit
CPU, MEMORY = "cpu,cpuacct", "memory"


def stat(version: int, files: int) -> str:
    prefix = "total_" if version == 1 else ""
    return f"{prefix}inactive_file {files // 4}\nanon 5\n{prefix}active_file {files - files // 4}\n"


def limits(
    version: int, *, memory: Any = None, used: int = 0, files: int = 0, quota: int | None = None
) -> dict[str, str]:
    """The files of a group as the kernel writes them."""
    if version == 2:
        return {
            "memory.max": f"{memory or 'max'}\n",
            "memory.high": "max\n",
            "memory.current": f"{used}\n",
            "memory.stat": stat(2, files),
            "cpu.max": f"{quota or 'max'} 100000\n",
        }
    return {
        "memory.limit_in_bytes": f"{memory or NONE}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": stat(1, files),
        "cpu.cfs_quota_us": f"{quota or -1}\n",
        "cpu.cfs_period_us": "100000\n",
    }


# Name: lines of /proc/self/cgroup; mounts (root, folder, kind, options); folders with their files; CPUs, free memory
# and limit that are expected of a machine with 64 CPUs and 100 GiB, 40 of them free.
TREES: dict[str, Any] = {
    "none": ("0::/\n", [], {}, (64, 40 * GIB, None)),
    "a desktop without limits": (
        "0::/user.slice/user-1000.slice\n",
        [("/", "sys/fs/cgroup", "cgroup2", "rw,nsdelegate")],
        {"sys/fs/cgroup/user.slice/user-1000.slice": limits(2, used=3 * GIB)},
        (64, 40 * GIB, None),
    ),
    "a container of version 2, in a name space of its own": (
        "0::/\n",
        [("/", "sys/fs/cgroup", "cgroup2", "rw")],
        {"sys/fs/cgroup": limits(2, memory=8 * GIB, used=6 * GIB, files=4 * GIB, quota=250000)},
        (3, 6 * GIB, 8 * GIB),
    ),
    "a limit of a group above": (
        "0::/kubepods.slice/pod1.slice/main\n",
        [("/", "sys/fs/cgroup", "cgroup2", "rw")],
        {
            "sys/fs/cgroup/kubepods.slice/pod1.slice": limits(2, memory=4 * GIB, used=GIB, quota=100000),
            "sys/fs/cgroup/kubepods.slice/pod1.slice/main": limits(2, memory=16 * GIB, used=GIB, quota=800000),
        },
        (1, 3 * GIB, 4 * GIB),
    ),
    "a container of version 1, called by its name outside": (
        "7:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n0::/system.slice/containerd.service\n",
        [
            ("/docker/abc", "sys/fs/cgroup/cpu,cpuacct", "cgroup", f"rw,{CPU}"),
            ("/docker/abc", "sys/fs/cgroup/memory", "cgroup", f"rw,{MEMORY}"),
        ],
        {
            "sys/fs/cgroup/cpu,cpuacct": limits(1, quota=150000),
            "sys/fs/cgroup/memory": limits(1, memory=2 * GIB, used=3 * GIB, files=2 * GIB),
        },
        (2, GIB, 2 * GIB),
    ),
    "version 1 and 2 beside each other, no limit in the own group": (
        "4:memory:/batch/job_7\n1:cpu:/\n0::/\n",
        [
            ("/", "sys/fs/cgroup/cpu", "cgroup", "rw,cpu"),
            ("/", "sys/fs/cgroup/memory", "cgroup", "rw,memory"),
            ("/", "sys/fs/cgroup/unified", "cgroup2", "rw"),
        ],
        {
            "sys/fs/cgroup/memory/batch/job_7": limits(1, used=GIB),
            "sys/fs/cgroup/memory/batch": limits(1, memory=10 * GIB, used=9 * GIB),
            "sys/fs/cgroup/cpu": {"cpu.shares": "1024\n"},
        },
        (64, GIB, 10 * GIB),
    ),
    "a group outside of what is mounted": (
        "0::/../../elsewhere\n",
        [("/", "sys/fs/cgroup", "cgroup2", "rw")],
        {"sys/fs/cgroup": limits(2, memory=5 * GIB, used=7 * GIB)},
        (64, 0, 5 * GIB),
    ),
    "a soft limit, at which a process is held up": (
        "0::/job\n",
        [("/", "sys/fs/cgroup", "cgroup2", "rw")],
        {"sys/fs/cgroup/job": limits(2, memory=8 * GIB, used=GIB) | {"memory.high": f"{2 * GIB}\n"}},
        (64, GIB, 2 * GIB),
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_the_smallest_limit_counts_wherever_it_stands(name: str, tmp_path: Path, monkeypatch) -> None:
    own, mounts, folders, (cpus, free, limit) = TREES[name]
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal:  {100 * GIB // 1024} kB\nMemAvailable:   {40 * GIB // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(own)
    lines = [
        f"{30 + number} 23 0:{number} {root} {tmp_path / folder} rw,nosuid shared:9 - {kind} {kind} {options}\n"
        for number, (root, folder, kind, options) in enumerate(mounts)
    ]
    others = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n61 22 8:2 / /media/caf\xe9 rw - vfat /dev/sdb1 rw\n"
    (proc / "self" / "mountinfo").write_bytes("".join(lines).encode() + others)
    for folder, files in folders.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (tmp_path / folder / file).write_text(text)
    monkeypatch.setattr(machine, "cores", lambda: 64)
    assert (machine.cpus(proc), machine.free_memory(proc), machine.memory_limit(proc)) == (cpus, free, limit)


def test_a_system_without_proc_is_not_guessed(tmp_path: Path) -> None:
    assert machine.free_memory(tmp_path) is None and machine.memory_limit(tmp_path) is None
    assert machine.cpus(tmp_path) == machine.cores() >= 1


@pytest.fixture
def group() -> Iterator[list[Path]]:
    """Folders of a new control group of this machine: 1.2 processors and 300 MiB."""
    name, made = f"audio-llm-test-{os.getpid()}", []
    top = Path("/sys/fs/cgroup")
    unified = (top / "cgroup.controllers").is_file()
    wanted = {"cpu.max": "120000 100000", "memory.max": str(300 * 2**20)}
    if not unified:
        wanted = {"cpu/cpu.cfs_quota_us": "120000", "memory/memory.limit_in_bytes": str(300 * 2**20)}
    try:
        for file, value in wanted.items():
            folder = top / name if unified else top / file.split("/")[0] / name
            folder.mkdir(exist_ok=True)
            made.append(folder)
            (folder / Path(file).name).write_text(value)
        yield list(dict.fromkeys(made))
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error})")
    finally:
        for folder in dict.fromkeys(made):
            for _ in range(50):  # a group is free a moment after its last process has ended
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.1)


def test_a_process_in_a_real_group_knows_its_limits(group: list[Path]) -> None:
    """The kernel's own groups; the process says what it may use, and what the doctor makes of that."""
    code = (
        "from audio_llm import machine; from audio_llm.inspection import doctor;"
        "facts = doctor.Facts((3, 11, 0), {}, ram_free=machine.free_memory(), ram_limit=machine.memory_limit());"
        "print(machine.cpus(), machine.free_memory(), machine.memory_limit());"
        "print(next(iter(doctor.check_room(facts))).text)"
    )
    enter = "; ".join(f"echo 0 > '{folder / 'cgroup.procs'}'" for folder in group)
    told = subprocess.run(
        ["sh", "-c", f'{enter}; exec "$0" -c "$1"', sys.executable, code], capture_output=True, text=True, timeout=120
    )
    if told.returncode and "cgroup.procs" in told.stderr:
        pytest.skip(told.stderr.strip())
    numbers, text = told.stdout.splitlines()
    cpus, free, limit = map(int, numbers.split())
    assert cpus == min(2, machine.cores()) and limit == 300 * 2**20
    assert 150 * 2**20 < free < 300 * 2**20  # a Python process takes some tens of megabytes
    assert "GiB free of a container's 0.3; 3.00 GiB are advised" in text


def test_the_doctor_says_how_many_threads_a_container_may_use() -> None:
    found = list(doctor.check_environment(Facts((3, 11, 0), {}, cpus=2, cores=64)))
    (threads,) = [finding for finding in found if finding.item == "OMP_NUM_THREADS"]
    assert threads.level == "warn" and threads.cure == "export OMP_NUM_THREADS=2" and "64 threads" in threads.text
