"""Speed of ``kind: corpus``: stages of code on one core, the ledger of a million lines, and engines beside each other.

    python benchmarks/corpus.py ledger [--lines 1000000]
    python benchmarks/corpus.py stages FOLDER          # items a second and core of cut, fingerprint and deduplicate
    python benchmarks/corpus.py engines                # ray beside local, two workers, items of 50 ms

Prints JSON lines. Seconds are of the processor where one process works alone, else by the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.corpus.engines import ENGINES
from data_prep.corpus.engines.base import Holder, Job, Running
from data_prep.corpus.ledger import Ledger, hashed, key_of, line_of
from data_prep.corpus.sources.recordings import Recordings
from data_prep.corpus.stage import Item, Reject, Step
from data_prep.corpus.stages import STAGES


@dataclass
class Wait(Step):
    """Takes so long for an item."""

    name: ClassVar[str] = "wait"
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    seconds: float = 0.05  # for one item

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        time.sleep(self.seconds * len(items))
        return list(items)


def say(**facts: Any) -> None:
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in facts.items()}))


def ledger(path: Path, lines: int) -> None:
    """Write a ledger in this process, and open it in another one."""
    fields = {"text": "a dog barks twice in a small room", "seconds": 4.75, "content": "0" * 64}
    with Ledger(path) as written:
        for number in range(lines):
            key = hashed(number)
            written.add(key, line_of(key, Item(f"mine-{number}", fields), tuple(fields)))
    command = [sys.executable, __file__, "open", str(path)]
    subprocess.run(command, check=True)


def open_ledger(path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock, start = time.monotonic(), time.process_time()
    with Ledger(path) as opened:
        seconds, wall = time.process_time() - start, time.monotonic() - clock
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        found = sum(opened.find(hashed(number)) is not None for number in range(10000))
        finding = time.process_time() - start
    size = path.stat().st_size
    say(
        what="ledger",
        lines=len(opened._keys),
        bytes=size,
        open_cpu_seconds=seconds,
        open_wall_seconds=wall,
        peak_mib=peak / 1024,
        more_mib=(peak - before) / 1024,
        finds=found,
        finds_per_second=10000 / finding,
    )


def stages(folder: Path) -> None:
    """Each stage on all items of a folder, in this process."""
    items: list[Any] = [item for item in Recordings(path=folder, corpus="b").items() if isinstance(item, Item)]
    with tempfile.TemporaryDirectory() as out:
        for name in ("cut", "fingerprint", "deduplicate"):
            stage = STAGES.find(name)()
            start = time.process_time()
            holder = Holder(stage, Path(out))
            jobs = [Job(key_of(item, stage.needs, name), item) for item in items]
            calls = [jobs] if stage.whole else [[job] for job in jobs]
            lines = [json.loads(line) for call in calls for line in holder.call(call)]
            seconds = time.process_time() - start
            say(what="stage", stage=name, items=len(items), cpu_seconds=seconds, per_second=len(items) / seconds)
            both = zip(items, lines, strict=True)
            items = [item.adding(**line["fields"]) for item, line in both if "fields" in line]


def engines(count: int) -> None:
    """Items of 50 ms by two workers of each engine; starting them does not count."""
    for name in ("local", "ray"):
        with tempfile.TemporaryDirectory() as out:
            pool = ENGINES.find(name)().pool(Path(out), 2)
            done = pool.map("wait", Wait(), Running(cpus=0.5), (Job(hashed(n), Item(str(n), {})) for n in range(count)))
            for _ in range(2):
                next(done)
            start = time.monotonic()
            left = sum(1 for _ in done)
            say(what="engine", engine=name, items=left, per_second=left / (time.monotonic() - start))
            pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ledger", "open", "stages", "engines"))
    parser.add_argument("path", nargs="?", type=Path, help="a folder of recordings, or a ledger")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200)
    args = parser.parse_args()
    if args.what == "ledger":
        with tempfile.TemporaryDirectory() as folder:
            ledger(Path(folder) / "ledger.jsonl", args.lines)
    elif args.what == "engines":
        engines(args.items)
    elif args.path is None:
        parser.error(f"{args.what} needs a path")
    elif args.what == "open":
        open_ledger(args.path)
    else:
        stages(args.path)


if __name__ == "__main__":
    main()
