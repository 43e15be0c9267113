"""What a frozen encoder made of each window, kept on disk: the second epoch and the next run read it.

The tokens of a window depend on the encoder's configuration and weights and on the window's samples, so those are the
key: a cache folder can be shared by runs, processes and encoders, and is never stale. Beside them stands which windows
a stored sound has (:mod:`audio_llm.training.sounds`), so that a sound need not be decoded for its key.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audio_llm import __version__
from audio_llm.errors import ConfigError, TrainingError, describe
from audio_llm.model.encoder import encoder_config

LIMIT_GIB = 100.0  # of a cache folder, unless a recipe says otherwise
_AT_ONCE = 500  # keys of a query; SQLite takes at least 999
_PATIENCE = 60.0  # seconds to wait for another process that writes
_TABLE = """
pragma page_size = 65536;
pragma journal_mode = truncate;
create table if not exists windows (key blob primary key, count integer, hidden integer, checksum integer, data blob);
create table if not exists sounds (key blob primary key, checksum integer, windows blob);
"""
_WINDOW = struct.Struct("<16sq")  # of a sound: its key, its samples per channel


@dataclass(eq=False)
class Kept:
    """What a cache has of one sample when it is read: the `tokens` (n, hidden) and masks (n,) of its windows. Where it
    lacks some, the samples are there, and `sounds` are what they will be known by: keys and numbers of windows."""

    windows: int
    sounds: list[tuple[bytes, int]] = field(default_factory=list)
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def encoder_digest(encoder: nn.Module) -> str:
    """First 16 hex digits of SHA-256 over the encoder's configuration, weights and buffers, and this version."""
    digest = hashlib.sha256(json.dumps([__version__, encoder_config(encoder)], sort_keys=True).encode())  # type: ignore[arg-type]
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def join_tokens(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several (tokens (rows, n, hidden), mask (rows, n)) one behind the other; rows of fewer tokens are filled up."""
    longest = max(mask.shape[1] for _, mask in parts)
    pad = nn.functional.pad
    tokens = [pad(tokens, (0, 0, 0, longest - tokens.shape[1])) for tokens, _ in parts]
    return torch.cat(tokens), torch.cat([pad(mask, (0, longest - mask.shape[1])) for _, mask in parts])


class TokenStore:
    """One SQLite file with the tokens of many windows, which several processes may read and fill.

    Raises :class:`TrainingError` for a folder that cannot be written. A file that cannot be read is begun anew; an
    entry that is not as it was written is not there. Once all files beside it reach `limit` bytes nothing more is kept:
    an epoch goes through all windows, so making room for one would lose another that comes sooner.
    """

    def __init__(self, path: Path, dtype: torch.dtype, limit: float) -> None:
        self.path, self.dtype, self.limit, self.full = path, dtype, limit, False
        self._connections: dict[int, sqlite3.Connection] = {}  # by process
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._begin_anew()
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise TrainingError(
                describe(f"encoder_cache {path.parent}", "a folder that can be written", reason)
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": {}}

    @property
    def _connection(self) -> sqlite3.Connection:
        """This process's own: what a fork has taken along may be neither used nor closed there."""
        if os.getpid() not in self._connections:
            self._open()
        return self._connections[os.getpid()]

    def _open(self) -> None:
        connection = sqlite3.connect(self.path, timeout=_PATIENCE, check_same_thread=False)
        self._connections[os.getpid()] = connection
        connection.executescript(_TABLE)
        # What a killed process began is undone by the next; only a machine that loses its power can damage the file.
        connection.execute("pragma synchronous = off")

    def _begin_anew(self) -> None:
        warnings.warn(f"encoder_cache {self.path}: cannot be read and is begun anew", stacklevel=4)
        self._connection.close()
        for name in (self.path.name, f"{self.path.name}-journal"):
            self.path.with_name(name).unlink(missing_ok=True)
        self._open()

    def _select(self, table: str, keys: Sequence[bytes]) -> list[tuple[Any, ...]]:
        """The rows of `table` with these keys, as far as they can be read."""
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            query = f"select * from {table} where key in ({', '.join('?' * len(part))})"
            try:
                rows += self._connection.execute(query, part).fetchall()
            except sqlite3.OperationalError:  # another process writes all the time
                continue
            except sqlite3.DatabaseError:
                self._begin_anew()
        return rows

    def read(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Tensor, Tensor]]:
        """Of the windows `keys` that are there: tokens (n, hidden) in the store's dtype and mask (n,)."""
        found: dict[bytes, tuple[Tensor, Tensor]] = {}
        for key, count, hidden, checksum, data in self._select("windows", keys):
            if zlib.crc32(data) == checksum:
                mask = torch.frombuffer(bytearray(data[-count:]), dtype=torch.bool)
                tokens = torch.frombuffer(bytearray(data[:-count]), dtype=self.dtype)
                found[key] = tokens.view(count, hidden), mask
        return found

    def sounds(self, keys: Sequence[bytes]) -> dict[bytes, list[tuple[bytes, int]]]:
        """Of the sounds `keys` that are known: the key of each window, and its samples per channel."""
        rows = self._select("sounds", keys)
        return {key: list(_WINDOW.iter_unpack(data)) for key, checksum, data in rows if zlib.crc32(data) == checksum}

    def write(
        self,
        entries: Mapping[bytes, tuple[Tensor, Tensor]],
        sounds: Mapping[bytes, Sequence[tuple[bytes, int]]] | None = None,
    ) -> None:
        """Keep tokens (n, hidden) and masks (n,) of windows, and which windows `sounds` have, as :meth:`sounds` gives
        them: all of it or, where there is no room, nothing."""
        if self.full:
            return
        rows, known = [], []
        for key, (tokens, mask) in entries.items():
            data = tokens.contiguous().view(torch.uint8).numpy().tobytes() + mask.to(torch.bool).numpy().tobytes()
            rows.append((key, *tokens.shape, zlib.crc32(data), data))
        for key, windows in (sounds or {}).items():
            data = b"".join(_WINDOW.pack(*window) for window in windows)
            known.append((key, zlib.crc32(data), data))
        try:
            used = sum(path.stat().st_size for path in self.path.parent.glob("*.sqlite"))
            if used + sum(len(row[-1]) for row in (*rows, *known)) > self.limit:
                raise OSError(f"{used / 2**30:.3g} of {self.limit / 2**30:.3g} GiB are used")
            with self._connection, closing(self._connection.cursor()) as cursor:
                cursor.executemany("insert or replace into windows values (?, ?, ?, ?, ?)", rows)
                cursor.executemany("insert or replace into sounds values (?, ?, ?)", known)
        except (OSError, sqlite3.Error) as error:
            self.full = True
            message = "takes no more windows, the encoder hears the others every time"
            cure = "raise encoder_cache_gib, or delete the files of encoders that are no longer used"
            warnings.warn(f"encoder_cache {self.path.parent}: {message} ({error}); {cure}", stacklevel=3)


class EncoderCache:
    """``cache(input_audio, audio_lengths)`` is ``model.encode_audio`` of them, computed once per distinct window.

    `model` is the backbone (``AudioLLMModel``) with a frozen encoder; `hits` and `misses` count windows. Tokens are
    kept in `dtype` and rounded to it when they are computed as well, so that an epoch from the cache is one without.
    """

    def __init__(
        self, folder: Path, model: Any, dtype: torch.dtype = torch.float32, limit_gib: float | None = LIMIT_GIB
    ) -> None:
        encoder = model.audio_encoder
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ConfigError(
                "encoder_cache: the encoder is trained, so its tokens change; use it with train.encoder: frozen."
            )
        if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            raise ConfigError("encoder_cache: DeepSpeed ZeRO-3 partitions the encoder; use ZeRO-2 or leave it out.")
        name = f"{encoder_digest(encoder)}-{str(dtype).removeprefix('torch.')}.sqlite"
        limit = float("inf") if limit_gib is None else limit_gib * 2**30
        self.model, self.store = model, TokenStore(folder / name, dtype, limit)
        self.hits = self.misses = 0

    def __call__(
        self, input_audio: Tensor | None, audio_lengths: Tensor | None, kept: Sequence[Kept] = ()
    ) -> tuple[Tensor, Tensor]:
        """(windows, channels, time) and (windows,) → tokens (windows, n, hidden) float32 and mask (windows, n).

        `kept` are the samples whose windows are wanted, one behind the other; those without tokens have their windows
        in `input_audio`, which is None where all have some. Without it, the windows of `input_audio` are.
        """
        fresh: list[tuple[Tensor, Tensor]] = []
        device = self.model.device if input_audio is None else input_audio.device
        if input_audio is not None and audio_lengths is not None:
            fresh = self._encode(input_audio, audio_lengths, [one for one in kept if not one.tokens])
        rows, parts = iter(fresh), [] if kept else fresh
        for one in kept:
            parts += one.tokens or itertools.islice(rows, one.windows)
            self.hits += len(one.tokens)
        tokens, mask = join_tokens([(tokens[None], mask[None]) for tokens, mask in parts])
        return tokens.to(device).float(), mask.to(device)

    def _encode(self, input_audio: Tensor, audio_lengths: Tensor, kept: Sequence[Kept]) -> list[tuple[Tensor, Tensor]]:
        """Tokens (n, hidden) and mask (n,) of each window, those of `kept` one behind the other."""
        samples, lengths = input_audio.detach().cpu(), audio_lengths.tolist()
        keys = [window_key(row[:, :length]) for row, length in zip(samples, lengths, strict=True)]
        found = self.store.read(keys)
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        rows = list(missing.values())
        self.misses += (fresh := sum(key in missing for key in keys))
        self.hits += len(keys) - fresh
        made: dict[bytes, tuple[Tensor, Tensor]] = {}
        if missing:
            # No longer than they are: what else stands in the batch, known before or not, must not show.
            longest = max(lengths[row] for row in rows)
            with torch.no_grad():
                tokens, mask = self.model.encode_audio(input_audio[rows, :, :longest], audio_lengths[rows])
            made = dict(zip(missing, zip(tokens.to(self.store.dtype).cpu(), mask.cpu(), strict=True), strict=True))
        if made or any(one.sounds for one in kept):
            windows = list(zip(keys, lengths, strict=True))
            sounds: dict[bytes, list[tuple[bytes, int]]] = {}
            for one in kept:
                own, windows = iter(windows[: one.windows]), windows[one.windows :]
                sounds |= {key: list(itertools.islice(own, count)) for key, count in one.sounds}
            self.store.write(made, sounds)
        found |= made
        return [found[key] for key in keys]


def window_key(window: Tensor) -> bytes:
    """16 bytes of SHA-256 over the shape and the float32 samples (channels, time) of a window."""
    digest = hashlib.sha256(str(tuple(window.shape)).encode())
    digest.update(window.contiguous().numpy().data)
    return digest.digest()[:16]


def open_cache(recipe: Any, model: Any, bf16: bool) -> EncoderCache:
    """The cache of a recipe's ``encoder_cache`` for `model` (bare or wrapped by PEFT), in half precision where training
    is."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = torch.bfloat16 if bf16 else torch.float32
    return EncoderCache(recipe.encoder_cache, base.model, dtype, recipe.encoder_cache_gib)
