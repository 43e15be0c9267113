"""Writing WebDataset shards so that a killed run loses at most the shard it was filling.

A shard is filled under a temporary name and renamed when full; ``sizes.json`` (counts, bytes, SHA-256 per shard) is
written last, so a folder with ``sizes.json`` and without ``.writing`` is complete. Its index is left beside it
(``index.npz``), so that whoever opens the folder on this disk need not read it first.

Resuming: open a writer on the same folder and run the same loop; ``sample_id in writer`` tells which samples are
already in finished shards. As shards hold a fixed number of samples, the bytes are those of an uninterrupted run.
``.writing`` has a line for each finished shard: its checksum, its rows, and what tells its file from any other
(:func:`audio_llm.shards.index.known`). A shard that this still describes is taken over unread; a torn, copied or
foreign one is not what was described, and is scanned and summed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from audio_llm.audio import Waveform, encode, quantise
from audio_llm.errors import ConfigError, ShardError, describe
from audio_llm.files import append_line, parse_json, read_lines, write_json, write_lines
from audio_llm.integers import Integers
from audio_llm.pcm import INT16_SCALE
from audio_llm.shards.index import (
    AUDIO_SUFFIXES,
    MAX_AUDIO_BYTES,
    MAX_JSON_BYTES,
    Row,
    ShardIndex,
    describe_shard,
    further_members,
    known,
    read_sizes,
    scan_shard,
)
from audio_llm.shards.schema import AudioInfo, Sample, check_key

SIZES = "sizes.json"
REJECTS = "rejects.jsonl"
MARKER = ".writing"
FORMATS = ("flac", "wav")


class Packed(NamedTuple):
    """A sample as stored, its audio encoded: what :meth:`ShardWriter.add` writes. `blocks` are its members as they
    stand in a tar, and ``spans[suffix]`` is (offset, bytes) of the content of each in them."""

    sample: Sample
    blocks: bytes
    spans: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, sample: Sample, format: str, audios: Sequence[bytes]) -> Packed:
        """Raises :class:`ShardError` for a sample that could not be read back."""
        text = sample.to_json().encode()
        where = f"sample '{sample.id}'"
        try:
            parse_json(text)
        except ValueError as error:
            raise ShardError(describe(where, "JSON that can be read back", f"text that cannot ({error})")) from error
        sizes = [("JSON", len(text), MAX_JSON_BYTES), *(("audio", len(audio), MAX_AUDIO_BYTES) for audio in audios)]
        for what, size, limit in sizes:
            if size > limit:
                raise ShardError(describe(where, f"at most {limit} bytes of {what}", f"{size}"))
        contents = {f"audio{number}.{format}" if number else format: audio for number, audio in enumerate(audios)}
        return cls(sample, *_members(sample.id, contents | {"json": text}))

    def describing(self, sample: Sample) -> Packed:
        """The same audio under another description."""
        format = next(name for name in AUDIO_SUFFIXES if name in self.spans)
        spans = [self.spans[format], *(further_members(self.spans) or ())]
        return Packed.of(sample, format, [self.blocks[start : start + size] for start, size in spans])


def _members(key: str, contents: Mapping[str, bytes]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Members of a tar as webdataset makes them with ``mtime=0``, byte for byte. Importing it imports torch."""
    parts: list[bytes] = []
    spans, end = {}, 0
    for suffix in sorted(contents):
        content = contents[suffix]
        head = _header(f"{key}.{suffix}", len(content))
        spans[suffix] = (end + len(head), len(content))
        parts += [head, content, bytes(-len(content) % tarfile.BLOCKSIZE)]
        end = spans[suffix][0] + len(content) + len(parts[-1])
    return b"".join(parts), spans


def _header(name: str, size: int) -> bytes:
    """What stands before a member of a tar. A plain one is the one of an empty name with name, size and sum put in:
    made anew, headers take a third of the time that a sample costs beside its sound."""
    if not (name.isascii() and len(name) <= tarfile.LENGTH_NAME and size < 8**11):
        return _whole_header(name, size)
    told = b"%011o" % size
    total = _BARE_SUM + sum(name.encode()) + sum(told) - 11 * ord("0")
    return b"".join(
        (name.encode().ljust(100, b"\0"), _BARE[100:124], told, _BARE[135:148], b"%06o\0" % total, _BARE[155:])
    )


def _whole_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "bigdata", "bigdata"
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_BARE = _whole_header("", 0)
_BARE_SUM = int(_BARE[148:154], 8)


class Encoded(NamedTuple):
    """A sound as it is stored: its description and the bytes of its file."""

    info: AudioInfo
    content: bytes


def encode_stored(sound: Waveform | Integers, format: str = "flac", digest: str | None = None) -> Encoded:
    """Encode a sound for a shard, of 16 bits; the `format` "float" is a WAV of the samples as they are, in 32 bits.

    `digest` is the sound's own where it is known: a fifth of the time goes into it. Raises :class:`AudioError` for
    sound that 16 bits do not hold.
    """
    if isinstance(sound, Integers):
        channels, seconds = len(sound.samples), round(sound.seconds, 6)
        info = AudioInfo(sound.sample_rate, channels, sound.layout, seconds, digest or sound.sha256())
        return Encoded(info, sound.encode(format))
    waveform = sound
    if format == "float":
        return Encoded(AudioInfo.of(waveform, digest), encode(waveform, "wav", "FLOAT"))
    integers = quantise(waveform)
    stored = replace(waveform, samples=integers * np.float32(1 / INT16_SCALE))
    exact = digest is not None and np.array_equal(stored.samples, waveform.samples)
    return Encoded(AudioInfo.of(stored, digest if exact else None), encode(waveform, format, integers=integers))


def assemble(sample: Sample, sounds: Sequence[Encoded], format: str = "flac") -> Packed:
    """A sample of sounds that :func:`encode_stored` made in `format`; its ``audio`` field describes what is stored.
    Raises :class:`ShardError` for a broken sample."""
    check_key(sample.id, f"sample {sample.id!r}")
    if not sounds:
        raise ShardError(describe(f"sample '{sample.id}'", "a sound", "none"))
    infos, contents = [sound.info for sound in sounds], [sound.content for sound in sounds]
    return Packed.of(replace(sample, audio=infos), "wav" if format == "float" else format, contents)


def pack(sample: Sample, sound: Waveform | Sequence[Waveform], format: str = "flac") -> Packed:
    """:func:`encode_stored` and :func:`assemble` for a sample of one or several sounds, in whatever process."""
    check_key(sample.id, f"sample {sample.id!r}")
    waveforms = [sound] if isinstance(sound, Waveform) else list(sound)
    return assemble(sample, [encode_stored(waveform, format) for waveform in waveforms], format)


class ShardWriter:
    """Writes ``{prefix}-000000.tar`` ... with ``key.flac`` (or ``.wav``, 16-bit) and ``key.json`` per sample; further
    sounds of a sample are ``key.audio1.flac``, ``key.audio2.flac`` ...

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
            raise ConfigError(describe("samples_per_shard", "1 or more", f"{samples_per_shard}"))
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
        self._indexes: list[ShardIndex] = []  # of the finished shards, one each
        self._told: set[str] = set()  # shards that ``.writing`` describes
        self._rows: dict[str, Row] = {}  # of the shard being filled, by key
        self._stream: IO[bytes] | None = None
        self._sum = hashlib.sha256()  # of what is in it
        self._end = 0  # bytes in it
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
        return key in self._finished or key in self._rows

    def __len__(self) -> int:
        return len(self._finished) + len(self._rows)

    def write(self, sample: Sample, sound: Waveform | Sequence[Waveform]) -> Sample:
        """Append one sample and return it as stored: its ``audio`` field describes the 16-bit samples written.

        Nothing is written when an error is raised, so the caller may :meth:`reject` the sample and go on.
        """
        check_key(sample.id, f"sample {sample.id!r}")
        if sample.id in self:  # before it is encoded
            raise self._duplicate(sample.id)
        return self.add(pack(sample, sound, self.format))

    def add(self, packed: Packed) -> Sample:
        """:meth:`write` for a sample that is encoded already."""
        sample = packed.sample
        if sample.id in self:
            raise self._duplicate(sample.id)
        with self._disk_errors():
            stream = self._open_shard()
            stream.write(packed.blocks)
        self._sum.update(packed.blocks)
        spans = {name: (self._end + start, size) for name, (start, size) in packed.spans.items()}
        audio = next(spans[name] for name in AUDIO_SUFFIXES if name in spans)
        further = further_members(spans) or ()
        self._rows[sample.id] = Row.of(self._name, sample, spans["json"], audio, further)
        self._end += len(packed.blocks)
        self.rejects.pop(sample.id, None)
        if len(self._rows) == self.samples_per_shard:
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
            if self._indexes:
                ShardIndex.joined(self.folder, self._indexes).keep()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop the shard being filled and let go of the folder; finished shards stay and a later run goes on."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # on a full disk closing flushes, and fails, once more
                self._stream.close()
            self._temporary.unlink(missing_ok=True)
        self._stream, self._rows = None, {}
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

    def stored(self) -> Iterator[Sample]:
        """The samples of the finished shards, in order."""
        for index in self._indexes:
            with open(self.folder / index.shards[0], "rb") as stream:
                for offset, size in index.ranges[:, :2].tolist():
                    yield Sample.from_trusted_json(os.pread(stream.fileno(), size, offset), index.shards[0])

    def _adopt_finished_shards(self) -> None:
        """Take over what an earlier run finished: as it is described, or scanned and summed again."""
        for stale in self.folder.glob(f"{self.prefix}-*.tar.tmp"):
            stale.unlink()
        sizes = read_sizes(self.folder)
        described = self._described(sizes)
        names = sorted(p.name for p in self.folder.glob(f"{self.prefix}-*.tar"))
        for number, name in enumerate(names):
            if name != f"{self.prefix}-{number:06d}.tar":
                found = f"{name} where number {number} belongs"
                raise ShardError(describe(str(self.folder), "shards numbered without gaps", found))
            entry, index = described.get(name) or self._scanned(name, sizes.get(name))
            self.shards[name] = entry
            self._indexes.append(index)
            self._finished |= {key.decode() for key in index.keys.tolist()}
        if (self.folder / REJECTS).exists():
            self.rejects = {item["key"]: item["reason"] for item in read_lines(self.folder / REJECTS)}

    def _described(self, sizes: Mapping[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], ShardIndex]]:
        """Entry and rows of the shards that are as they were left: by the index of a finished folder, or by the lines
        of a stopped writer. Whatever is wrong with a description, the shard is read instead."""
        marker = self.folder / MARKER
        if not marker.is_file():
            index = ShardIndex.kept(self.folder)
            parts = index.parts() if index is not None and not index.rejects else []
            return {part.shards[0]: (sizes[part.shards[0]], part) for part in parts if part.shards[0] in sizes}
        found = {}
        with open(marker, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, TypeError, KeyError, LookupError, OSError):
                    tree = json.loads(line)
                    name, entry = tree["shard"], tree["entry"]
                    index = ShardIndex(self.folder, [Row.listed(name, row) for row in tree["rows"]], [])
                    if tree["known"] == known(self.folder / name) and index.fits({name: entry["bytes"]}):
                        found[name] = (entry, index)
        self._told |= found.keys()
        return found

    def _describe(self, name: str, index: ShardIndex) -> None:
        rows = [row[1:] for row in index.rows]
        line = {"shard": name, "known": known(self.folder / name), "entry": self.shards[name], "rows": rows}
        append_line(self.folder / MARKER, line)
        self._told.add(name)

    def _scanned(self, name: str, entry: dict[str, Any] | None) -> tuple[dict[str, Any], ShardIndex]:
        path = self.folder / name
        scan = scan_shard(path)
        if scan.rejects:
            raise ShardError(
                describe(str(path), "a finished shard", scan.rejects[0].reason)
                + " Delete it and the shards after it, then run again."
            )
        if entry is None or entry.get("bytes") != path.stat().st_size or "sha256" not in entry:
            entry = describe_shard(path, len(scan.rows))
        return entry, ShardIndex(self.folder, scan.rows, [])

    def _open_shard(self) -> IO[bytes]:
        if self._stream is not None:
            return self._stream
        if self._lock is None:
            raise ShardError(describe(str(self.folder), "an open writer", "a closed one"))
        (self.folder / MARKER).touch()
        for name, index in zip(self.shards, self._indexes, strict=True):
            if name not in self._told:
                self._describe(name, index)
        (self.folder / SIZES).unlink(missing_ok=True)
        self._sum, self._end = hashlib.sha256(), 0
        self._stream = open(self._temporary, "wb")  # noqa: SIM115 (closed by _finish_shard or abandon)
        return self._stream

    def _finish_shard(self) -> None:
        with self._disk_errors():
            if self._stream is not None:
                # Two blocks of zeros end a tar, which is filled up to whole records.
                ending = bytes(2 * tarfile.BLOCKSIZE + -(self._end + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
                self._stream.write(ending)
                self._sum.update(ending)
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                size = self._end + len(ending)
                entry = {"samples": len(self._rows), "bytes": size, "sha256": self._sum.hexdigest()}
                name, index = self._name, ShardIndex(self.folder, list(self._rows.values()), [])
                os.replace(self._temporary, self.folder / name)
                self.shards[name] = entry
                self._indexes.append(index)
                self._finished |= self._rows.keys()
                self._stream, self._rows = None, {}
                self._describe(name, index)
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
