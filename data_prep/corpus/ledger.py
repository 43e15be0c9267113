"""What a stage has found: one JSON line an item, in a file that only grows. It is resume, provenance and cache in one.

A line begins with its key, 32 hexadecimal digits made of the stage's fingerprint, the item's id and the fields that the
stage needs. Lines of earlier settings stay, so that a recipe that is set back finds them again. A last line that a
killed process left half written is cut off when the next one opens the file to write; one that a disk damaged is found
when it is read, and its item computed anew (:meth:`Ledger.sweep`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from audio_llm.errors import DataError, describe
from data_prep.corpus.stage import Item, Reject

_DIGITS = 32
_LINE = re.compile(rb'\{"key": "([0-9a-f]{16})[0-9a-f]{16}"')
_GONE = -1  # the offset of a line that is not to be found again
_BLOCK = 2**24  # bytes that are read at once
Result = Item | Reject


def hashed(*parts: Any) -> str:
    """32 hexadecimal digits of what JSON can say."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_DIGITS]


def line_of(key: str, result: Result, gives: tuple[str, ...]) -> bytes:
    """The line of a result: of an item, the fields that the stage gives. Raises TypeError for what is no JSON."""
    tree: dict[str, Any] = {"key": key, "id": result.id}
    if isinstance(result, Reject):
        tree |= {"reason": result.reason, "detail": result.detail}
    else:
        tree["fields"] = {name: result.fields[name] for name in gives if name in result.fields}
    try:
        return (json.dumps(tree, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        strange = next((name for name, value in tree.get("fields", {}).items() if not _is_json(value)), "")
        raise TypeError(f"field '{strange}' holds what JSON cannot say: {error}") from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class TornLine(DataError):
    """A line of a ledger that was damaged."""


class Ledger:
    """The lines of one stage, by key. Sixteen bytes of memory a line that was there, more for those of this run.

    Use it as a context manager; with `write` false nothing is changed. The folder's lock keeps other writers out.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path = path
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "ab+" if write else "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._keys, self._offsets, self._end = self._read()
        if write and self._end < self._file.seek(0, os.SEEK_END):
            self._file.truncate(self._end)
        self._new: dict[int, int] = {}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return self._offset(key) is not None

    def __len__(self) -> int:
        """Different keys."""
        known = set(self._keys.tolist()) | set(self._new)
        return len(known) - sum(offset == _GONE for offset in self._new.values())

    def add(self, key: str, line: bytes) -> None:
        """Append what :func:`line_of` made, in one write; of two lines with one key, the last one counts."""
        if self._file.write(line) != len(line):  # as much as the disk took
            self._file.truncate(self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._new[_short(key)] = self._end
        self._end += len(line)

    def find(self, key: str) -> dict[str, Any] | None:
        """The line of `key`. Raises :class:`TornLine` for a line that was damaged."""
        offset = self._offset(key)
        if offset is None:
            return None
        data = os.pread(self._file.fileno(), 2**12, offset)
        while b"\n" not in data and (more := os.pread(self._file.fileno(), 2**20, offset + len(data))):
            data += more
        try:
            tree: dict[str, Any] = json.loads(data.partition(b"\n")[0])
            if tree["key"] == key and ("reason" in tree or "fields" in tree):
                return tree
        except (ValueError, KeyError, TypeError):
            pass
        where = f"{self.path}, byte {offset}"
        cure = "Delete that line, and run again: its item is computed anew."
        raise TornLine(describe(where, f"the whole line of key {key}", f"{data[:60]!r}", cure))

    def sweep(self, keys: Iterable[str]) -> int:
        """Forget the lines of `keys` that were damaged, so that they are made again; how many they were."""
        torn = 0
        for key in keys:
            try:
                self.find(key)
            except TornLine:
                self._new[_short(key)] = _GONE
                torn += 1
        return torn

    def lost(self, key: str, name: str, reasons: Collection[str]) -> bool:
        """Whether the item of `key` is a reject for one of `reasons`, or lost something for one: its ``NAME_dropped``
        counts that."""
        line = self.find(key)
        if line is None:
            return False
        found = [line["reason"]] if "reason" in line else line["fields"].get(f"{name}_dropped") or ()
        return any(reason in reasons for reason in found)

    def close(self) -> None:
        self._file.close()

    def _offset(self, key: str) -> int | None:
        short = _short(key)
        if (new := self._new.get(short)) is not None:
            return None if new == _GONE else new
        place = int(np.searchsorted(self._keys, np.uint64(short), "right")) - 1
        return int(self._offsets[place]) if place >= 0 and int(self._keys[place]) == short else None

    def _read(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Keys, ascending, and the offsets of their lines, each (lines,); and where the last whole line ends."""
        keys, offsets = bytearray(), bytearray()
        rest, end = b"", 0
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            found = []
            for line in lines:
                if match := _LINE.match(line):  # anything else was torn
                    keys += match[1]
                    found.append(end)
                end += len(line) + 1
            offsets += np.array(found, np.int64).tobytes()
        short = np.frombuffer(bytes.fromhex(keys.decode()), ">u8").astype(np.uint64)
        order = np.argsort(short, kind="stable")  # of equal keys the last line is the last
        return short[order], np.frombuffer(offsets, np.int64)[order], end


def _short(key: str) -> int:
    """The first 64 bits of a key: :meth:`Ledger.find` compares the whole of it."""
    return int(key[:16], 16)


def key_of(item: Item, needs: tuple[str, ...], fingerprint: str) -> str:
    """By what the ledger of a stage knows the result of `item`."""
    fields: Mapping[str, Any] = {name: item.fields.get(name) for name in needs}
    return hashed(fingerprint, item.id, fields)
