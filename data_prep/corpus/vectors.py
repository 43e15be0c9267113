"""Vectors of sounds: by one of our encoders, or by a CLAP model, which has texts in the same space.

A sound is heard in windows that overlap by half, the last one ending where the sound does, and its vector is the mean
of the windows' unit vectors, made a unit vector itself: the same sound has the same vector, whatever its length.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from audio_llm import audio
from audio_llm.audio import Waveform
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.loading import reading, whole_model

_CLAP_SECONDS = 10.0  # what its feature extractor takes; of more it would draw a piece
_CLAP_WORDS = 77  # tokens of a text, at most


class Embedder(Protocol):
    """What makes vectors. `window_seconds`: the longest window it takes; `texts`: whether it has vectors of texts."""

    window_seconds: float
    sample_rate: int
    layouts: tuple[str, ...]
    texts: bool

    def sounds(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """(windows, dimensions) float32 of windows of (channels, time) at its rate."""

    def text(self, text: str) -> np.ndarray:
        """(dimensions,) float32."""


def open_embedder(folder: Path) -> Embedder:
    """Of a folder that holds one of our encoders, or a ``ClapModel`` as Transformers writes it. Raises
    :class:`CheckpointError` for any other."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        found = "no config.json" if isinstance(error, OSError) else "a config.json that is none"
        raise CheckpointError(describe(f"embed.model {folder}", "an encoder folder or a CLAP model", found)) from error
    return _Clap(folder) if kind == "clap" else _Encoder(folder)


class _Encoder:
    """The mean of a window's tokens."""

    texts = False

    def __init__(self, folder: Path) -> None:
        import torch

        from audio_llm.model.folder import load_encoder

        self.torch, self.encoder = torch, load_encoder(folder)
        self.window_seconds = self.encoder.window_seconds
        self.sample_rate, self.layouts = self.encoder.sample_rate, self.encoder.layouts

    def sounds(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        with self.torch.inference_mode():
            for window in windows:  # one by one, so that a vector does not depend on the others of a batch
                waveform = self.torch.from_numpy(np.ascontiguousarray(window))[None]  # (1, channels, time)
                tokens, mask = self.encoder(waveform, self.torch.tensor([waveform.shape[-1]]))
                found.append(tokens[0][mask[0]].float().mean(0).numpy())  # (hidden,)
        return np.stack(found)

    def text(self, text: str) -> np.ndarray:
        raise ConfigError(describe("embed", "a CLAP model for vectors of texts", "an encoder, which has none"))


class _Clap:
    """The projected vectors of a CLAP model."""

    window_seconds = _CLAP_SECONDS
    layouts: tuple[str, ...] = ("mono",)
    texts = True

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

        self.torch = torch
        item, expected = f"embed.model {folder}", "a whole CLAP model"
        with reading(item, expected):
            self.extractor = AutoFeatureExtractor.from_pretrained(str(folder))
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.model = whole_model(ClapModel, folder, item, expected).eval()
        self.sample_rate = int(self.extractor.sampling_rate)

    def sounds(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        with self.torch.inference_mode():
            for window in windows:
                features = self.extractor(window[0], sampling_rate=self.sample_rate, return_tensors="pt")
                found.append(self.model.get_audio_features(**features).pooler_output[0].float().numpy())
        return np.stack(found)

    def text(self, text: str) -> np.ndarray:
        tokens = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=_CLAP_WORDS)
        with self.torch.inference_mode():
            vector: np.ndarray = self.model.get_text_features(**tokens).pooler_output[0].float().numpy()
        return vector


def cut_windows(samples: np.ndarray, length: int) -> list[np.ndarray]:
    """Windows of `length` samples of (channels, time) that begin half a window apart, and one that ends at the end."""
    total = samples.shape[-1]
    if total <= length:
        return [samples]
    starts = list(range(0, total - length, max(1, length // 2)))
    return [samples[:, start : start + length] for start in [*starts, total - length]]


def unit(vectors: np.ndarray) -> np.ndarray:
    """(…, dimensions) of length one; zeros stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(length > 0, length, 1), np.float32)


def vector_of(waveform: Waveform, embedder: Embedder, seconds: float, hearing: str) -> tuple[np.ndarray, int]:
    """The unit vector of a sound, (dimensions,) float32, and of how many windows it is the mean.

    Raises :class:`AudioError` for a layout that the embedder does not take and `hearing` does not convert.
    """
    heard = audio.hear(waveform, embedder.layouts, hearing if waveform.layout not in embedder.layouts else "refuse")
    heard = audio.resample(heard, embedder.sample_rate)
    length = round(min(seconds, embedder.window_seconds) * embedder.sample_rate)
    windows = cut_windows(heard.samples, length)
    return unit(unit(embedder.sounds(windows)).mean(0)), len(windows)


def encode(vector: np.ndarray) -> str:
    """A vector as text: float16, little endian, in base 64."""
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """(dimensions,) float32 of what :func:`encode` gave. Raises :class:`ValueError`."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)
