"""Benchmarks by name: one file each, found by being here."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from audio_llm.errors import ConfigError, describe, nearest
from eval.benchmarks.base import Benchmark, BenchmarkError, Collection, join, settle_answers


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
    """The items of one or several folders or files `data` of the benchmark `name`. Raises children of
    ``AudioLLMError`` where one of them is malformed or holds none; an item without a right answer has its error."""
    paths = [data] if isinstance(data, (str, Path)) else list(data)
    benchmark = get_benchmark(name)
    collections = [benchmark.open(Path(path), **options) for path in paths]
    for path, collection in zip(paths, collections, strict=True):
        if not collection.items:
            raise BenchmarkError(describe(str(path), "questions", "none"))
        settle_answers(collection)
    return join(collections, [str(path) for path in paths])
