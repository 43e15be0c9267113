"""Writing WebDataset shards so that a killed run loses at most the shard it was filling.

A shard is filled under a temporary name and renamed when full; ``sizes.json`` (counts, bytes, SHA-256 per shard) is
written last, so a folder with ``sizes.json`` and without ``.writing`` is complete.

Resuming: open a writer on the same folder and run the same loop; ``sample_id in writer`` tells which samples are
already in finished shards. As shards hold a fixed number of samples, the bytes are those of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from audio_llm.audio import INT16_SCALE, Waveform, encode, quantise
from audio_llm.errors import ShardError, describe
from audio_llm.files import write_json, write_lines
from audio_llm.shards.index import describe_shard, read_sizes, scan_shard
from audio_llm.shards.schema import AudioInfo, Sample, check_key

SIZES = "sizes.json"
REJECTS = "rejects.jsonl"
MARKER = ".writing"
FORMATS = ("flac", "wav")


class Packed(NamedTuple):
    """A sample as stored, its audio encoded: what :meth:`ShardWriter.add` writes."""

    sample: Sample
    members: dict[str, str | bytes]


def pack(sample: Sample, waveform: Waveform, format: str = "flac", digest: str | None = None) -> Packed:
    """Encode a sample, in whatever process; its ``audio`` field describes the 16-bit samples that are stored. `digest`
    is the waveform's own where the caller knows it: a fifth of the time goes into it.

    Raises :class:`ShardError` for a broken sample, :class:`AudioError` for sound that 16 bits do not hold.
    """
    check_key(sample.id, f"sample {sample.id!r}")
    integers = quantise(waveform)
    audio = encode(waveform, format, integers=integers)
    stored = integers.astype(np.float32)
    stored *= np.float32(1 / INT16_SCALE)
    exact = digest is not None and np.array_equal(stored, waveform.samples)
    info = AudioInfo.of(replace(waveform, samples=stored), digest if exact else None)
    sample = replace(sample, audio=info)
    return Packed(sample, {"__key__": sample.id, format: audio, "json": sample.to_json().encode()})


class ShardWriter:
    """Writes ``{prefix}-000000.tar`` ... with ``key.flac`` (or ``.wav``, 16-bit) and ``key.json`` per sample.

    Use it as a context manager: leaving it normally finishes the folder, an exception keeps finished shards only.
    Bytes depend on samples and order alone (fixed times and owners). One writer per folder at a time.
    Raises :class:`ShardError` for a duplicate key, a broken sample, an unwritable folder or a full disk, and when
    more than `max_reject_share` of what was offered was rejected (judged from 100 offers on, and at the end).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        prefix: str = "shard",
        samples_per_shard: int = 256,
        format: str = "flac",
        max_reject_share: float = 0.01,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be positive, got {samples_per_shard}")
        if format not in FORMATS:
            raise ShardError(describe("shard audio format", " or ".join(FORMATS), repr(format)))
        self.folder = Path(folder)
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.format = format
        self.max_reject_share = max_reject_share
        self.shards: dict[str, dict[str, Any]] = {}
        self.rejects: dict[str, str] = {}
        self._finished: set[str] = set()
        self._current: set[str] = set()
        self._stream: IO[bytes] | None = None
        self._tar: Any = None
        self._lock: int | None = None
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._adopt_finished_shards()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __contains__(self, key: str) -> bool:
        """Whether a sample with this id is already written (in this run or an earlier one)."""
        return key in self._finished or key in self._current

    def __len__(self) -> int:
        return len(self._finished) + len(self._current)

    def write(self, sample: Sample, waveform: Waveform) -> Sample:
        """Append one sample and return it as stored: its ``audio`` field describes the 16-bit samples written.

        Nothing is written when an error is raised, so the caller may :meth:`reject` the sample and go on.
        """
        check_key(sample.id, f"sample {sample.id!r}")
        if sample.id in self:  # before it is encoded
            raise self._duplicate(sample.id)
        return self.add(pack(sample, waveform, self.format))

    def add(self, packed: Packed) -> Sample:
        """:meth:`write` for a sample that is encoded already."""
        sample = packed.sample
        if sample.id in self:
            raise self._duplicate(sample.id)
        with self._disk_errors():
            self._open_shard()
            self._tar.write(packed.members)
        self._current.add(sample.id)
        self.rejects.pop(sample.id, None)
        if len(self._current) == self.samples_per_shard:
            self._finish_shard()
        return sample

    def _duplicate(self, key: str) -> ShardError:
        return ShardError(describe(f"{self.folder}: sample '{key}'", "a key not yet written", "a duplicate"))

    def reject(self, key: str, reason: str) -> None:
        """Count a sample that cannot be used and list it in ``rejects.jsonl``; too many of them stop the run."""
        self.rejects[key] = reason
        if len(self) + len(self.rejects) >= 100:
            self._check_rejects()

    def close(self) -> None:
        """Finish the last shard, then write ``rejects.jsonl`` and ``sizes.json``."""
        if self._lock is None:
            return
        try:
            self._finish_shard()
            self._check_rejects()
            sizes = {"version": 1, "samples": len(self._finished), "shards": dict(sorted(self.shards.items()))}
            with self._disk_errors():
                write_json(self.folder / SIZES, sizes)
                (self.folder / MARKER).unlink(missing_ok=True)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop the shard being filled and let go of the folder; finished shards stay and a later run goes on."""
        if self._stream is not None:
            for part in (self._tar, self._stream):
                if part is not None:
                    with contextlib.suppress(OSError):  # on a full disk closing flushes, and fails, once more
                        part.close()
            self._temporary.unlink(missing_ok=True)
        self._stream = self._tar = None
        self._current = set()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{len(self.shards):06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{self._name}.tmp"

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = None
            raise ShardError(describe(str(self.folder), "one writer at a time", "another process writing")) from error

    def _adopt_finished_shards(self) -> None:
        """Take over what an earlier run finished: keys from a header scan, checksums known or computed again."""
        for stale in self.folder.glob(f"{self.prefix}-*.tar.tmp"):
            stale.unlink()
        known = read_sizes(self.folder)
        names = sorted(p.name for p in self.folder.glob(f"{self.prefix}-*.tar"))
        for number, name in enumerate(names):
            if name != f"{self.prefix}-{number:06d}.tar":
                found = f"{name} where number {number} belongs"
                raise ShardError(describe(str(self.folder), "shards numbered without gaps", found))
            scan = scan_shard(self.folder / name)
            if scan.rejects:
                raise ShardError(
                    describe(str(self.folder / name), "a finished shard", scan.rejects[0].reason)
                    + " Delete it and the shards after it, then run again."
                )
            keys = {row.key for row in scan.rows}
            entry = known.get(name)
            if entry is None or entry.get("bytes") != (self.folder / name).stat().st_size or "sha256" not in entry:
                entry = describe_shard(self.folder / name, len(keys))
            self.shards[name] = entry
            self._finished |= keys
        if (self.folder / REJECTS).exists():
            lines = (self.folder / REJECTS).read_text().splitlines()
            self.rejects = {item["key"]: item["reason"] for item in map(json.loads, lines)}

    def _open_shard(self) -> None:
        if self._tar is not None:
            return
        if self._lock is None:
            raise ShardError(describe(str(self.folder), "an open writer", "a closed one"))
        from webdataset.writer import TarWriter

        (self.folder / MARKER).touch()
        (self.folder / SIZES).unlink(missing_ok=True)
        self._stream = open(self._temporary, "wb")  # noqa: SIM115 (closed by _finish_shard or abandon)
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)

    def _finish_shard(self) -> None:
        with self._disk_errors():
            if self._tar is not None and self._stream is not None:
                self._tar.close()
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                entry = describe_shard(self._temporary, len(self._current))
                name = self._name
                os.replace(self._temporary, self.folder / name)
                self.shards[name] = entry
                self._finished |= self._current
                self._current = set()
                self._stream = self._tar = None
        self._write_rejects()

    def _write_rejects(self) -> None:
        if self.rejects or (self.folder / REJECTS).exists():
            with self._disk_errors():
                write_lines(self.folder / REJECTS, [{"key": k, "reason": r} for k, r in self.rejects.items()])

    def _check_rejects(self) -> None:
        offered = len(self) + len(self.rejects)
        if self.rejects and len(self.rejects) > self.max_reject_share * offered:
            self._write_rejects()
            key, reason = next(reversed(self.rejects.items()))
            raise ShardError(
                describe(
                    str(self.folder),
                    f"at most {self.max_reject_share:.1%} rejected samples",
                    f"{len(self.rejects)} of {offered}",
                    f"Last one: {key}: {reason.rstrip('.')}. All are in {REJECTS}; "
                    "mend them or raise max_reject_share.",
                )
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn a full disk or an unwritable folder into one message that says what is safe."""
        try:
            yield
        except OSError as error:
            finished = f"{len(self.shards)} finished shard(s) with {len(self._finished)} samples are intact"
            self.abandon()
            reason = error.strerror or str(error)
            raise ShardError(
                f"{self.folder}: cannot write shards ({reason}). {finished}; mend that and run the same command again."
            ) from error
