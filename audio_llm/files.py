"""Files and folders that appear whole or not at all, and JSON lines that survive a killed process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# An escape that looks like half of a pair: a high one without its low one behind it, or the other way round.
_HALF = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
# A lone surrogate in a reply becomes its JSON escape, which reads back as what it was.
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends without an error."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(target)  # the name that a person knows
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(destination: str | Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends without an error."""
    target = Path(destination)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    folder.chmod(0o755)
    try:
        yield folder
        old = target.with_name(f".{target.name}-old") if target.exists() else None
        if old:
            shutil.rmtree(old, ignore_errors=True)  # what a process killed between the next two lines left
            os.replace(target, old)
        os.replace(folder, target)
        if old:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def glance(path: str | Path, pieces: int = 8, size: int = 1024) -> str:
    """What tells one recording from another without reading all of it: length, and SHA-256 of a few `pieces` of it.

    A sound that was made anew often has the old one's name and length, but other samples. A file that cannot be opened
    is told by the reason.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            length = stream.seek(0, os.SEEK_END)
            for piece in range(pieces):
                stream.seek(piece * length // pieces)
                digest.update(stream.read(size))
    except OSError as error:
        return error.strerror or type(error).__name__
    return f"{length} {digest.hexdigest()}"


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files; empty where there is nothing.

    Hidden files are left out.
    """
    root = Path(path)
    if root.is_file():
        with open(root, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    names = sorted(file for file in root.glob("*") if file.is_file() and not file.name.startswith("."))
    digest = hashlib.sha256()
    for file in names:
        digest.update(f"{file.name}\0{content_hash(file)}\0".encode())
    return digest.hexdigest() if names else ""


def write_atomically(path: str | Path, text: str) -> None:
    """Replace `path` in one step and flush it to the disk: a reader sees the old text or the new one, never half."""
    with atomic_file(path) as temporary, open(temporary, "w", **TEXT) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; the folder is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line with a single write, so that lines of several processes do not mix.

    It begins a line of its own where a killed process left half of one.
    """
    with open(path, "ab+") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(end - 1, 0))
        torn = stream.read(1) not in (b"", b"\n")
        stream.write(("\n" * torn + json.dumps(record) + "\n").encode())


def write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines atomically."""
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` of a text that others wrote. Half of a surrogate pair, which nothing can hash or tokenise, and
    brackets nested without end are no valid JSON either. Raises :class:`ValueError`: :class:`json.JSONDecodeError`
    with the place, and of bytes in no known encoding :class:`UnicodeDecodeError`."""
    text = text.decode(json.detect_encoding(text)) if isinstance(text, bytes) else text
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("Brackets nested without end", text, 0) from error
    if half := _HALF.search(text):
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise json.JSONDecodeError("Half of a surrogate pair", text, half.start()) from error
    return tree


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """All whole JSON objects of `path`. A last line that is being written, or was when a process died, is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
