"""Benchmarks by name: one file each, found by being here."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from audio_llm.errors import ConfigError, nearest
from eval.benchmarks.base import Benchmark, Collection, join


def benchmark_names() -> list[str]:
    """The benchmarks there are, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`. Raises :class:`ConfigError` with the nearest name."""
    names = benchmark_names()
    if name not in names:
        raise ConfigError(f"benchmark '{name}': expected one of {', '.join(names)}{nearest(name, names)}.")
    benchmark: Benchmark = import_module(f"{__name__}.{name}").BENCHMARK
    return benchmark


def open_benchmark(name: str, data: str | Path | Sequence[str | Path], **options: str) -> Collection:
    """The items of one or several folders or files `data` of the benchmark `name`."""
    paths = [data] if isinstance(data, (str, Path)) else list(data)
    benchmark = get_benchmark(name)
    return join([benchmark.open(Path(path), **options) for path in paths])
