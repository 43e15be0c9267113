"""Benchmarks by name: one file of this folder each, which ends with ``BENCHMARK = <instance>``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from audio_llm.registry import Folder

if TYPE_CHECKING:
    from eval.benchmarks.base import Benchmark, Collection

BENCHMARKS = Folder(__name__, "BENCHMARK", "benchmark", needs="open")


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`, or ``package.module:NAME``. Raises :class:`ConfigError` with the nearest name."""
    benchmark: Benchmark = BENCHMARKS.find(name)
    return benchmark


def open_benchmark(name: str, data: str | Path | Sequence[str | Path], **options: str) -> Collection:
    """The items of one or several folders or files `data` of the benchmark `name`. Raises children of
    ``AudioLLMError`` where one of them is malformed or holds none; an item without a right answer has its error."""
    from eval.benchmarks.base import join, settle_answers

    paths = [data] if isinstance(data, (str, Path)) else list(data)
    benchmark = get_benchmark(name)
    collections = [benchmark.open(Path(path), **options) for path in paths]
    for path, collection in zip(paths, collections, strict=True):
        settle_answers(collection, str(path))
    return join(collections, [str(path) for path in paths])
