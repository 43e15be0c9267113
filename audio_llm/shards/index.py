"""Where every sample lies: one scan of the tar headers, kept beside the shards as ``index.npz``.

A writer leaves the index of what it wrote. The scan reads and validates every JSON member and the place of every audio
member. What cannot be used (a shard cut in the middle, wrong JSON, a duplicate key, a missing member) is counted and
listed in ``index-rejects.jsonl``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from audio_llm.audio import LAYOUT_CHANNELS
from audio_llm.errors import ShardError, describe
from audio_llm.files import content_hash, glance, parse_json, read_json
from audio_llm.shards.remote import Remote, address
from audio_llm.shards.schema import Sample

# The first sound of a sample is KEY.flac or the like, the second KEY.audio1.flac, the third KEY.audio2.flac;
# KEY.scene is rendered when it is read.
AUDIO_SUFFIXES = ("flac", "wav", "ogg", "opus", "mp3", "oga", "wave", "aif", "aiff", "au", "caf", "w64", "scene")
CACHE = "index.npz"
INDEX_REJECTS = "index-rejects.jsonl"
CACHE_VERSION = 4
# What a member may hold: a sample's JSON has a few kilobytes, ten minutes of sound a quarter of a gibibyte.
MAX_JSON_BYTES, MAX_AUDIO_BYTES, MAX_HEADER_BYTES = 2**24, 2**30, 2**20
LAYOUTS = tuple(LAYOUT_CHANNELS)
COLUMNS = ("shard_of", "keys", "ranges", "layouts", "sample_rates", "seconds")  # of an index, an entry a sample
_FURTHER = re.compile(rf"audio([1-9]\d{{0,3}})\.(?:{'|'.join(AUDIO_SUFFIXES)})")


class Member(NamedTuple):
    """An audio member behind the first: its byte range, and what the JSON says of it, as in :class:`Row`."""

    offset: int
    size: int
    layout: str | None = None
    sample_rate: int = 0


class Row(NamedTuple):
    """One sample: its shard, its key, byte ranges of its JSON and of its first audio member, what the JSON says of that
    one, and the audio members behind it.

    ``layout`` is None, and rate and seconds 0, where the JSON has no ``audio`` field; ``seconds`` are of all sounds.
    """

    shard: str
    key: str
    json_offset: int
    json_size: int
    audio_offset: int
    audio_size: int
    layout: str | None = None
    sample_rate: int = 0
    seconds: float = 0.0
    further: tuple[Member, ...] = ()

    @classmethod
    def of(
        cls,
        shard: str,
        sample: Sample,
        text: tuple[int, int],
        audio: tuple[int, int],
        further: Sequence[tuple[int, int]] = (),
    ) -> Row:
        """Of a sample whose JSON, audio and audio behind that lie at (offset, bytes) of the shard."""
        told: list[tuple[str | None, int]] = [(info.layout, info.sample_rate) for info in sample.audio]
        told = told or [(None, 0)] * (1 + len(further))
        members = tuple(Member(*place, *what) for place, what in zip(further, told[1:], strict=True))
        (layout, rate), seconds = told[0], sum((info.seconds for info in sample.audio), 0.0)
        return cls(shard, sample.id, *text, *audio, layout, rate, seconds, members)

    @classmethod
    def listed(cls, shard: str, values: Sequence[Any]) -> Row:
        """Of its other fields as JSON has them."""
        *own, further = values
        return cls._make((shard, *own, tuple(Member(*member) for member in further)))


@dataclass(frozen=True)
class Reject:
    """`count` samples of a shard that cannot be used, and why; `key` is None when they cannot be named."""

    shard: str
    key: str | None
    reason: str
    count: int = 1


@dataclass
class Scan:
    """What one shard holds."""

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def read_sizes(folder: Path) -> dict[str, dict[str, Any]]:
    """The shard entries of ``sizes.json``; empty without the file. Plain ``{name: count}`` files are understood too."""
    path = folder / "sizes.json"
    if not path.exists():
        return {}
    try:
        tree = read_json(path)
        shards = tree.get("shards", tree)
        return {name: {"samples": int(e)} if isinstance(e, int) else {**e} for name, e in shards.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ShardError(
            describe(str(path), "JSON with an entry per shard", f"something else ({error})")
            + " Delete the file to read the folder without its counts and checksums."
        ) from error


def sizes_text(folder: str | Path) -> bytes:
    """``sizes.json`` of a folder or an address as it stands there: what its data are known by."""
    return Remote.open(folder).text if address(folder) else (Path(folder) / "sizes.json").read_bytes()


def data_hash(folders: Sequence[str | Path]) -> str:
    """First 16 hex digits of the SHA-256 of the folders' ``sizes.json``, which hold the checksums of their shards; a
    folder without one is known by what :func:`shards_digest` sees."""
    sizes = hashlib.sha256()
    for folder in folders:
        listed = address(folder) or (Path(folder) / "sizes.json").is_file()
        sizes.update(sizes_text(folder) if listed else shards_digest([folder]).encode())
    return sizes.hexdigest()[:16]


def shards_digest(folders: Sequence[str | Path]) -> str:
    """Of names and of what :func:`audio_llm.files.glance` sees of the shards: they may be other ones than
    ``sizes.json`` tells of."""
    seen = hashlib.sha256()
    for folder in folders:
        if address(folder):  # what is fetched from there is compared with its checksums
            seen.update(sizes_text(folder))
            continue
        for path in shard_paths(Path(folder)):
            seen.update(f"{path.name} {glance(path)}\n".encode())
    return seen.hexdigest()[:16]


def scan_shard(path: Path) -> Scan:
    """Scan one tar: complete samples become rows, everything else rejects. Raises :class:`ShardError` if unreadable."""
    scan = Scan()
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with open(path, "rb") as stream:
            cut = scan_members(stream, members, scan, path.name)
            for key, parts in members.items():
                _add_row(stream, path.name, key, parts, scan, cut)
    except OSError as error:
        raise ShardError(describe(str(path), "a readable shard", error.strerror or str(error))) from error
    if cut and not any(reject.reason == cut for reject in scan.rejects):
        scan.rejects.append(Reject(path.name, None, cut))
    return scan


def split_name(member: str) -> tuple[str, str]:
    """(key, suffix) of a member by WebDataset's rule: parted at the first dot of the base name; ``./`` is no part of a
    key, endings may be written in capitals. No suffix for what is no part of a sample, as ``._x``."""
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem).removeprefix("./"), suffix.lower() if stem else ""


def scan_members(stream: io.BufferedReader, members: dict[str, Any], scan: Scan, shard: str) -> str | None:
    """Fill ``members[key][suffix] = (offset, size)`` with what samples are made of, and `scan` with what cannot be
    used; returns why the shard ends too early, or None if it does not."""
    size = os.fstat(stream.fileno()).st_size
    end = 0
    if os.pread(stream.fileno(), 2, 0) == b"\x1f\x8b":
        return "a gzip archive: unpack it (gunzip), for samples are read at any place of a shard"
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key, suffix = split_name(member.name)
                if not member.isfile() or not suffix or member.offset_data + member.size > size:
                    continue
                parts = members.setdefault(key, {})
                limit = MAX_JSON_BYTES if suffix == "json" else MAX_AUDIO_BYTES
                if member.issparse() or member.size > limit:
                    what = "a sparse member" if member.issparse() else f"{member.size} bytes, where {limit} are read"
                    scan.rejects.append(Reject(shard, key, f"member '{member.name}': {what}"))
                elif suffix in parts:
                    scan.rejects.append(Reject(shard, key, f"duplicate member '{member.name}'"))
                else:
                    parts[suffix] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        return f"cut in the middle, or not a tar file ({error})"
    if size < end + 2 * tarfile.BLOCKSIZE:  # a tar ends with two blocks of zeros
        return f"cut in the middle: {size} bytes without an end of archive"
    return None


class _Headers(io.RawIOBase):
    """A tar file of which headers are read: an extended one of gigabytes is none."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell  # type: ignore[method-assign]

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)


def _add_row(
    stream: io.BufferedReader, shard: str, key: str, parts: dict[str, Any], scan: Scan, cut: str | None
) -> None:
    if not parts and any(reject.key == key for reject in scan.rejects):
        return  # said before
    audio = next((parts[suffix] for suffix in AUDIO_SUFFIXES if suffix in parts), None)
    further = further_members(parts)
    if "json" not in parts or audio is None:
        missing = "json" if "json" not in parts else "audio"
        names = [f"{key}.{suffix}" for suffix in parts]
        found = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        own = [suffix for suffix in parts if not _FURTHER.fullmatch(suffix)]
        dotted = sum("." in suffix for suffix in own)
        cure = "; a key ends at the first dot of a name, so rename them" if dotted else ""
        endings = [suffix.rpartition(".")[2] for suffix in own]
        stands_for = max(endings.count("json"), sum(ending in AUDIO_SUFFIXES for ending in endings), 1)
        scan.rejects.append(Reject(shard, key, cut or f"no {missing} member (found {found}{cure})", stands_for))
        return
    offset, size = parts["json"]
    try:
        sample = Sample.from_json(os.pread(stream.fileno(), size, offset), where=f"{shard}: {key}")
        if sample.id not in (key, key.rpartition("/")[2]):  # a folder in the tar is no part of an id
            raise ShardError(describe(f"{shard}: {key}", f"id '{key}'", f"'{sample.id}'"))
        if further is None or len(sample.audio) not in (0, 1 + len(further)):
            found = ", ".join(suffix for suffix in sorted(parts) if suffix != "json")
            expected = f"an audio member for each of the {len(sample.audio)} sounds of its JSON"
            if not sample.audio:
                expected = "audio members numbered from audio1 on, each once"
            raise ShardError(describe(f"{shard}: {key}", expected, found))
    except ShardError as error:
        scan.rejects.append(Reject(shard, key, str(error)))
        return
    scan.rows.append(Row.of(shard, sample, (offset, size), audio, further))


def further_members(parts: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The (offset, size) of audio members behind the first, in order; None where a number is left out or stands twice,
    and where there are two first ones, such as ``flac`` and ``wav``. `parts` are a key's members by their suffixes."""
    if len(parts) > 2 and sum(suffix in parts for suffix in AUDIO_SUFFIXES) > 1:
        return None
    numbered: dict[int, tuple[int, int]] = {}
    for suffix, place in parts.items():
        found = _FURTHER.fullmatch(suffix)
        if found and numbered.setdefault(int(found[1]), place) is not place:
            return None
    places = [numbered.get(number) for number in range(1, 1 + len(numbered))]
    return [place for place in places if place] if all(places) else None


class ShardIndex:
    """The rows of one folder as columns, small enough to be copied into every worker of a loader.

    Of a folder behind an address (`remote`), `folder` is the one that its shards are fetched into.
    """

    def __init__(self, folder: Path, rows: list[Row], rejects: list[Reject], remote: Remote | None = None) -> None:
        self.folder, self.remote = folder, remote
        self.rejects = rejects
        self.chosen = ""  # of a part that was chosen by tags: one sentence on it
        self.shards: list[str] = sorted({row.shard for row in rows})
        number = {shard: i for i, shard in enumerate(self.shards)}
        self.shard_of = np.array([number[row.shard] for row in rows], np.int32)
        self.keys = np.array([row.key.encode() for row in rows], np.bytes_)
        ranges = [(r.json_offset, r.json_size, r.audio_offset, r.audio_size) for r in rows]
        self.ranges = np.array(ranges, np.int64).reshape(len(rows), 4)
        self.layouts = np.array([_format(row)[0] for row in rows], np.int8)
        self.sample_rates = np.array([row.sample_rate for row in rows], np.int32)
        self.seconds = np.array([row.seconds for row in rows], np.float64)
        # (members, 5) of the audio members behind the first: sample, offset, size, place in LAYOUTS or -1, rate
        further = [(i, m.offset, m.size, *_format(m)) for i, row in enumerate(rows) for m in row.further]
        self.further = np.array(further, np.int64).reshape(len(further), 5)

    def __len__(self) -> int:
        return len(self.shard_of)

    @property
    def rows(self) -> list[Row]:
        return [self.row(i) for i in range(len(self))]

    def row(self, i: int) -> Row:
        names = (*LAYOUTS, None)  # None is at -1
        first, last = np.searchsorted(self.further[:, 0], [i, i + 1])
        further = [
            Member(start, size, names[layout], rate)
            for _, start, size, layout, rate in self.further[first:last].tolist()
        ]
        shard, key = self.shards[self.shard_of[i]], self.keys[i].decode()
        json_offset, json_size, audio_offset, audio_size = self.ranges[i].tolist()
        rate, seconds = int(self.sample_rates[i]), float(self.seconds[i])
        layout = names[self.layouts[i]]
        return Row(shard, key, json_offset, json_size, audio_offset, audio_size, layout, rate, seconds, tuple(further))

    @property
    def formats(self) -> np.ndarray:
        """(3, audios) int64: of every audio member its sample, the place of its layout in LAYOUTS or -1, its rate."""
        first = np.stack([np.arange(len(self)), self.layouts, self.sample_rates]).astype(np.int64)
        return np.hstack([first, self.further[:, [0, 3, 4]].T])

    def each_format(self) -> Iterator[tuple[Row, str, int]]:
        """The first sample that has a sound of it, for every layout and rate that JSON tells."""
        formats = self.formats
        _, first = np.unique(formats[1:], axis=1, return_index=True)
        for sample, layout, rate in formats[:, first].T.tolist():
            if layout >= 0:
                yield self.row(sample), LAYOUTS[layout], rate

    def seen(self) -> list[Any]:
        """The folder's ``sizes.json``, and what :func:`audio_llm.files.glance` sees of its shards, where they are files
        of this machine: those behind an address are known by their checksums."""
        if self.remote:
            return [self.remote.sizes, []]
        return [read_sizes(self.folder), [glance(self.folder / shard) for shard in self.shards]]

    def told(self) -> str:
        """A sentence on the samples that cannot be used, by number and first reason, and one on those that are chosen
        by tags; empty where there is neither."""
        if not self.rejects:
            return self.chosen
        first = self.rejects[0]
        reason = first.reason if len(first.reason) < 300 else first.reason[:300] + " …"
        return (
            f"{self.folder}: {self.reject_count} of {len(self) + self.reject_count} samples cannot be used; the first: "
            f"{first.shard}: {reason.rstrip('.')}. All are in {INDEX_REJECTS}." + f"\n{self.chosen}" * bool(self.chosen)
        )

    @property
    def reject_count(self) -> int:
        return sum(reject.count for reject in self.rejects)

    @classmethod
    def load(
        cls, folder: str | Path, verify: bool = False, max_reject_share: float = 0.01, key: str = ""
    ) -> ShardIndex:
        """The index of a folder, from the cache when names, sizes and times of the shards are those it was made from.

        `verify` reads every byte and compares the SHA-256 of ``sizes.json``. Raises :class:`ShardError` for a folder
        without shards or not finished, for shards that ``sizes.json`` does not know, for wrong checksums, and when
        more than `max_reject_share` of the samples cannot be used; `key` is what a person sets that share by.
        """
        if address(folder):
            fetched = cls._of_remote(Remote.open(folder))
            fetched._check_share(max_reject_share, key)
            return fetched
        folder = Path(folder)
        paths = shard_paths(folder)
        sizes = read_sizes(folder)
        _check_names(folder, paths, sizes)
        if verify:
            _check_sums(folder, paths, sizes)
        index = cls.kept(folder)
        if index is None:
            index = cls._scan(folder, {path.name: scan_shard(path) for path in paths}, sizes)
            index.keep()
        index._check_share(max_reject_share, key)
        return index

    @classmethod
    def kept(cls, folder: Path) -> ShardIndex | None:
        """The index that was kept of the shards as they are now; None where there is none."""
        paths = _shards(folder)
        fingerprint = _fingerprint(folder, paths)
        return cls._from_cache(folder, fingerprint, {path.name: path.stat().st_size for path in paths})

    def keep(self) -> None:
        """Leave the index beside the shards. Best effort: a folder that cannot be written is scanned next time."""
        self._to_cache(_fingerprint(self.folder, _shards(self.folder)))

    @classmethod
    def joined(cls, folder: Path, parts: Sequence[ShardIndex]) -> ShardIndex:
        """The index of `folder` from those of its shards, in their order; no key may be in two of them."""
        index = cls(folder, [], [reject for part in parts for reject in part.rejects])
        index.shards = [shard for part in parts for shard in part.shards]
        for name in COLUMNS:
            setattr(index, name, np.concatenate([getattr(part, name) for part in parts]))
        firsts = np.cumsum([0, *(len(part.shards) for part in parts)][:-1])
        index.shard_of += np.repeat(firsts, [len(part) for part in parts]).astype(np.int32)
        starts = np.cumsum([0, *(len(part) for part in parts)][:-1])
        index.further = np.concatenate(
            [part.further + [start, 0, 0, 0, 0] for part, start in zip(parts, starts, strict=True)]
        )
        return index

    def parts(self) -> list[ShardIndex]:
        """An index for each shard; rejects are left out."""
        order = np.argsort(self.shard_of, kind="stable")
        bounds = np.searchsorted(self.shard_of[order], np.arange(1, len(self.shards)))
        shard_of = self.shard_of[self.further[:, 0]]
        further = self.further[np.argsort(shard_of, kind="stable")]
        ends = np.searchsorted(np.sort(shard_of), np.arange(1, len(self.shards)))
        found = []
        for shard, mine, behind in zip(self.shards, np.split(order, bounds), np.split(further, ends), strict=True):
            part = ShardIndex(self.folder, [], [], self.remote)
            part.shards = [shard]
            for name in COLUMNS:
                setattr(part, name, getattr(self, name)[mine])
            part.shard_of = np.zeros(len(mine), np.int32)
            part.further = behind.copy()
            part.further[:, 0] = np.searchsorted(mine, behind[:, 0])  # `mine` ascends
            found.append(part)
        return found

    def part(self, kept: np.ndarray, chosen: str) -> ShardIndex:
        """The samples of the mask `kept` (samples,) bool, in their order; `chosen` is a sentence on them."""
        part = ShardIndex(self.folder, [], self.rejects, self.remote)
        part.shards, part.chosen = self.shards, chosen
        for name in COLUMNS:
            setattr(part, name, getattr(self, name)[kept])
        part.further = self.further[kept[self.further[:, 0]]].copy()
        part.further[:, 0] = (np.cumsum(kept) - 1)[part.further[:, 0]]
        return part

    @classmethod
    def _of_remote(cls, remote: Remote) -> ShardIndex:
        """Shard after shard is fetched and scanned, once; what is kept of it is the index."""
        fingerprint = json.dumps([CACHE_VERSION, remote.url, remote.sizes], sort_keys=True)
        index = cls._from_cache(remote.folder, fingerprint, {name: e["bytes"] for name, e in remote.sizes.items()})
        if index is None:
            scans = {name: scan_shard(remote.fetch(name)) for name in remote.sizes}
            index = cls._scan(remote.folder, scans, {name: {**entry} for name, entry in remote.sizes.items()})
            index._to_cache(fingerprint)
        index.remote = remote
        return index

    @classmethod
    def _scan(cls, folder: Path, scans: dict[str, Scan], sizes: dict[str, dict[str, Any]]) -> ShardIndex:
        rows: list[Row] = []
        rejects: list[Reject] = []
        seen: set[str] = set()
        for name in sorted(scans.keys() | sizes.keys()):
            scan = scans.get(name, Scan())
            rejects += scan.rejects
            for row in scan.rows:
                if row.key in seen:
                    rejects.append(Reject(name, row.key, f"duplicate key '{row.key}'"))
                else:
                    seen.add(row.key)
                    rows.append(row)
            lost = sizes.get(name, {}).get("samples", 0) - len(scan.rows) - sum(r.count for r in scan.rejects)
            if lost > 0:
                reason = "missing from a shard that is cut" if name in scans else "the whole shard is missing"
                rejects.append(Reject(name, None, reason, lost))
        return cls(folder, rows, rejects)

    def fits(self, sizes: dict[str, int]) -> bool:
        """Whether every row is of a shard of `sizes` (bytes by name) and lies within it."""
        if not set(self.shards) <= set(sizes) or self.ranges.shape != (len(self), 4) or not len(self):
            return False
        columns = (self.shard_of, self.keys, self.layouts, self.sample_rates, self.seconds)
        if any(column.shape != (len(self),) for column in columns) or self.ranges.dtype != np.int64:
            return False
        if self.shard_of.dtype != np.int32 or self.shard_of.min() < 0 or self.shard_of.max() >= len(self.shards):
            return False
        if self.layouts.min() < -1 or self.layouts.max() >= len(LAYOUTS):
            return False
        ends = np.array([sizes[shard] for shard in self.shards], np.int64)[self.shard_of]
        starts, lengths = self.ranges[:, ::2], self.ranges[:, 1::2]  # (samples, JSON and audio)
        most = np.array([MAX_JSON_BYTES, MAX_AUDIO_BYTES])
        inside = (starts >= 0) & (lengths >= 0) & (lengths <= most) & (starts <= ends[:, None] - lengths)
        return bool(inside.all()) and self._further_fit(ends)

    def _further_fit(self, ends: np.ndarray) -> bool:
        """Whether every audio member behind the first is of a sample, in order, and lies before the end of its shard;
        `ends` (samples,) are in bytes."""
        further = self.further
        if further.ndim != 2 or further.shape[1] != 5 or further.dtype != np.int64:
            return False
        sample, start, size, layout, _ = further.T
        if len(further) and (sample.min() < 0 or sample.max() >= len(self) or (np.diff(sample) < 0).any()):
            return False
        known = (layout >= -1) & (layout < len(LAYOUTS))
        return bool(
            (known & (start >= 0) & (size >= 0) & (size <= MAX_AUDIO_BYTES) & (start <= ends[sample] - size)).all()
        )

    def _check_share(self, max_reject_share: float, key: str) -> None:
        total = len(self) + self.reject_count
        if total == 0 or self.reject_count > max_reject_share * total:
            first = self.rejects[0] if self.rejects else Reject("", None, "no samples in the shards")
            name = f"{first.shard}: {first.key}" if first.key else first.shard
            told = first.reason if first.reason.startswith(name) else f"{name}: {first.reason}"
            raise ShardError(
                describe(
                    str(self.folder),
                    f"at most {max_reject_share:.1%} unusable samples",
                    f"{self.reject_count} of {total}",
                    f"First one: {told.rstrip('.')}. All are in {INDEX_REJECTS}; "
                    f"write those shards again{f' or raise {key}' * bool(key)}.",
                )
            )

    def _to_cache(self, fingerprint: str) -> None:
        head = json.dumps(
            {"fingerprint": fingerprint, "shards": self.shards, "rejects": [asdict(r) for r in self.rejects]}
        )
        temporary = self.folder / f".{CACHE}.{os.getpid()}"
        listing = self.folder / INDEX_REJECTS
        try:
            with open(temporary, "wb") as stream:
                columns = {name: getattr(self, name) for name in (*COLUMNS, "further")}
                np.savez(stream, head=np.array(head), **columns)
            os.replace(temporary, self.folder / CACHE)
            if self.rejects:
                lines = [json.dumps(asdict(r), ensure_ascii=False) for r in self.rejects]
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
                os.replace(temporary, listing)
            else:
                listing.unlink(missing_ok=True)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @classmethod
    def _from_cache(cls, folder: Path, fingerprint: str, sizes: dict[str, int]) -> ShardIndex | None:
        """The cached index, where it was made here and speaks of the folder's own shards, within their `sizes`."""
        try:
            with zipfile.ZipFile(folder / CACHE) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    return None  # not ours, and of any size once it is unpacked
            with np.load(folder / CACHE, allow_pickle=False) as cache:
                head = parse_json(str(cache["head"]))
                if head["fingerprint"] != fingerprint:
                    return None
                index = cls(folder, [], [Reject(**reject) for reject in head["rejects"]])
                index.shards = head["shards"]
                for name in (*COLUMNS, "further"):
                    setattr(index, name, cache[name])
                return index if index.fits(sizes) else None
        except Exception:  # a cache that cannot be read, for whatever reason, is a cache to make again
            return None


def _format(audio: Row | Member) -> tuple[int, int]:
    """The place of a layout in LAYOUTS, -1 where none is told, and the rate."""
    return LAYOUTS.index(audio.layout) if audio.layout else -1, audio.sample_rate


def shard_paths(folder: Path) -> list[Path]:
    """The shards of `folder`, sorted; :class:`ShardError` where there is none. Of an address, their names."""
    if address(folder):
        return [Path(name) for name in sorted(Remote.open(folder).sizes)]
    if not folder.is_dir():
        raise ShardError(describe(str(folder), "a folder of shards", "no such folder"))
    paths = _shards(folder)
    packed = sorted(path.name for kind in ("gz", "bz2", "xz", "zst") for path in folder.glob(f"*.tar.{kind}"))
    packed += sorted(path.name for path in folder.glob("*.tgz"))
    if packed:
        cure = "Unpack them (gunzip), for samples are read at any place of a shard."
        raise ShardError(describe(str(folder), "*.tar shards", f"{len(packed)} compressed, such as {packed[0]}", cure))
    if not paths:
        deeper = next((path.parent for path in sorted(folder.glob("*/*.tar"))), None)
        cure = f"Name the folder that they lie in, such as {deeper}." if deeper else "Make them with audio-llm prep."
        raise ShardError(describe(str(folder), "*.tar shards", "none", cure))
    return paths


def check_folders(learnt: Sequence[Path], validated: Sequence[Path]) -> None:
    """Raise :class:`ShardError` for a folder without shards. Warn of one that is validated on and learnt from, under
    its own name or as a copy: what validation says, and decides, is then about nothing new."""
    for folder in (*learnt, *validated):
        shard_paths(folder)
    known = {data_hash([folder]): folder for folder in learnt} if validated else {}
    for folder in validated:
        if twin := known.get(data_hash([folder])):
            copy = f"{folder}, a copy of {twin}" if str(twin) != str(folder) else f"{folder}"
            text = describe("data.validation", "folders that nothing is learnt from", f"{copy}, which data.train has")
            warnings.warn(text, stacklevel=2)


def each_once(indexes: Iterable[ShardIndex]) -> list[ShardIndex]:
    """`indexes` as a list. Raises :class:`ShardError` where two have a shard in common, as a folder, a link or a copy:
    its samples would count twice. Parts that tags chose by other conditions may have."""
    listed = list(indexes)
    seen: dict[tuple[Any, str], int] = {}
    for number, index in enumerate(listed):
        for shard, mark in _marks(index) if len(listed) > 1 else ():
            if (other := seen.setdefault((mark, index.chosen), number)) != number:
                twin = listed[other].folder
                found = "it a second time" if twin == index.folder else f"{shard}, which {twin} has as well"
                cure = f"List it once; data.train takes more of one by a weight: {{path: {twin}, weight: 2}}."
                raise ShardError(describe(str(index.folder), "samples of no other folder in the list", found, cure))
    return listed


def _marks(index: ShardIndex) -> Iterator[tuple[str, Any]]:
    """Names of an index's shards with what tells each: its checksum in ``sizes.json``, and its place on the disk."""
    sizes = index.remote.sizes if index.remote else read_sizes(index.folder)
    for shard in index.shards:
        if known := sizes.get(shard, {}).get("sha256"):
            yield shard, known
        if not index.remote:
            facts = (index.folder / shard).stat()
            yield shard, (facts.st_dev, facts.st_ino)


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def known(path: Path) -> list[int]:
    """What tells a file from others: its inode and the time of its change are this disk's, so that what came with the
    shards about them is not believed."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _fingerprint(folder: Path, paths: Sequence[Path]) -> str:
    """What an index was made from."""
    seen = [(path.name, *known(path)) for path in paths]
    return json.dumps([CACHE_VERSION, seen, read_sizes(folder)], sort_keys=True)


def _check_names(folder: Path, paths: list[Path], sizes: dict[str, dict[str, Any]]) -> None:
    if (folder / ".writing").exists():
        raise ShardError(
            describe(str(folder), "a finished folder", "one whose writing stopped")
            + " Run the same command again to finish it, or delete .writing in it to use what is there."
        )
    unknown = [path.name for path in paths if sizes and path.name not in sizes]
    if unknown:
        raise ShardError(
            describe(str(folder), "the shards of sizes.json", f"also {', '.join(unknown[:3])}")
            + " Move them to a folder of their own, or delete sizes.json to accept the folder as it is."
        )


def _check_sums(folder: Path, paths: list[Path], sizes: dict[str, dict[str, Any]]) -> None:

    if not sizes:
        raise ShardError(describe(str(folder), "a sizes.json with checksums", "none, so nothing can be verified"))
    for path in paths:
        known = sizes[path.name].get("sha256")
        if known is None or describe_shard(path, 0)["sha256"] != known:
            found = "no checksum" if known is None else "other bytes: the shard was changed or damaged"
            raise ShardError(describe(str(path), "the SHA-256 of sizes.json", found, "Write or copy it again."))


def describe_shard(path: Path, samples: int) -> dict[str, Any]:
    """The entry of one shard in ``sizes.json``."""
    return {"samples": samples, "bytes": path.stat().st_size, "sha256": content_hash(path)}
