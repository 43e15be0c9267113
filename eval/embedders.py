"""Text embeddings: texts to unit vectors, by a rule, by a local encoder or from a table that somebody made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from audio_llm.errors import ConfigError, describe
from audio_llm.files import read_json
from audio_llm.language.replies import normalise
from audio_llm.model.loading import reading, whole_model


class TextEmbedder(Protocol):
    """Texts → unit vectors; `name` is recorded beside every figure made with it."""

    name: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray: ...


class CharacterNgrams:
    """Counts of 3 to 5 characters within words, hashed to 4096 places: no model, the same everywhere.

    It knows spelling, not meaning: "car" is near "race car" and far from "vehicle".
    """

    name = "character n-grams 3-5"
    size = 4096

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, 4096) float64, of unit length (zeros for a text without letters)."""
        vectors = np.zeros((len(texts), self.size))
        for row, text in enumerate(texts):
            for word in normalise(text).split():
                padded = f" {word} "
                for length in (3, 4, 5):
                    for start in range(len(padded) - length + 1):
                        digest = hashlib.blake2b(padded[start : start + length].encode(), digest_size=4).digest()
                        vectors[row, int.from_bytes(digest, "big") % self.size] += 1
        return unit(vectors)


class LocalEncoder:
    """A text encoder of Transformers in a local folder: its last layer, averaged over the words."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(describe("embedder", "'characters' or a folder with config.json", f"'{folder}'"))
        self.name = Path(folder).name
        item, expected = f"embedder {folder}", "a text encoder that Transformers can load"
        how: dict[str, Any] = {"local_files_only": True}
        with reading(item, expected):
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        self._model = whole_model(AutoModel, folder, item, expected, dtype=torch.float32, **how).eval()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, hidden) float64, of unit length; a batch has texts of like length, and gives what one text gives."""
        import torch

        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            inputs = self._tokenizer(
                [texts[place] or " " for place in places], return_tensors="pt", padding=True, truncation=True
            )
            with torch.inference_mode():
                states = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            found |= dict(zip(places, means.double().numpy(), strict=True))
        return unit(np.stack([found[place] for place in range(len(texts))])) if texts else np.zeros((0, 1))


class Table:
    """Given vectors by text: an ``.npz`` with ``texts`` and ``vectors``, or JSON ``{text: [numbers]}``."""

    def __init__(self, path: str) -> None:
        self.name = f"table {Path(path).name}"
        self._path = path
        self._vectors = _read_table(path)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, D) float64, of unit length. Raises :class:`ConfigError` for a text that the table lacks."""
        for text in texts:
            if text not in self._vectors:
                raise ConfigError(describe(f"embeddings {self._path}", f"a vector for {text!r}", "none"))
        return unit(np.stack([self._vectors[text] for text in texts]))


def _read_table(path: str) -> dict[str, np.ndarray]:
    try:
        if Path(path).suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                texts, vectors = [str(text) for text in arrays["texts"]], np.asarray(arrays["vectors"], np.float64)
        else:
            tree = read_json(path)
            texts, vectors = list(tree), np.asarray(list(tree.values()), np.float64)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        expected = "an .npz with texts and vectors, or JSON {text: [numbers]}"
        raise ConfigError(describe(f"embeddings {path}", expected, str(error) or type(error).__name__)) from error
    if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
        expected = "one finite vector of one length for every text"
        raise ConfigError(describe(f"embeddings {path}", expected, f"shape {vectors.shape} for {len(texts)} texts"))
    return dict(zip(texts, vectors, strict=True))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
