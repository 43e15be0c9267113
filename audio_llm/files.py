"""Files and folders that appear whole or not at all, and JSON lines that survive a killed process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from audio_llm.errors import AudioLLMError, ConfigError, DataError, describe

LOCK = ".lock"  # of a folder that is written
MAX_DEPTH = 100  # brackets around a value of JSON; ours have eight
MAX_JSON_BYTES = 2**28  # of one file
MAX_DIGITS = 300  # of a whole number: a larger one is no float64
_LONG = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
# An escape that looks like half of a pair: a high one without its low one behind it, or the other way round.
_HALF = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
# A lone surrogate in a reply becomes its JSON escape, which reads back as what it was.
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}


class FolderInUse(AudioLLMError):
    """A folder that another process writes into."""


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing, against every other process until the block ends.

    The lock is the kernel's and ends with its process. Raises :class:`FolderInUse` where another one has it. A disk
    without locks is written without one, and a folder that cannot be written has none.
    """
    path = Path(folder) / LOCK
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            yield  # nothing can be written there; a finished run is only looked at
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            process = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            cure = "Wait until it is done, or give another folder."
            raise FolderInUse(
                describe(str(folder), "no other run", f"process {process}, which writes here", cure)
            ) from error
        except OSError:
            pass
        if _is_file(descriptor, path):
            break
        os.close(descriptor)  # its holder took the file away when it ended
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            if made:
                path.parent.rmdir()  # where nothing was written
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _beside(target: Path, ending: str) -> Path:
    """A name that nobody else has, and nobody can guess, in the folder of `target`."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.{ending}")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A new empty file beside `path` that takes its place when the block ends without an error.

    A device or a pipe (``/dev/stdout``, ``/dev/null``) stays what it is and gets the bytes.
    """
    target = Path(path)
    if _takes_bytes(target):
        with tempfile.TemporaryDirectory() as folder:
            held = Path(folder) / "held"
            held.touch()
            yield held
            with open(held, "rb") as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)
        return
    temporary = _beside(target, "tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        rights = temporary.stat().st_mode
        yield temporary
        _allow(temporary, rights)
        os.replace(temporary, target)
    except BaseException as error:
        _by_name(error, temporary, target)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _allow(path: Path, rights: int) -> None:
    """Give the file at `path` what the umask leaves of reading and writing, and leave it all other bits.

    safetensors makes its files anew, for their owner alone: a server that runs as somebody else could not read them.
    """
    mode = path.stat().st_mode
    if wanted := rights & 0o666 & ~mode:
        path.chmod(stat.S_IMODE(mode | wanted))


def _by_name(error: BaseException, temporary: Path, target: Path) -> None:
    """Put the name that a person knows into an error about what lies under another for now."""
    if isinstance(error, OSError) and str(error.filename).startswith(str(temporary)):
        error.filename = str(target) + str(error.filename)[len(str(temporary)) :]
    elif isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error.filename = str(target)  # a write does not know where it went, and one of several disks is full


def _takes_bytes(path: Path) -> bool:
    """Whether `path` is neither a file nor a folder nor missing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def atomic_folder(destination: str | Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends without an error.

    A folder that is there is replaced by a new one of its kind: :class:`FileExistsError` where the two have no name in
    common.
    """
    target = Path(destination)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(target.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, old = _beside(target, "tmp"), _beside(target, "old")
    try:
        folder.mkdir()
        rights = folder.stat().st_mode
        yield folder
        there = _names(target)
        if there and there.isdisjoint(path.name for path in folder.iterdir()):
            raise FileExistsError(errno.EEXIST, "holds other files, which would be lost", str(target))
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _allow(path, rights)
        _exchange(folder, target, old)
    except BaseException as error:
        _by_name(error, folder, target)
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _names(folder: Path) -> set[str]:
    """What is in a folder, hidden files left out; nothing where another process has just taken it away."""
    try:
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    except FileNotFoundError:
        return set()


def _exchange(folder: Path, target: Path, old: Path) -> None:
    """Put `folder` in the place of `target`, also while others do so: the last one stays."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, old)
        try:
            os.replace(folder, target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _remove(old)
    name = glob.escape(old.name.partition(f".{target.name[:40]}.")[1])
    for left in {old, *target.parent.glob(f"{name}*.old"), target.with_name(f".{target.name}-old")}:
        _remove(left)  # those of processes that were killed right here as well


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def within(folder: str | Path, name: str) -> Path:
    """The file that a stranger's list calls `name`, under `folder`. Raises :class:`DataError` for a name that leads out
    of it; a link that lies there was laid by whoever made the folder."""
    parts = Path(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise DataError(describe(f"file '{name}'", f"a name under {folder}", "one that leads out of it"))
    return Path(folder) / parts


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
    write_atomically(path, _json(value))


def write_asked(path: str | Path, value: Any) -> None:
    """Write a text, or a tree as JSON, where a person said (``--out``, ``--json``).

    What is there is replaced where it begins alike: the same command wrote it. Raises :class:`ConfigError` for another
    file, which may be the answers themselves.
    """
    text, path = value if isinstance(value, str) else _json(value), Path(path)
    head = text[:_HEAD].encode(errors="backslashreplace")
    if path.is_file():
        with open(path, "rb") as stream:
            there = stream.read(len(head))
        if there not in (b"", head):
            cure = "Choose another name, or delete it."
            raise ConfigError(describe(f"output {path}", "a new file, or one of this command's", "another file", cure))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


_HEAD = 12  # characters in which the files of a command are alike: the first key of JSON, a doctype


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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
    """Write JSON lines atomically, one by one: `records` may be more than memory holds."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with atomic_file(path) as temporary, open(temporary, "w", **TEXT) as stream:
        stream.writelines(encode(record) + "\n" for record in records)
        stream.flush()
        os.fsync(stream.fileno())


def parse_json(text: str | bytes, *, once: bool = False) -> Any:
    """``json.loads`` of a text that others wrote. Half of a surrogate pair, which nothing can hash or tokenise, is no
    valid JSON either, nor are brackets nested beyond ``MAX_DEPTH`` and whole numbers beyond ``MAX_DIGITS``; with `once`
    a key twice in an object neither, of which ``json.loads`` keeps the last. Raises :class:`ValueError`:
    :class:`json.JSONDecodeError` with the place, :class:`RepeatedKey` and :class:`UnicodeDecodeError`."""
    text = text.decode(json.detect_encoding(text)) if isinstance(text, bytes) else text
    long = _LONG.search(text)
    pairs = _once if once else None
    try:
        tree = json.loads(text, parse_int=_small if long else None, object_pairs_hook=pairs)
    except RecursionError as error:
        raise json.JSONDecodeError("Brackets nested without end", text, 0) from error
    except _TooLarge as error:
        raise json.JSONDecodeError(
            f"A whole number of more than {MAX_DIGITS} digits", text, long.start() if long else 0
        ) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(tree) > MAX_DEPTH:
        raise json.JSONDecodeError(f"Brackets nested deeper than {MAX_DEPTH}", text, 0)
    if half := _HALF.search(text):
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise json.JSONDecodeError("Half of a surrogate pair", text, half.start()) from error
    return tree


def halved(raw: bytes) -> str:
    """``utf-16-le`` or ``utf-16-be`` for a text of two bytes a character without the mark that says so; "" for others.

    Line ends, digits and Latin letters have a byte of zero in it, always the same one; UTF-8 reads them as characters.
    """
    zeros = raw[1::2].count(0), raw[::2].count(0)
    if not raw or 10 * sum(zeros) < len(raw) or max(zeros) < 10 * min(zeros) or len(raw) % 2:
        return ""
    return "utf-16-le" if zeros[0] > zeros[1] else "utf-16-be"


def not_finite(value: Any, place: str = "") -> tuple[str, float] | None:
    """The first NaN or infinity in a tree of JSON, and where it stands: JSON has none, though Python reads them."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (place, value)
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next(filter(None, (not_finite(part, f"{place}.{name}") for name, part in parts)), None)


class RepeatedKey(ValueError):
    """An object of JSON that has a key twice: what is meant cannot be told."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise RepeatedKey(f"'{key}' twice in one object")
    return found


class _TooLarge(Exception):
    pass


def _small(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:
        raise _TooLarge
    return int(digits)


def _depth(tree: Any) -> int:
    """How many brackets stand around the innermost value, counted as far as one beyond ``MAX_DEPTH``."""
    level, depth = [tree], 0
    while depth <= MAX_DEPTH and (inner := [node for node in level if isinstance(node, (dict, list))]):
        level = [part for node in inner for part in (node.values() if isinstance(node, dict) else node)]
        depth += 1
    return depth


def read_json(path: str | Path) -> Any:
    """:func:`parse_json` of a plain file of at most ``MAX_JSON_BYTES``. Raises :class:`OSError`, or ValueError."""
    with open_plain(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, where at most {MAX_JSON_BYTES} are read")
        return parse_json(stream.read())


def open_plain(path: str | Path, *, pipes: bool = False) -> BinaryIO:
    """A file to read, and with `pipes` a pipe that somebody writes to: one without a writer would be waited for, and a
    device may have no end. Raises :class:`OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "not a file", str(path))
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def read_plain(path: str | Path) -> bytes:
    """All of a file or of such a pipe. Raises :class:`OSError`."""
    with open_plain(path, pipes=True) as stream:
        return stream.read()


def read_own(path: Path, cure: str) -> dict[str, Any]:
    """The object of JSON that a run of ours left in `path`. Raises :class:`ConfigError`, which says the `cure`, for one
    that was damaged since: by a disk, a copy that was cut off, or by hand."""
    try:
        tree = read_json(path)
    except ValueError as error:
        raise ConfigError(describe(str(path), "what a run wrote there", f"no JSON ({error})", cure)) from error
    if not isinstance(tree, dict):
        raise ConfigError(describe(str(path), "what a run wrote there", type(tree).__name__, cure))
    return tree


def read_lines(path: str | Path, *, tell: bool = False) -> list[dict[str, Any]]:
    """All whole JSON objects of `path`. A last line that is being written, or was when a process died, is left out, and
    so are damaged ones, of which a note on the terminal tells where `tell` is set."""
    path = Path(path)
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    damaged: list[int] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged and tell:
        found = f"{len(damaged)} of {len(lines) - 1} lines are no JSON objects, line {damaged[0]} first"
        print(f"note: {path}: {found}; they are left out", file=sys.stderr)
    return records
