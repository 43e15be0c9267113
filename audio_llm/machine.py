"""What this process may use of its machine: processors and memory, within the limits of its control groups.

A container's limits are those of a control group (cgroup, version 1 or 2), and of every group that it lies in. Linux
tells about the whole machine elsewhere: in ``/proc/meminfo``, and by ``os.cpu_count``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc")


def cores() -> int:
    """Processors that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus(proc: Path = PROC) -> int:
    """:func:`cores`, or as many as the time amounts to that its control groups leave it, where those are fewer: 1.5
    are 2. So many threads or processes are of use."""
    shares = [quota / period for quota, period in _quotas(proc)]
    return max(1, min([cores(), *(int(-(-share // 1)) for share in shares)]))


def free_memory(proc: Path = PROC) -> int | None:
    """Bytes that programs can still have, of the machine and under the limits of this process's control groups; None
    where the system does not tell. What files left in memory counts as free: it is given up where it is needed."""
    found = _meminfo(proc, "MemAvailable")
    left = [max(0, limit - used) for limit, used in _memories(proc)]
    return min([*left, *([] if found is None else [found])], default=None)


def memory_limit(proc: Path = PROC) -> int | None:
    """Bytes of the smallest limit that a control group sets, where it is below the machine's memory; else None."""
    limits, total = [limit for limit, _ in _memories(proc)], _meminfo(proc, "MemTotal")
    return next((limit for limit in sorted(limits) if total is None or limit < total), None)


def _meminfo(proc: Path, name: str) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _quotas(proc: Path) -> Iterator[tuple[float, float]]:
    """Time of all processors together, and the period in which it may be used, of each group that limits it."""
    for version, folder in _groups("cpu", proc):
        if version == 2:
            words = _words(folder / "cpu.max")
        else:
            words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        with contextlib.suppress(ValueError):  # "max": none
            quota, period = map(float, words)
            if quota > 0 and period > 0:
                yield quota, period


def _memories(proc: Path) -> Iterator[tuple[int, int]]:
    """The limit of each group that has one, and what of it is in use and is not the content of files."""
    names = {
        1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    }
    for version, folder in _groups("memory", proc):
        limits, usage, files = names[version]
        found = [int(word) for name in limits for word in _words(folder / name) if word.isdigit()]
        used = [int(word) for word in _words(folder / usage) if word.isdigit()]
        if found and used:
            counts = dict(zip(*[iter(_words(folder / "memory.stat"))] * 2, strict=False))
            kept = sum(int(counts.get(name, "0")) for name in files)
            yield min(found), max(0, used[0] - kept)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # no limit: the topmost group has none of these files
        return []


_NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}  # a disk may be mounted under a name that is no UTF-8


def _groups(controller: str, proc: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of this process's group, and of all above it that can be seen from here (cgroups(7))."""
    try:
        lines = (proc / "self" / "cgroup").read_text(**_NAMES).splitlines()
        mounts = (proc / "self" / "mountinfo").read_text(**_NAMES).splitlines()
    except OSError:
        return
    mine = {name: path for line in lines for _, names, path in [line.split(":", 2)] for name in names.split(",")}
    for mount in mounts:
        head, _, tail = mount.partition(" - ")
        kind, _, options = [*tail.split(" ", 2), "", ""][:3]
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version is None or (version == 1 and controller not in options.split(",")):
            continue
        path = mine.get(controller if version == 1 else "")
        if path is None:
            continue
        root, point = (PurePosixPath(word.replace("\\040", " ")) for word in head.split()[3:5])
        own = PurePosixPath(path)
        # Seen from within a container, a group may be called by its name outside: what is mounted is the own one then.
        inside = own.is_relative_to(root) and ".." not in own.parts
        folder, top = Path(point, own.relative_to(root) if inside else ""), Path(point)
        yield version, folder
        for parent in folder.parents:
            if not parent.is_relative_to(top):
                break
            yield version, parent
