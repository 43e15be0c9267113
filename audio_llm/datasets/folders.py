"""What lies in a folder of sounds: its sound files, and what is left out of them, by name.

A name that a table gives is looked for as people spell it: with ``%20``, a query, backslashes, in either Unicode form.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from audio_llm.errors import DataError, describe

# What decoding reads, by its usual endings, and other sound and film files, which it does not.
SUFFIXES = frozenset(
    ".wav .wave .bwf .rf64 .w64 .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .sph".split()
)
OTHERS = frozenset(".m4a .mp4 .aac .wma .webm .mkv .amr .ape .wv .3gp .mov .ac3 .spx .ra".split())
# Folders that systems and programs make for themselves.
_SYSTEM = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}


@dataclass
class Listing:
    """`files` by their paths below the root, sorted; `left_out` are items with a reason."""

    files: list[Path] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def omit(self, path: Path | str, reason: str) -> None:
        self.left_out.append({"item": readable(path), "reason": reason})


def readable(path: Path | str) -> str:
    """A path as text that can be stored and printed: bytes that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def hidden(name: str) -> bool:
    """Whether a file or folder is a system's own: dotted names (``._x``, ``.Trash-0``), ``@eaDir``, ``__MACOSX``."""
    return name.startswith(".") or name.lower() in _SYSTEM


def files_below(root: Path, *, endings: Collection[str] = (), named: Collection[str] = ()) -> list[Path]:
    """The files below `root` that end with one of `endings`, or have one of the names in `named`, which may be patterns
    (all files without either), sorted. Hidden and system files are left out.

    Folders that are linked in `root` belong to it, each once, so that links in a circle end. Raises :class:`DataError`
    for a file that is wanted and is only a link to nothing (git-annex, DVC), and :class:`OSError` for a folder that
    cannot be read: without a word there would be less of it.
    """
    found: list[Path] = []
    for folder, _, names in _walk(root, lambda path, reason: None, _fail):
        for path in (Path(folder) / name for name in names if not hidden(name)):
            if endings and path.suffix.lower() not in endings or named and not any(map(path.match, named)):
                continue
            if not path.exists():
                raise DataError(describe(str(path), "a file", "a link to one that is not there", "Fetch or delete it."))
            found.append(path)
    return sorted(found)


def _fail(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # of no folder there are no files
        raise error


def _walk(
    root: Path, omit: Callable[[Path, str], None], fail: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` into links as well, in order, and into every folder once. `omit` is told of a folder that is left out
    by its path below the root and the reason, `fail` of one that cannot be read."""
    real = os.path.realpath(root)
    seen = {real}
    for folder, inner, names in os.walk(root, followlinks=True, onerror=fail):
        for name in sorted(inner):
            path = Path(folder) / name
            target = os.path.realpath(path)
            if hidden(name):
                omit(path.relative_to(root), "a hidden or system folder")
            elif target in seen or path.is_symlink() and (target + os.sep).startswith(real + os.sep):
                omit(path.relative_to(root), "a link to another folder of this one")
            else:
                seen.add(target)
                continue
            inner.remove(name)
        inner.sort()
        yield folder, inner, sorted(names)


def listing(root: Path, suffixes: Collection[str] = SUFFIXES) -> Listing:
    """All sound files below `root`, which end with one of `suffixes`. Links to what lies in `root` as well, hidden and
    system files are left out."""
    found, real = Listing(), os.path.realpath(root)

    def unread(error: OSError) -> None:
        path = Path(os.fsdecode(error.filename or root)).relative_to(root)
        if path.parts or root.exists():
            found.omit(path, f"a folder that cannot be read: {error.strerror}")

    for folder, inner, names in _walk(root, found.omit, unread):
        here = Path(folder).relative_to(root)
        for name in [name for name in inner if Path(name).suffix.lower() in suffixes]:
            found.omit(here / name, "a folder with the name of a sound")
            inner.remove(name)
        for name in names:
            _add(found, real, Path(folder) / name, here / name, suffixes)
    found.files.sort()
    return found


def _add(found: Listing, real: str, path: Path, below: Path, suffixes: Collection[str]) -> None:
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        if suffix in OTHERS:
            found.omit(below, f"{suffix[1:]} is no format that is read; convert it to flac")
        return
    elif hidden(path.name):
        found.omit(below, "a hidden or system file")
    elif path.is_symlink() and os.path.realpath(path).startswith(real + os.sep):
        found.omit(below, "a link to another file of this folder")
    elif not path.is_file():
        found.omit(below, "a link to a file that is not there" if path.is_symlink() else "no file")
    else:
        found.files.append(below)


def tell(root: Path, left_out: list[dict[str, str]]) -> None:
    """Say, once, what was left out of the folder `root`: links whose files were not fetched, other formats."""
    if text := told(left_out):
        _note(f"note: {readable(root)}: {text}")


@cache  # a folder is gone through several times
def _note(text: str) -> None:
    print(text, file=sys.stderr)


def told(left_out: list[dict[str, str]]) -> str:
    """One sentence on what was left out: the number for every reason, and the first name; empty for nothing."""
    reasons: dict[str, list[str]] = {}
    for item in left_out:
        reasons.setdefault(item["reason"], []).append(item["item"])
    parts = []
    for reason, names in reasons.items():
        first = names[0] if len(names) == 1 else f"{len(names)}, {names[0]} the first"
        parts.append(f"{first} ({reason})")
    return f"Left out: {'; '.join(parts)}." if parts else ""


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda text: re.sub(r"[?#][^/\\]*$", "", text),
    lambda text: text.replace("\\", "/"),
    unquote,
    lambda text: unicodedata.normalize("NFC", text),
    lambda text: unicodedata.normalize("NFD", text),
)


def spelt(name: str) -> list[str]:
    """The names that a table may mean by `name`, its own first: tables hold addresses, other systems' slashes, and
    Unicode in the form that another system uses."""
    forms = [name.strip()]
    for change in _SPELLINGS:
        forms += dict.fromkeys(changed for form in forms if (changed := change(form)) and changed not in forms)
    return forms


def find_file(folder: Path, name: str) -> Path:
    """The file in `folder` that `name` means; ``folder / name`` where there is none.

    Beside :func:`spelt`, the ending may differ in case or be another format's, if only one file is so named. Nothing
    above `folder` is looked at.
    """
    below = [Path(form) for form in spelt(name) if not form.startswith("/") and ".." not in form.split("/")]
    for path in below:
        if os.path.isfile(folder / path):  # False as well for a name that no disk can have
            return folder / path
    for path in below:
        others = [
            folder / path.parent / entry
            for entry in _names(folder / path.parent)
            if Path(entry).stem == path.stem and Path(entry).suffix.lower() in SUFFIXES
        ]
        same = [other for other in others if other.suffix.lower() == path.suffix.lower()]
        if path.suffix.lower() in SUFFIXES and len(same or others) == 1:
            return (same or others)[0]
    return folder / name


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
