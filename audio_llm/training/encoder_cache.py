"""What a frozen encoder made of each window, kept on disk: the second epoch and the next run read it.

The tokens of a window depend on the encoder's configuration and weights and on the window's samples, so those are the
key: a cache folder can be shared by runs, processes and encoders, and is never stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio_llm import __version__
from audio_llm.errors import ConfigError, TrainingError, describe
from audio_llm.model.encoder import encoder_config


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


class EncoderCache:
    """``cache(input_audio, audio_lengths)`` is ``model.encode_audio`` of them, computed once per distinct window.

    `model` is the backbone (``AudioLLMModel``) with a frozen encoder; `hits` and `misses` count windows. Files are
    ``FOLDER/ENCODER/ab/abcdef….safetensors`` with `tokens` (n, hidden) float32 and `mask` (n,); each is written whole
    or not at all, one that cannot be read is computed again.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        encoder = model.audio_encoder
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ConfigError(
                "encoder_cache: the encoder is trained, so its tokens change; use it with train.encoder: frozen."
            )
        if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            raise ConfigError("encoder_cache: DeepSpeed ZeRO-3 partitions the encoder; use ZeRO-2 or leave it out.")
        self.model, self.folder = model, folder / encoder_digest(encoder)
        self.hits = self.misses = 0

    def __call__(self, input_audio: Tensor, audio_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(windows, channels, time) and (windows,) → tokens (windows, n, hidden) and mask (windows, n)."""
        paths = [
            self._path(window[:, :length]) for window, length in zip(input_audio, audio_lengths.tolist(), strict=True)
        ]
        found = [self._read(path) for path in paths]
        missing = [row for row, entry in enumerate(found) if entry is None]
        self.hits += len(paths) - len(missing)
        self.misses += len(missing)
        if missing:
            with torch.no_grad():
                tokens, mask = self.model.encode_audio(input_audio[missing], audio_lengths[missing])
            for row, entry in zip(missing, zip(tokens.float().cpu(), mask.cpu(), strict=True), strict=True):
                found[row] = entry
                self._write(paths[row], *entry)
        tokens, mask = join_tokens([(entry[0][None], entry[1][None]) for entry in found if entry is not None])
        return tokens.to(input_audio.device), mask.to(input_audio.device)

    def _path(self, window: Tensor) -> Path:
        digest = hashlib.sha256(str(tuple(window.shape)).encode())
        digest.update(window.detach().cpu().contiguous().numpy().tobytes())
        name = digest.hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, path: Path) -> tuple[Tensor, Tensor] | None:
        try:
            entry = load_file(path)
            return entry["tokens"], entry["mask"]
        except (OSError, SafetensorError, KeyError):
            return None

    def _write(self, path: Path, tokens: Tensor, mask: Tensor) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")  # several processes may fill one folder
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"tokens": tokens.contiguous(), "mask": mask.contiguous()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise TrainingError(
                describe(f"encoder_cache {self.folder}", "a folder that can be written", reason)
            ) from error


def open_cache(folder: Path | None, model: Any) -> EncoderCache | None:
    """The cache of a recipe's ``encoder_cache`` for `model` (bare or wrapped by PEFT); None without a folder."""
    if folder is None:
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return EncoderCache(folder, base.model)
