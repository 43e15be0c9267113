"""Speed of ``kind: corpus``: stages of code on one core, the ledger of a million lines, and engines beside each other.

    python benchmarks/corpus.py ledger [--lines 1000000]
    python benchmarks/corpus.py stages FOLDER [--clips wav]    # items a second and core; FOLDER: ESC-10's recordings
    python benchmarks/corpus.py engines                # ray beside local, two workers, items of 50 ms

Prints JSON lines. Seconds are of the processor where one process works alone, else by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
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
from data_prep.scenes import pool

CAPTIONS = Path(__file__).parents[1] / "recipes" / "corpus" / "tiny_captions.csv"


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


# The stages of code in the order of a recipe, and whether they decode sounds: those cost by their seconds.
STAGES_OF_CODE: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("classify", False, {"threshold": 0.45}),
    ("cut", True, {}),
    ("fingerprint", True, {}),
    ("deduplicate", False, {"near": "join"}),
    ("describe", True, {"labels": ["label"]}),
    ("generate", False, {"count": 3, "forms": {"choice": 4, "open": 1, "caption": 1}}),
    ("verify", False, {"thinking_words": (5, 120)}),
    ("pack", True, {"splits": {"sft": 0.8, "test": 0.2}}),
)


def stages(folder: Path, clips: str) -> None:
    """Each stage of code on the captions of the tiny recipe, of recordings in `folder`; opening does not count, but
    the worker processes of `pack` do."""
    columns = {"audio": "filename", "id": "filename", "text": "caption", "label": "label", "group": "recording"}
    start = spent()
    source = Recordings(path=CAPTIONS, corpus="b", format="csv", root=folder, columns=columns)
    items: list[Any] = [item for item in source.items() if isinstance(item, Item)]
    tell("recordings", False, len(items), spent() - start, 0.0)
    with tempfile.TemporaryDirectory() as out:
        for name, decodes, keys in STAGES_OF_CODE:
            stage = STAGES.find(name)(**keys | ({"format": clips} if name == "cut" else {}))
            holder = Holder(stage, Path(out))
            start = spent()
            jobs = [Job(key_of(item, stage.needs, name), item) for item in items]
            calls = [jobs] if stage.whole else [[job] for job in jobs]
            (Path(out) / "items").mkdir(exist_ok=True)
            lines = [json.loads(line) for call in calls for line in holder.call(call)]
            pool.stop()  # what workers took is known when they have ended
            seconds = spent() - start
            stage.close()
            both = list(zip(items, lines, strict=True))
            kept = [item.adding(**line["fields"]) for item, line in both if "fields" in line]
            sound = sum(item.fields.get("seconds", 0.0) for item in (kept if name == "cut" else items))
            tell(name, decodes, len(items), seconds, sound)
            items = kept


def tell(name: str, decodes: bool, items: int, seconds: float, sound: float) -> None:
    rate = {"sound_seconds_per_second": sound / seconds} if decodes else {}
    say(what="stage", stage=name, items=items, cpu_seconds=seconds, per_second=items / seconds, **rate)


def spent() -> float:
    """Processor seconds of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def engines(count: int) -> None:
    """Items of 50 ms by two workers of each engine; starting them does not count."""
    for name in ("local", "ray"):
        with tempfile.TemporaryDirectory() as out:
            workers = ENGINES.find(name)().pool(Path(out), 2)
            done = workers.map(
                "wait", Wait(), Running(cpus=0.5), (Job(hashed(n), Item(str(n), {})) for n in range(count))
            )
            for _ in range(2):
                next(done)
            start = time.monotonic()
            left = sum(1 for _ in done)
            say(what="engine", engine=name, items=left, per_second=left / (time.monotonic() - start))
            workers.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ledger", "open", "stages", "engines"))
    parser.add_argument("path", nargs="?", type=Path, help="a folder of recordings, or a ledger")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--clips", choices=("flac", "wav"), default="flac", help="format of the clips that are cut")
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
        stages(args.path, args.clips)


if __name__ == "__main__":
    main()
