"""Shard folders behind an address (``s3://``, ``gs://``, ``https://`` …), read by fsspec through a cache on this disk.

A shard is fetched whole, compared with its checksum in ``sizes.json``, and kept until the cache is full: then those go
that were read longest ago. A connection that breaks is tried again; one that stays broken is an error, after which the
same command goes on where it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_llm.errors import (
    AudioLLMError,
    ConfigError,
    PrerequisiteError,
    ShardError,
    describe,
    one_line,
    require,
)
from audio_llm.files import MAX_JSON_BYTES, atomic_file, content_hash, parse_json

# How `pathlib` keeps an address: with one slash in the place of two.
_ADDRESS = re.compile(r"(s3|gs|gcs|az|abfs|abfss|hf|https?|memory):/+(.+)")
CACHE, BOUND = "AUDIO_LLM_CACHE", "AUDIO_LLM_CACHE_GB"
DEFAULT_GB = 50.0
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries
SILENCE = 60.0  # seconds without a byte after which a connection is broken; a whole shard may take hours
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def address(folder: str | Path) -> str | None:
    """The address that `folder` is, however it was kept; None for a folder of this machine."""
    match = _ADDRESS.fullmatch(str(folder))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


def bound() -> int:
    """Bytes that the cache may hold, by the environment. Raises :class:`ConfigError`."""
    text = os.environ.get(BOUND, str(DEFAULT_GB))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:
            return int(float(text) * 1e9)
    raise ConfigError(describe(f"environment variable {BOUND}", "gigabytes above 0", f"'{text}'"))


def cache() -> Path:
    """The folder that fetched shards lie in."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "audio-llm") / "shards"


class StoreError(Exception):
    """Shards behind an address that cannot be fetched. No child of :class:`AudioLLMError`, which may be the fault of
    one sample, so that the others go on without it; this one ends the command, with its message alone."""

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


@dataclass(frozen=True)
class Remote:
    """A shard folder at `url`. `sizes` is its ``sizes.json``: shards by name, with bytes and SHA-256."""

    url: str
    sizes: Mapping[str, Mapping[str, Any]]
    text: bytes  # of ``sizes.json``

    @classmethod
    def open(cls, folder: str | Path) -> Remote:
        """Read ``sizes.json``. Raises :class:`ShardError` where it is none of ours, :class:`StoreError` without it."""
        url = str(address(folder))
        bound()
        text = _tried(f"{url}/sizes.json", _small)
        try:
            shards = parse_json(text)["shards"]
            assert all(isinstance(entry["bytes"], int) and len(entry["sha256"]) == 64 for entry in shards.values())
            assert all(re.fullmatch(r"[\w-][\w.-]*\.tar", name) for name in shards)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            cure = "Copy the folder as audio-llm prep wrote it."
            raise ShardError(describe(f"{url}/sizes.json", "names and checksums of shards", "others", cure)) from error
        return cls(url, shards, text)

    @property
    def folder(self) -> Path:
        """Where its shards lie on this disk: another folder for other data."""
        known = json.dumps([self.url, self.sizes], sort_keys=True)
        return cache() / hashlib.sha256(known.encode()).hexdigest()[:24]

    def fetch(self, name: str) -> Path:
        """The shard on this disk, fetched where it is not there. Raises :class:`StoreError` for one that cannot be
        fetched or is not what ``sizes.json`` says."""
        path, entry = self.folder / name, self.sizes[name]
        with contextlib.suppress(OSError):
            if path.stat().st_size == entry["bytes"]:
                os.utime(path)  # read now: the last to go
                return path
        with _alone(self.folder / f".{name}.lock"):
            if not path.is_file() or path.stat().st_size != entry["bytes"]:  # another process may have been faster
                _make_room(entry["bytes"])
                _tried(f"{self.url}/{name}", lambda files, source: _download(files, source, path, entry))
        return path

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes of the shard that is to lie at `path`. The file is not kept open: one that had to go is gone."""
        name = Path(path).name
        for _ in range(3):
            try:
                with open(self.fetch(name), "rb", buffering=0) as stream:
                    return os.pread(stream.fileno(), size, offset)
            except FileNotFoundError:  # another process made room just now
                continue
        raise StoreError(describe(f"{self.url}/{name}", "a cache that holds one shard a process", "a smaller one"))


def _small(files: Any, source: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _get(files, source, Path(folder) / "file", MAX_JSON_BYTES)
        return (Path(folder) / "file").read_bytes()


def _get(files: Any, source: str, path: Path, limit: int) -> None:
    """Copy a file here. Raises :class:`_WrongBytes` for one of more than `limit` bytes, before it fills the disk."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):
        def call(self, *_: Any, **__: Any) -> None:
            if self.value > limit:
                raise _WrongBytes(f"more than {limit} bytes")

    files.get_file(source, str(path), callback=Bounded())


def _download(files: Any, source: str, path: Path, entry: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        _get(files, source, temporary, entry["bytes"])
        found = content_hash(temporary)
        if found != entry["sha256"]:
            size = temporary.stat().st_size
            raise _WrongBytes(f"{size} bytes, of another checksum" if size == entry["bytes"] else f"{size} bytes")


class _WrongBytes(Exception):
    """What arrived is not the shard: half of it, or another one."""


def _tried(url: str, action: Any) -> Any:
    """What `action` gives for the file system and the path of `url`, tried again while the connection is broken."""
    require("fsspec", f"Reading {url}", "remote")
    import fsspec

    for wait in (*WAITS, None):
        try:
            files, path = fsspec.core.url_to_fs(url, **_limits(url))
            return action(files, path)
        except ImportError as error:
            cure = "Install it in the repository: pip install -e '.[remote]'"
            raise PrerequisiteError(f"Reading {url} needs another package ({error}). {cure}") from error
        except FileNotFoundError as error:
            raise StoreError(describe(url, "a file", "none of that name")) from error
        except (AudioLLMError, StoreError):
            raise
        except Exception as error:  # every store has errors of its own
            if isinstance(error, OSError) and error.errno in _DISK:  # of this machine: it does not pass by itself
                raise
            reason = one_line(str(error).strip() or type(error).__name__)[:200]
            if isinstance(error, PermissionError) or wait is None:
                cure = "Mend the connection and give the same command again: it goes on where it was."
                raise StoreError(describe(url, "the bytes that sizes.json names", reason, cure)) from error
            print(f"note: {url}: {reason}; next try in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _limits(url: str) -> dict[str, Any]:
    """aiohttp gives a reply five minutes in all, in which a large shard does not come through a small line."""
    if not url.startswith("http"):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE)}}


def _make_room(size: int) -> None:
    """Take away the shards that were read longest ago until `size` more bytes fit."""
    limit, found = bound(), []
    for path in cache().glob("*/*.tar"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size, path))
    total = size + sum(entry[1] for entry in found)
    for _, taken, path in sorted(found):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= taken


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
