"""Benchmarks by name: one file of this folder each, which ends with ``BENCHMARK = <instance>`` or is a declaration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from audio_llm.registry import Folder

if TYPE_CHECKING:
    from eval.benchmarks.base import Benchmark, Collection

BENCHMARKS = Folder(__name__, "BENCHMARK", "benchmark", needs="open", instances=True)


def names() -> list[str]:
    """All that there are in this folder, of which none is imported."""
    here = Path(__file__).parent
    written = {file.stem for file in here.glob("*.py") if "\nBENCHMARK = " in file.read_text(encoding="utf-8")}
    return sorted([*(written - {"declared"}), *(file.stem for file in here.glob("*.yaml"))])


def is_declaration(name: str) -> bool:
    """Whether `name` is that of a YAML file, wherever it lies, and not of a benchmark of ours."""
    return Path(name).suffix.lower() in (".yaml", ".yml")


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`, ``package.module:NAME``, or the one that a YAML file declares. Raises
    :class:`ConfigError` with the nearest name."""
    if is_declaration(name):
        from eval.benchmarks.declared import Declared

        return Declared.read(Path(name))
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
