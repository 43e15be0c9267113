"""Reading shards: samples by number, read by byte ranges."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio_llm.audio import Waveform, check_format, sha256
from audio_llm.containers import UNGUARDED
from audio_llm.errors import AudioError, ShardError, describe
from audio_llm.shards.index import Row, ShardIndex, each_once
from audio_llm.shards.rendering import sound_of
from audio_llm.shards.schema import AudioInfo, Sample

MAX_OPEN_SHARDS = 64  # far below the usual limit of 1024 descriptors per process
MAX_SECONDS = 600.0  # of a clip whose JSON does not state its length


class _Opened:
    """A file for reading, closed once nobody holds it: threads share it, and one may be reading when it is let go."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardDataset:
    """Map-style samples of one or several shard folders, read by ``os.pread`` of their byte ranges; a folder may be an
    address as well (:mod:`audio_llm.shards.remote`), or the index of those of its samples that are meant.

    ``dataset[i]`` is ``{"sample": Sample, "waveforms": [Waveform, …], "coordinates": {"index", "shard", "key"}}``;
    without `decode` there are no waveforms. `layouts` and `sample_rate` are an encoder's: a sample that does not fit is
    an :class:`AudioError` naming both sides when the dataset is made, not in the middle of a run. Pickles into workers
    (fork and spawn); open files stay behind.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path | ShardIndex],
        *,
        decode: bool = True,
        layouts: Sequence[str] | None = None,
        sample_rate: int | None = None,
        verify: bool = False,
        max_reject_share: float = 0.01,
        reject_key: str = "",
    ) -> None:
        listed = [folders] if isinstance(folders, (str, Path)) else list(folders)
        if not listed:
            raise ShardError(describe("shard dataset", "at least one folder", "none"))
        self.decode = decode
        self.layouts = tuple(layouts) if layouts is not None else None
        self.sample_rate = sample_rate
        opened = (
            f if isinstance(f, ShardIndex) else ShardIndex.load(f, verify, max_reject_share, reject_key) for f in listed
        )
        self.indexes: list[ShardIndex] = each_once(opened)
        self._starts = np.cumsum([0] + [len(index) for index in self.indexes])
        # Columns over all folders: reading a sample must cost less than decoding it, so it builds no index rows.
        firsts = np.cumsum([0] + [len(index.shards) for index in self.indexes])
        self._paths = [str(index.folder / shard) for index in self.indexes for shard in index.shards]
        self._remotes = [index.remote for index in self.indexes for _ in index.shards]
        self.shard_ids = np.concatenate(
            [index.shard_of.astype(np.int64) + first for index, first in zip(self.indexes, firsts, strict=False)]
        )  # (samples,) the shard of every sample, counted over all folders
        self._ranges = np.concatenate([index.ranges for index in self.indexes])
        further = [index.further + [self._starts[n], 0, 0, 0, 0] for n, index in enumerate(self.indexes)]
        self._further = np.concatenate(further)  # of audio members behind the first: sample, offset, size, …
        self._opened: dict[int, _Opened] = {}
        self.compared = np.zeros(len(self), bool)  # with their JSON's checksum, by this process
        self._check_formats()

    def __len__(self) -> int:
        return len(self.shard_ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.entry(i)
        if not self.decode:
            return item
        return item | {"waveforms": self._waveforms(item["coordinates"]["index"], item["sample"])}

    def entry(self, i: int) -> dict[str, Any]:
        """``dataset[i]`` without its waveforms."""
        i, sample = self._position(i), self.load_sample(i)
        coordinates = {"index": i, "shard": self._paths[self.shard_ids[i]], "key": sample.id}
        return {"sample": sample, "coordinates": coordinates}

    def load_sample(self, i: int) -> Sample:
        """The JSON of sample `i`; the audio is not touched."""
        i = self._position(i)
        shard = int(self.shard_ids[i])
        offset, size = self._ranges[i, :2].tolist()
        return Sample.from_trusted_json(self._read(shard, offset, size), self._paths[shard])

    def load_waveforms(self, i: int) -> list[Waveform]:
        """The decoded sounds of sample `i`, checked against what its JSON says of rate, layout and length."""
        return self._waveforms(self._position(i), self.load_sample(i))

    def load_waveform(self, i: int) -> Waveform:
        """:meth:`load_waveforms` for whoever hears one sound: a sample of several is an :class:`AudioError`."""
        first, *others = self.load_waveforms(i)
        if others:
            raise AudioError(describe(f"sample '{self.row(i).key}'", "one sound", f"{1 + len(others)}"))
        return first

    def load_audio_bytes(self, i: int) -> list[bytes]:
        """The audio members of sample `i` as they are stored."""
        i = self._position(i)
        first, last = np.searchsorted(self._further[:, 0], [i, i + 1])
        ranges = [*self._ranges[i, None, 2:].tolist(), *self._further[first:last, 1:3].tolist()]
        return [self._read(int(self.shard_ids[i]), offset, size) for offset, size in ranges]

    def locate(self, i: int) -> tuple[Path, Row]:
        """The folder and the index row of sample `i`."""
        i = self._position(i)
        which = int(np.searchsorted(self._starts, i, side="right")) - 1
        index = self.indexes[which]
        return index.folder, index.row(i - int(self._starts[which]))

    def row(self, i: int) -> Row:
        """The index row of sample `i`."""
        return self.locate(i)[1]

    @property
    def fingerprint(self) -> str:
        """Of the checksums in ``sizes.json``, and of what :func:`audio_llm.files.glance` sees of the shards."""
        facts = [index.seen() for index in self.indexes]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def find(self, key: str) -> int:
        """The position of the sample with this id; :class:`ShardError` if there is none."""
        for start, index in zip(self._starts, self.indexes, strict=False):
            hits = np.flatnonzero(index.keys == key.encode())
            if len(hits):
                return int(start + hits[0])
        folders = ", ".join(str(index.folder) for index in self.indexes)
        raise ShardError(describe(folders, f"a sample '{key}'", f"{len(self)} samples, none with that id"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def close(self) -> None:
        """Close the open shards; they open again when needed."""
        self._opened.clear()

    def _position(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(i) % len(self)

    def _waveforms(self, i: int, sample: Sample) -> list[Waveform]:
        members, name = self.load_audio_bytes(i), f"{self._paths[self.shard_ids[i]]}: {sample.id}"
        infos: list[AudioInfo | None] = [*sample.audio] or [None] * len(members)
        if len(infos) != len(members):  # the shard was changed behind the index's back
            raise AudioError(describe(name, f"{len(members)} sounds in its JSON", f"{len(infos)}"))
        called = f", sound {{}} of {len(members)}" if len(members) > 1 else ""
        pairs = enumerate(zip(members, infos, strict=True), 1)
        heard = [self._waveform(i, data, info, name + called.format(n)) for n, (data, info) in pairs]
        self.compared[i] = True  # once: it takes as long as decoding
        return heard

    def _waveform(self, i: int, data: bytes, info: AudioInfo | None, name: str) -> Waveform:
        layout, longest = (info.layout, info.seconds + 1) if info else (None, MAX_SECONDS)
        place = self._paths[self.shard_ids[i]]
        waveform = sound_of(data, place, name=name, layout=layout, max_seconds=longest)
        if info is None:
            rate = waveform.sample_rate
            check_format(waveform.layout, rate, layouts=self.layouts, sample_rate=self.sample_rate, name=name)
            return waveform
        if waveform.sample_rate != info.sample_rate or abs(waveform.seconds - info.seconds) * info.sample_rate > 1:
            expected = f"{info.seconds} s at {info.sample_rate} Hz, as its JSON says"
            raise AudioError(describe(name, expected, f"{waveform.seconds:.6f} s at {waveform.sample_rate} Hz"))
        if info.sha256 and data.startswith(UNGUARDED) and not self.compared[i] and sha256(waveform) != info.sha256:
            raise AudioError(describe(name, "samples of the SHA-256 in its JSON", "others: damaged or changed"))
        return waveform

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            if remote := self._remotes[shard]:
                return remote.read(self._paths[shard], offset, size)
            opened = self._opened.get(shard)
            if opened is None:
                if len(self._opened) >= MAX_OPEN_SHARDS:
                    self._opened.pop(list(self._opened)[0], None)
                opened = self._opened.setdefault(shard, _Opened(self._paths[shard]))
            data = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            raise ShardError(describe(self._paths[shard], "a readable shard", error.strerror or str(error))) from error
        if len(data) != size:
            found = f"{len(data)}: the shard became shorter"
            raise ShardError(describe(self._paths[shard], f"{size} bytes at {offset}", found))
        return data

    def _check_formats(self) -> None:
        if self.layouts is None and self.sample_rate is None:
            return
        for index in self.indexes:
            for row, layout, rate in index.each_format():
                name = f"{index.folder / row.shard}: {row.key}"
                check_format(layout, rate, layouts=self.layouts, sample_rate=self.sample_rate, name=name)
