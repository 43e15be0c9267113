"""One GPU in nine minutes: what it computes, how fast, and against which limit.

    bash scripts/gpu.sh [--out gpu.json] [--only sft grpo] [--seconds 540]
    bash scripts/gpu.sh --dry-run       # every part at tiny shapes, on a CPU

Every part runs in a process of its own: one that fails, or takes longer than what is left, is told by name and the next
begins. A part whose packages are not there is skipped by name. The exit code is 1 where a part failed or a stated limit
was missed. Weights are random in the shapes of published models; nothing is fetched.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECONDS = 540.0


@dataclass
class Row:
    """One figure; `limit` says what it has to be, `met` whether it is (None: nothing is asked of it)."""

    what: str
    value: float
    unit: str = ""
    limit: str = ""
    met: bool | None = None


@dataclass
class Part:
    """What is measured by `function` of benchmarks.gpu_parts(device, tiny) -> rows, or by a `command` of its own."""

    name: str
    function: str = ""
    command: list[str] = field(default_factory=list)
    dry: list[str] = field(default_factory=list)  # the command's arguments at tiny shapes
    needs: tuple[str, ...] = ()


PARTS = (
    Part("encoders", "encoders"),
    Part("front ends", "front_ends", needs=("librosa",)),
    Part("mamba", "mamba"),
    Part("sft", "sft", needs=("peft",)),
    Part("grpo", "grpo", needs=("peft",)),
    Part("precision", "precision", needs=("peft",)),
    Part(
        "rollouts",
        command=["benchmarks.rollout", "--hidden", "896", "--layers", "24", "--batch", "1", "32", "256"],
        dry=["benchmarks.rollout", "--batch", "1", "4", "--tokens", "8", "--rounds", "1"],
        needs=("vllm",),
    ),
    Part("sync", command=["benchmarks.sync"], dry=["benchmarks.sync"], needs=("vllm",)),
)


def missing(part: Part) -> list[str]:
    """What `part` needs and is not there."""
    return [name for name in part.needs if find_spec(name) is None]


def _work(function: str, device: str, tiny: bool, path: str) -> None:
    """In the part's process: its rows, or its error, as JSON."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parts = importlib.import_module("benchmarks.gpu_parts")
    try:
        rows = [asdict(row) for row in getattr(parts, function)(device, tiny)]
        Path(path).write_text(json.dumps({"rows": rows}))
    except Exception as error:  # any: the next part has to begin
        traceback.print_exc()
        Path(path).write_text(json.dumps({"failed": f"{type(error).__name__}: {error}".splitlines()[0]}))


def run_part(part: Part, device: str, tiny: bool, seconds: float) -> dict[str, Any]:
    """{"rows": ...}, {"skipped": why} or {"failed": why}, after at most `seconds`."""
    if absent := missing(part):
        return {"skipped": f"needs {', '.join(absent)}"}
    if seconds <= 0:
        return {"skipped": "no time was left"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        if part.command:
            return _command(part.dry if tiny else part.command, path, seconds)
        # A fork of a process that has imported torch and computed nothing: an import takes longer than a small part.
        process: Any = multiprocessing.get_context("fork").Process(
            target=_work, args=(part.function, device, tiny, str(path))
        )
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return {"failed": f"took longer than {seconds:.0f} s"}
        return json.loads(path.read_text()) if path.is_file() else {"failed": f"ended with {process.exitcode}"}


def _command(arguments: list[str], path: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", *arguments, "--out", str(path)]
    try:
        code = subprocess.run(command, stdout=sys.stderr, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {seconds:.0f} s"}
    if not path.is_file():
        return {"failed": f"ended with {code}"}
    return {"rows": [asdict(row) for row in _figures(json.loads(path.read_text()))]}


def _figures(tree: Any, name: str = "") -> list[Row]:
    """Every number of another benchmark's JSON, by its path."""
    if isinstance(tree, dict):
        return [row for key, value in tree.items() if key != "arguments" for row in _figures(value, f"{name} {key}")]
    if isinstance(tree, list):
        return [row for number, value in enumerate(tree) for row in _figures(value, f"{name} {number}")]
    return [Row(name.strip(), float(tree))] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


def printed(name: str, result: dict[str, Any]) -> str:
    """A part's lines of the table."""
    for word in ("skipped", "failed"):
        if word in result:
            return f"{name:<12}{word}: {result[word]}"
    lines = []
    for row in result["rows"]:
        verdict = "" if row["met"] is None else f"   {row['limit']}: {'met' if row['met'] else 'MISSED'}"
        lines.append(f"{name:<12}{row['what']:<52}{row['value']:>12.4g} {row['unit']}{verdict}")
    return "\n".join(lines)


def main(argv: list[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(argv)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu: expected a GPU that torch can use, found none. On a CPU: --dry-run.", file=sys.stderr)
        return 2
    device, begun, results = "cpu" if args.dry_run else "cuda", clock(), {}
    importlib.import_module("benchmarks.gpu_parts")
    for part in PARTS:
        if args.only and part.name not in args.only:
            continue
        start = clock()
        results[part.name] = run_part(part, device, args.dry_run, args.seconds - (start - begun))
        print(printed(part.name, results[part.name]), flush=True)
        results[part.name]["seconds"] = round(clock() - start, 1)
        args.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "parts": results}, indent=2))
    rows = [row for result in results.values() for row in result.get("rows", [])]
    failed = [name for name, result in results.items() if "failed" in result]
    missed = [row["what"] for row in rows if row["met"] is False]
    print(f"\n{len(rows)} figures in {clock() - begun:.0f} s; failed: {', '.join(failed) or 'none'}", end="; ")
    print(f"missed: {', '.join(missed) or 'none'}; written to {args.out}")
    return int(bool(failed or missed))


if __name__ == "__main__":
    sys.exit(main())
