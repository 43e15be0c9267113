"""DCASE 2025 task 5, audio question answering: its three parts, the known defects of its files, and its submissions.

One JSON file a question (``id, audio_url, question, choice, answer, question_type``; a hidden test has no ``answer``),
in any folders, or all of them in one JSON, JSON lines or Parquet file. Part 1 is bioacoustics, part 2 temporal
soundscapes, part 3 complex questions (Yang et al. 2025, "Multi-Domain Audio Question Answering Toward Acoustic Content
Reasoning in the DCASE 2025 Challenge").

Nothing is dropped without a count: repaired and unusable rows are named in :class:`Questions`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from audio_llm.audio import Waveform, decode
from audio_llm.datasets.folders import files_below, find_file
from audio_llm.datasets.records import SUFFIXES, Cell, Record, read_records
from audio_llm.errors import DataError, describe
from audio_llm.files import atomic_file, content_hash, glance, write_atomically
from audio_llm.language.replies import read_key, strip_letters
from audio_llm.yaml_text import yaml_of

PARTS = {1: "bioacoustics", 2: "temporal soundscapes", 3: "complex questions"}
_SPLIT = re.compile(r"(train|dev|eval|test|val|validation)(?:-\d+-of-\d+)?")  # a folder, or a Parquet file of a hub
_PART = re.compile(r"part[ _-]?([123])(?!\d)", re.IGNORECASE)
Key = Literal["id", "stem"]
AnswerForm = Literal["text", "letter"]


@dataclass(frozen=True)
class Question:
    """One question. `choices` are without their letters, `options` as the file has them (``A. text``).

    `answer` is the index of the right choice, None on a hidden test or where the answer is none of the choices (then
    `problem` says so). `stem` is the name of its JSON file; `audio` the file, or the Parquet cell, of its sound.
    """

    id: str
    stem: str
    part: int
    question: str
    choices: tuple[str, ...]
    options: tuple[str, ...]
    answer: int | None
    question_type: str
    audio: Path | Cell
    problem: str = ""

    @property
    def gold(self) -> str:
        """The right choice's text; "" where it is not known."""
        return "" if self.answer is None else self.choices[self.answer]

    def waveform(self) -> Waveform:
        """Its sound, by content whatever the file is called. Raises :class:`AudioLLMError` where it cannot be heard."""
        if isinstance(self.audio, Path):
            return decode(self.audio)
        return decode(self.audio.data(), name=f"audio of '{self.id}'")


@dataclass
class Questions:
    """Questions in the order of their files. `counts` tells what was repaired and what cannot be used, by reason."""

    rows: list[Question]
    counts: dict[str, int] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @cached_property
    def contents(self) -> list[str]:
        """What each question's clip is known by: equal bytes, equal name (see :func:`content_names`)."""
        names = content_names(row.audio for row in self.rows)
        return [names[row.audio] for row in self.rows]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and bytes of the question files, sorted by name."""
        digest = hashlib.sha256()
        for path in sorted(self.files, key=lambda path: path.name):
            digest.update(f"{path.name}\0{content_hash(path)}\n".encode())
        return digest.hexdigest()

    @property
    def sounds(self) -> str:
        """Of what :func:`audio_llm.files.glance` sees of the questions' sounds."""
        digest = hashlib.sha256()
        for row in self.rows:
            seen = glance(row.audio) if isinstance(row.audio, Path) else ""  # a cell's file is one of the questions
            digest.update(f"{row.id}\0{seen}\n".encode())
        return digest.hexdigest()[:16]


def read(data: str | Path, audio: str | Path | None = None) -> Questions:
    """The questions under `data`, a folder of JSON files or one file; their sound beside them or in the folder `audio`.

    Raises :class:`DataError` naming file and key for what is malformed, and for an id that occurs twice. A missing
    sound file is no error here: it is counted, and an error when the clip is asked for.
    """
    root = Path(data)
    if audio is not None and not Path(audio).is_dir():
        raise DataError(describe(str(audio), "a folder of audio files", "none"))
    files = question_files(root)
    counts: Counter[str] = Counter()
    rows: list[Question] = []
    for path in files:
        for record in read_records(path):
            rows.append(read_question(record, path, root if root.is_dir() else root.parent, audio, counts))
    if not rows:
        raise DataError(describe(str(root), "questions", "none"))
    _refuse_doubles(rows)
    for path in {row.audio for row in rows if isinstance(row.audio, Path)}:
        if not path.is_file():
            counts["audio file missing"] += 1
        elif path.suffix.lower() == ".wav" and is_mpeg(path):
            counts["MPEG audio named .wav"] += 1
    return Questions(rows, dict(counts), files)


def content_names(sounds: Iterable[Path | Cell]) -> dict[Path | Cell, str]:
    """A name for every sound, equal for equal bytes: SHA-256, or for a file of a size of its own its name and size.

    Only files of equal size can be equal, so that a folder of clips is not read twice. The size of what is inside a
    Parquet file is not known without reading it, so that it is read, once.
    """
    distinct = list(dict.fromkeys(sounds))
    digests: dict[Path | Cell, str] = {}
    sizes: dict[Path | Cell, int] = {}
    for sound in distinct:
        if isinstance(sound, Path):
            sizes[sound] = sound.stat().st_size if sound.is_file() else -1
            continue
        try:
            data = sound.data()
        except DataError:  # counted where it is to be heard
            sizes[sound], digests[sound] = -1, f"row {sound.row} of {sound.path.name} (no bytes)"
        else:
            sizes[sound], digests[sound] = len(data), hashlib.sha256(data).hexdigest()
    crowd = Counter(sizes.values())
    for sound in distinct:
        if isinstance(sound, Path):
            alone = sizes[sound] < 0 or crowd[sizes[sound]] == 1
            digests[sound] = f"{sound.name} ({sizes[sound]} bytes)" if alone else content_hash(sound)
    return digests


def heard_in_both(train: Questions, held_out: Questions) -> list[int]:
    """Rows of `held_out` whose clip is, byte for byte, a clip of `train` as well, in files or inside a Parquet file."""
    names = content_names(row.audio for part in (train, held_out) for row in part.rows)
    known = {names[row.audio] for row in train.rows if not isinstance(row.audio, Path) or row.audio.is_file()}
    return [n for n, row in enumerate(held_out.rows) if names[row.audio] in known]


def is_mpeg(path: str | Path) -> bool:
    """Whether a file begins as MPEG audio does: an ID3 tag, or the 11 set bits of a frame header."""
    with open(path, "rb") as file:
        head = file.read(3)
    return head == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)


# ------------------------------------------------------------------------------------------------ reading


def question_files(root: Path) -> list[Path]:
    """The files of questions below a folder, sorted, or the one file that `root` is. Raises :class:`DataError`."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(describe(str(root), "a folder of questions, or a file of them", "no such path"))
    files = files_below(root, endings=SUFFIXES)
    if not files:
        raise DataError(describe(str(root), f"question files ({', '.join(SUFFIXES)})", "none"))
    parts = {part for path in files for part in (*path.relative_to(root).parts[:-1], path.stem)}
    splits = {found[1] for part in parts if (found := _SPLIT.fullmatch(part.lower()))}
    if "train" in splits and len(splits) > 1:
        raise DataError(
            describe(str(root), "the questions of one split", ", ".join(sorted(splits)), "Name one of them.")
        )
    return files


def read_question(record: Record, path: Path, root: Path, audio: str | Path | None, counts: Counter[str]) -> Question:
    """A row of the file `path` below the folder `root`, its sound there or in `audio`; `counts` learns what had to be
    repaired. Raises :class:`DataError`."""
    url = record.text("audio_url", default="")
    if not url and "audio" not in record.values:
        raise record.lacks("audio_url", "audio")
    stem = path.stem if record.where == str(path) else record.identity("id")
    options = tuple(option.strip() for option in record.texts("choice", "choices"))
    choices = strip_letters(options)
    if choices == options and len(options) > 1:
        counts["options without letters"] += 1
    said = record.text("answer", default="")
    answer, note = read_key(said, choices) if said.strip() else (None, "")
    if note:
        counts[note if answer is not None else "answer is none of the options"] += 1
    identity = record.identity("id", default="").strip() or stem
    cell = record.values.get("audio")
    return Question(
        id=identity,
        stem=stem,
        part=part_of(record, path, identity, url),
        question=record.text("question", "question_text").strip(),
        choices=choices,
        options=options,
        answer=answer,
        question_type=record.text("question_type", default="").strip() or "not stated",
        audio=cell if isinstance(cell, Cell) else find_audio(url, path, root, audio),
        problem=note if said.strip() and answer is None else "",
    )


def part_of(record: Record, path: Path, identity: str, url: str) -> int:
    """1, 2 or 3: by ``subset``, the id, the names of file and folders; else by how the parts name their sound files."""
    for name in (str(record.values.get("subset") or ""), identity, path.stem, *reversed(path.parts[:-1]), url):
        if match := _PART.search(name):
            return int(match[1])
    base = Path(url).name.casefold()
    return 2 if base.startswith("fold") else 3 if base.startswith("audio") else 1


def find_audio(url: str, path: Path, root: Path, audio: str | Path | None) -> Path:
    """The sound file of a question: in `audio` where given, else beside its JSON file, else under `root`.

    The same base name stands for other clips in other splits, so that a longer part of the path is tried first.
    """
    relative = Path(re.sub(r"^[a-z]+://[^/]*/", "", url.replace("\\", "/")).lstrip("/"))
    if audio is not None:
        tails = [
            Path(*relative.parts[start:]) for start in range(len(relative.parts)) if ".." not in relative.parts[start:]
        ]
        candidates = [find_file(Path(audio), str(tail)) for tail in tails]
    else:
        named = [find_file(folder, str(relative)) for folder in (path.parent, root, *root.parents[:1])]
        # The published lists lie at questions/SPLIT/ and say ../../audio/SPLIT/; nothing beyond that folder is read.
        whole = Path(os.path.abspath(path)).parents[:3][-1]
        candidates = [file for file in named if Path(os.path.abspath(file)).is_relative_to(whole)]
        if not candidates:
            raise DataError(describe(f"{path}: sound '{url}'", f"a file under {whole}", "one outside"))
    return next((file for file in candidates if file.is_file()), candidates[-1] if audio else candidates[0])


def _refuse_doubles(rows: Sequence[Question]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            cure = "Read the splits one at a time." if seen[row.id] != row.stem else None
            raise DataError(describe(f"question '{row.id}'", "an id that occurs once", "a second one", cure))
        seen[row.id] = row.stem


# ------------------------------------------------------------------------------------------------ submissions

MAX_MEMBER_BYTES = 2**26  # of a package, unpacked
LABEL = re.compile(r"[A-Za-z][A-Za-z-]*_[A-Za-z0-9-]+_task5_[1-4]")
# The blocks of DCASE's system description; what is empty must be filled in by hand before it is handed in.
META: dict[str, Any] = {
    "submission": {"label": "", "name": "", "abbreviation": "", "authors": []},
    "system": {
        "description": {
            "input_sampling_rate": "",
            "acoustic_features": "",
            "machine_learning_method": "",
            "pretrained_models": "",
            "ensemble_method_subsystem_count": "",
        },
        "complexity": {"total_parameters": ""},
        "external_resources": [],
    },
    "results": {"development_dataset": {}},
}


@dataclass(frozen=True)
class Answered:
    """A question's place in a submission: its keys, its options as published, the index of the chosen one."""

    id: str
    stem: str
    options: tuple[str, ...]
    choice: int | None


def write_csv(rows: Iterable[Answered], path: str | Path, *, key: Key = "id", answer: AnswerForm = "text") -> Path:
    """Write ``question,answer``; a question without an answer gets an empty one, never a guess."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["question", "answer"])
    for row in rows:
        writer.writerow([getattr(row, key), "" if row.choice is None else _answer_text(row, answer)])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def _answer_text(row: Answered, answer: AnswerForm) -> str:
    return ascii_uppercase[row.choice or 0] if answer == "letter" else row.options[row.choice or 0]


def write_submission(
    rows: Sequence[Answered],
    out: str | Path,
    *,
    label: str,
    key: Key = "id",
    answer: AnswerForm = "text",
    meta: Mapping[str, Any] | None = None,
) -> list[Path]:
    """``<label>.output.csv``, ``<label>.meta.yaml`` and both of them in ``<label>.zip``. `meta` fills DCASE's blocks.

    Raises :class:`DataError` for a label that is not ``Surname_INST_task5_k`` (at most four systems).
    """
    if not LABEL.fullmatch(label):
        raise DataError(describe("submission label", "Surname_INST_task5_1 to _4", f"'{label}'"))
    folder = Path(out)
    table = write_csv(rows, folder / f"{label}.output.csv", key=key, answer=answer)
    tree = _filled(META, {"submission": {"label": label}}, "")
    tree = _filled(tree, meta or {}, "")
    about = folder / f"{label}.meta.yaml"
    write_atomically(about, yaml_of(tree))
    package = folder / f"{label}.zip"
    with atomic_file(package) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (table, about):
            # A fixed date: the same answers give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{label}/{path.name}", (1980, 1, 1, 0, 0, 0)), path.read_bytes())
    return [table, about, package]


def _filled(tree: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tree` with `values` put in, block by block; keys of DCASE's own blocks may be added to, not misspelt away."""
    merged = dict(tree)
    for name, value in values.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and not isinstance(value, Mapping):
            raise DataError(describe(f"meta: {where}{name}", "a block of keys", f"{value!r:.40}"))
        merged[name] = _filled(old, value, f"{where}{name}.") if isinstance(old, Mapping) else value
    return merged


def validate_submission(
    path: str | Path,
    questions: Sequence[Question | Answered],
    *,
    key: Key = "id",
    answer: AnswerForm = "text",
    unanswered: bool = False,
) -> list[str]:
    """What is wrong with a CSV or a package, a sentence each; empty where it can be handed in.

    Every question must be there once and nothing else, its answer one of its own options as published (or the letter
    of one); with `unanswered` an empty answer is allowed. A package must hold one CSV and one YAML of its own name.
    """
    path = Path(path)
    try:
        text, problems = _submitted_text(path)
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True)) if text is not None else []
    except (OSError, UnicodeDecodeError, csv.Error, zipfile.BadZipFile) as error:
        return [f"{path}: cannot be read ({error})."]
    if text is None:
        return problems
    if not table or table[0] != ["question", "answer"]:
        return [
            *problems,
            describe(f"{path.name}, line 1", "question,answer", ",".join(table[0]) if table else "nothing"),
        ]
    known = {getattr(row, key): row for row in questions}
    seen: Counter[str] = Counter()
    for number, fields in enumerate(table[1:], 2):
        where = f"{path.name}, row {number}"
        if len(fields) != 2:
            problems.append(describe(where, "2 fields", f"{len(fields)}"))
            continue
        name, said = fields
        seen[name] += 1
        if name not in known:
            problems.append(describe(where, f"the {key} of a question", f"'{name}'"))
        elif not (said == "" and unanswered) and said not in _allowed(known[name], answer):
            problems.append(
                describe(f"{where} ('{name}')", "one of the question's options", repr(said) if said else "none")
            )
    problems += [describe(f"question '{name}'", "one answer", f"{count}") for name, count in seen.items() if count > 1]
    missing = [name for name in known if name not in seen]
    if missing:
        problems.append(describe(path.name, f"{len(known)} questions", f"{len(missing)} missing, first '{missing[0]}'"))
    return problems


def _allowed(row: Question | Answered, answer: AnswerForm) -> Sequence[str]:
    return tuple(ascii_uppercase[: len(row.options)]) if answer == "letter" else row.options


def _submitted_text(path: Path) -> tuple[str | None, list[str]]:
    """The CSV of a file or a package, and what is wrong with the package around it."""
    if path.suffix != ".zip":
        return path.read_text(encoding="utf-8"), []
    import yaml

    problems: list[str] = []
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(entry.file_size > MAX_MEMBER_BYTES for entry in archive.infolist()):
            return None, [describe(path.name, f"files of at most {MAX_MEMBER_BYTES} bytes", "a larger one")]
        label = path.stem
        for ending in (".output.csv", ".meta.yaml"):
            if [name for name in names if name.endswith(ending)] != [f"{label}/{label}{ending}"]:
                problems.append(describe(path.name, f"one file {label}/{label}{ending}", ", ".join(names) or "nothing"))
        if problems:
            return None, problems
        try:
            tree = yaml.safe_load(archive.read(f"{label}/{label}.meta.yaml"))
        except yaml.YAMLError as error:
            return None, [describe(f"{label}.meta.yaml", "YAML", str(error).splitlines()[0])]
        said = tree.get("submission", {}).get("label") if isinstance(tree, dict) else None
        if said != label:
            problems.append(describe(f"{label}.meta.yaml: submission.label", f"'{label}'", repr(said)))
        return archive.read(f"{label}/{label}.output.csv").decode("utf-8"), problems
