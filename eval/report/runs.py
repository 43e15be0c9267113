"""Run folders as the report needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from audio_llm.audio import Waveform
from audio_llm.errors import AudioLLMError, ConfigError, describe
from eval.benchmarks import get_benchmark, open_benchmark
from eval.figures.runs import scorers_for
from eval.figures.tables import Reading, RunSummary, Scored, headline_of, score_all, summarise_run
from eval.predictions import Prediction, read, read_manifest
from eval.scorers.base import Score


@dataclass
class Run:
    """A run folder: its tables and its manifest; everything else is computed from its predictions when it is drawn.
    `settings`: of scorers, as ``--with`` gives them."""

    folder: Path
    summary: RunSummary
    manifest: dict[str, Any]
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.summary.name

    @property
    def benchmark(self) -> str:
        """Name of the benchmark, "" where nothing says."""
        return str(self.manifest.get("benchmark", ""))

    @property
    def groups(self) -> tuple[str, ...]:
        """Keys of the items that its benchmark's tables are broken down by."""
        return get_benchmark(self.benchmark).groups if self.benchmark else ()

    @property
    def main_rows(self) -> list[Prediction]:
        return self.summary.rows.get("greedy") or self.summary.rows.get("sampled") or []

    def score(self, row: Prediction) -> Score | None:
        """The headline score of one of its answers."""
        return self.summary.scorer.score(row)

    @cached_property
    def scored(self) -> Scored:
        """Its answers to the true audio under every scorer of its benchmark, and those that `settings` adds."""
        return score_all(self.main_rows, scorers_for(self.benchmark, None, self.settings))

    @property
    def readings(self) -> list[Reading]:
        return next(iter(self.scored.spectrum.values()), [])

    def waveforms(self, wanted: Sequence[str]) -> dict[str, Waveform]:
        """The clips of the items `wanted`, as far as the data is still where it was."""
        data = self.manifest.get("data", [])
        sounds: dict[str, Waveform] = {}
        if not wanted or not data:
            return sounds
        try:
            collection = open_benchmark(self.benchmark or "scenes", data, **self.manifest.get("options", {}))
        except AudioLLMError:  # the report is about stored answers: data that is gone costs only its sounds
            return sounds
        places = {item.id: index for index, item in enumerate(collection.items)}
        for name in wanted:
            try:
                sounds[name] = collection.waveform(places[name])
            except (AudioLLMError, KeyError):
                continue
        return sounds


def load_runs(arguments: Sequence[str], settings: Mapping[str, Mapping[str, str]] | None = None) -> list[Run]:
    """``RUN`` or ``NAME=RUN`` folders, scored by scorers with these `settings`. Raises for a folder without
    predictions and for a name used twice."""
    runs: list[Run] = []
    for argument in arguments:
        name, path = split_name(argument)
        folder = Path(path)
        manifest = read_manifest(folder) if folder.is_dir() else {}
        summary = summarise_run(name, read(folder), scorer=headline_of(manifest, settings))
        runs.append(Run(folder, summary, manifest, settings or {}))
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(describe(f"run '{name}'", "a name of its own", "several", "Name them: NAME=FOLDER."))
    return runs


def split_name(argument: str) -> tuple[str, str]:
    """``NAME=FOLDER`` → both; a bare folder gives its own name."""
    name, separator, path = argument.partition("=")
    if separator and not Path(argument).exists():
        return name, path
    return Path(argument).resolve().name, argument
