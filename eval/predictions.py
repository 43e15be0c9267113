"""Predictions: JSONL, one line per item and pass, from which every score is recomputed.

A predictions file only ever grows by whole lines; a line torn by a kill is cut off when the run is taken up again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from audio_llm.errors import AudioLLMError, describe
from audio_llm.files import parse_json
from audio_llm.language.replies import Reply, read_reply

FILE_NAME = "predictions.jsonl"
MANIFEST_NAME = "run.json"
BLOCK = 2**20  # bytes of a file that are looked at together
# A line that a disk, a copy or a hand damaged; one that a kill tore is cut off by itself.
ANEW = "Delete that line and repeat the command of its run: what it held, and nothing else, is asked again."


class PredictionsError(AudioLLMError):
    """A predictions file or a run folder that cannot be used."""


@dataclass(slots=True)
class Prediction:
    """One answer. `control` is "" for the true audio, else the control's name; `error` tells why there is no answer.

    `gold` and `choices` are those of the pass (mirrored under ``swap``, permuted under ``shuffled_options``);
    `instruction` and `answer_as` are what the prompt asked for beyond the question (see ``prompts.ANSWERS_AS``).
    `seconds` is the wall time of the batch divided by its size where the engine batches.
    """

    id: str
    question_type: str
    format: str
    question: str
    choices: list[str]
    gold: str
    raw: str = ""
    control: str = ""
    temperature: float = 0.0
    sample: int = 0
    seed: int = 0
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_hash: str = ""
    seconds: float = 0.0
    error: str = ""
    clip: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = field(default_factory=list)
    instruction: str = ""
    answer_as: str = ""

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What makes a line unique in a run: item, control, temperature, sample."""
        return self.id, self.control, self.temperature, self.sample

    @property
    def cluster(self) -> str:
        """What its answer is not independent of, the unit of intervals and tests: the recording that a scene's (first)
        sound is cut from, else the clip asked about, else itself."""
        first = self.meta.recording if isinstance(self.meta, FoldedMeta) else _recording(self.meta)
        return first or self.clip or self.id

    def reply(self) -> Reply:
        """The raw reply taken apart, read as it was asked for."""
        return _read_once(self.raw, tuple(self.choices), self.answer_as)

    def to_json(self) -> str:
        tree = {name: getattr(self, name) for name in KINDS}
        return json.dumps(tree | {"meta": dict(self.meta), "events": [*self.events]}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str, where: str) -> Prediction:
        """The prediction that a line holds. Raises :class:`PredictionsError` for a line torn, foreign or mistyped."""
        try:
            tree = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            why = getattr(error, "msg", "brackets nested without end")
            raise PredictionsError(describe(where, "one JSON object a line", f"{line[:60]!r} ({why})", ANEW)) from error
        required = ("id", "question_type", "format", "question", "choices", "gold", "raw")
        missing = [name for name in required if not isinstance(tree, dict) or name not in tree]
        if missing:
            raise PredictionsError(describe(where, f"the keys {', '.join(required)}", f"no {', '.join(missing)}", ANEW))
        values: dict[str, Any] = {}
        for name, value in tree.items():
            if (fits := KINDS.get(name)) is None:
                continue
            if type(value) is str and name in _TEXTS:  # most texts are those of other rows as well
                values[name] = sys.intern(value)
            elif fits(value):
                values[name] = value
            else:
                declared = str(cls.__dataclass_fields__[name].type)
                kind = declared.replace("Sequence[", "list[").replace("Mapping[", "dict[")  # as JSON gives them
                told = f"a value of type {kind}"
                raise PredictionsError(describe(f"{where}: '{name}'", told, f"{value!r:.60}", ANEW))
        values["choices"] = [*map(sys.intern, values["choices"])]
        values["meta"] = FoldedMeta(values.get("meta", {}))
        values["events"] = FoldedEvents(values.get("events", []))
        return cls(**values)


class FoldedMeta(Mapping[str, Any]):
    """A mapping of JSON as its text, a fifth of what Python needs for it. It is read anew whenever it is asked for, but
    for the first of its ``recordings``, which every figure asks for."""

    __slots__ = ("recording", "text")

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.text = sys.intern(json.dumps(tree))
        self.recording = sys.intern(_recording(tree))

    def __getitem__(self, name: str) -> Any:
        if name.isascii() and name.isidentifier() and f'"{name}"' not in self.text:  # most rows lack most names
            raise KeyError(name)
        return _unfolded(self.text)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_unfolded(self.text))

    def __len__(self) -> int:
        return len(_unfolded(self.text))

    def __repr__(self) -> str:
        return self.text


class FoldedEvents(Sequence[Mapping[str, Any]]):
    """A list of JSON as its text."""

    __slots__ = ("text",)

    def __init__(self, events: Sequence[Mapping[str, Any]]) -> None:
        self.text = sys.intern(json.dumps(events)) if events else "[]"

    def __getitem__(self, place: Any) -> Any:
        return _unfolded(self.text)[place]

    def __len__(self) -> int:
        return len(_unfolded(self.text))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    def __repr__(self) -> str:
        return self.text


@lru_cache(maxsize=16)  # of a row several things are asked, one after the other
def _unfolded(text: str) -> Any:
    return json.loads(text)


def _recording(meta: Mapping[str, Any]) -> str:
    recordings = meta.get("recordings")
    return str(recordings[0]) if isinstance(recordings, list) and recordings else ""


@lru_cache(maxsize=100_000)
def _read_once(raw: str, choices: tuple[str, ...], answer_as: str) -> Reply:
    """All scorers of a run ask what the same replies say."""
    return read_reply(raw, choices, answer_as)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(part, kind) for part in value)


# What a value of a line must be, by the type its field is declared with.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": _is_number,
    "list[str]": _is_list_of(str),
    "Sequence[Mapping[str, Any]]": _is_list_of(dict),
    "Mapping[str, Any]": lambda value: isinstance(value, dict),
}
KINDS = {entry.name: _CHECKS[str(entry.type)] for entry in dataclasses.fields(Prediction)}
_TEXTS = frozenset(entry.name for entry in dataclasses.fields(Prediction) if entry.type == "str")
KINDS["events"] = lambda value: _is_list_of(dict)(value) and all(map(_is_event, value))


def _is_event(event: dict[str, Any]) -> bool:
    """Whether a label is a text and a place numbers, as far as they are known."""
    known = {name: value for name, value in event.items() if value is not None}
    places = [known.get(name, 0.0) for name in ("onset", "offset", "azimuth", "elevation", "distance")]
    return isinstance(known.get("label", ""), str) and all(map(_is_number, places))


def read(path: str | Path) -> list[Prediction]:
    """All predictions of a file or run folder, in order. Raises :class:`PredictionsError` (missing, empty, torn,
    doubled)."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise PredictionsError(
            describe(str(path), "a predictions file", "none", "Make one with: audio-llm eval MODEL SHARDS --out RUN.")
        )
    rows = _rows(path)
    if not rows:
        raise PredictionsError(describe(str(path), "predictions", "none", "Repeat the command of its run."))
    return rows


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, of which rows and scores form none: it would go through all of them again and
    again, for a third of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def questions_asked(rows: Iterable[Prediction]) -> int:
    """How many questions the model got with their own sound."""
    return len({row.id for row in rows if not row.control and not row.error})


def _rows(path: Path) -> list[Prediction]:
    rows: list[Prediction] = []
    seen: set[tuple[str, str, float, int]] = set()
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        row = Prediction.from_json(line, f"{path} line {number}")
        if row.key in seen:
            found = f"'{row.id}' twice ({row.control or 'true audio'})"
            raise PredictionsError(describe(f"{path} line {number}", "every item once a pass", found, ANEW))
        seen.add(row.key)
        rows.append(row)
    return rows


def _lines(path: Path) -> Iterator[str]:
    """Lines by newline alone: a reply may hold other characters that Unicode counts as line ends."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise PredictionsError(describe(f"{path} line {number}", "UTF-8 text", "other bytes", ANEW)) from error


def mend(path: Path) -> list[Prediction]:
    """Predictions of an interrupted run: a last line without its newline is cut from the file, the rest is kept."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end and (newline := _last_newline(file, end)) < 0:
            end = max(0, end - BLOCK)
    if (whole := newline + 1 if end else 0) < size:
        os.truncate(path, whole)
    return _rows(path)


def _last_newline(file: IO[bytes], end: int) -> int:
    """Where the last newline of the block before `end` is; -1 where it has none."""
    start = max(0, end - BLOCK)
    file.seek(start)
    found = file.read(end - start).rfind(b"\n")
    return start + found if found >= 0 else -1


class PredictionWriter:
    """Appends predictions; after :meth:`write` returns, the lines survive a kill of the process and of the machine."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate in a reply becomes its JSON escape, which reads back as what it was.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, rows: Iterable[Prediction]) -> None:
        self._file.write("".join(row.to_json() + "\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# What tables and reports read of a manifest.
MANIFEST: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "benchmark": ("str", _CHECKS["str"]),
    "options": ("dict[str, str]", lambda value: isinstance(value, dict) and _is_list_of(str)([*value.values()])),
    "data": ("list[str]", _CHECKS["list[str]"]),
    "settings": ("dict", _CHECKS["Mapping[str, Any]"]),
    "scorer": ("dict", _CHECKS["Mapping[str, Any]"]),
}


def read_manifest(run: str | Path) -> dict[str, Any]:
    """The run's ``run.json``; an empty mapping where only a predictions file is given. Raises
    :class:`PredictionsError` where it is none."""
    path = Path(run) / MANIFEST_NAME
    if not path.is_file():
        return {}
    try:
        tree = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PredictionsError(describe(str(path), "a JSON object", f"something else ({error})")) from error
    if not isinstance(tree, dict):
        raise PredictionsError(describe(str(path), "a JSON object", type(tree).__name__))
    for name, (kind, is_one) in MANIFEST.items():
        if name in tree and not is_one(tree[name]):
            raise PredictionsError(describe(f"{path}: '{name}'", f"a value of type {kind}", f"{tree[name]!r:.60}"))
    return tree
