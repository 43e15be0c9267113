"""Published encoders as encoder folders: whose weights are these, where do they come from, and on what terms."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from audio_llm.encoders.published import SIGNS, listed, read_json, read_published, state_dict_of, whose
from audio_llm.errors import CheckpointError, describe
from audio_llm.files import atomic_folder
from audio_llm.model.encoder import encoder_class
from audio_llm.model.folder import WEIGHTS, save_parts

# What is certain of the terms of published weights; whoever passes a conversion on has to look further.
LICENCES: dict[str, str] = {
    "beats": "MIT (github.com/microsoft/unilm)",
    "spatial_ast": "see the source of the file",
    "htsat": "see the source of the file",
    "cnn14": "PANNs: CC BY 4.0 (their Zenodo record); weights of another origin: see the source of the file",
    "urbansound_cnn": "see the source of the file",
    "whisper": "MIT (github.com/openai/whisper); the copies for Transformers: Apache-2.0",
}


def recognise(path: str | Path) -> str:
    """The name of the encoder whose weights `path` (a file or a Transformers folder) holds."""
    path = Path(path)
    if (path / WEIGHTS).is_file():
        cure = "Nothing is to be converted: give this folder where a recipe or a verb asks for one."
        raise CheckpointError(describe(f"model {path}", "a published encoder", "an encoder folder", cure))
    if path.is_dir():
        kind = read_json(path / "config.json", "a Transformers model's configuration").get("model_type")
        if kind in LICENCES:
            return str(kind)
        raise CheckpointError(describe(f"model {path}", "a published encoder (whisper)", f"model_type {kind}"))
    state = state_dict_of(read_published(path), name=path)
    name = whose(state)
    if name is not None:
        return name
    known = ", ".join(name for name, _ in SIGNS)
    raise CheckpointError(describe(f"checkpoint {path}", f"weights of one of {known}", f"the keys {listed(state)}"))


def convert(
    source: str | Path, destination: str | Path, name: str | None = None, licence: str | None = None, /, **fields: Any
) -> Path:
    """Write a published checkpoint as an encoder folder, which says in ``source`` where its weights come from.

    `name` is the encoder's (by default :func:`recognise`'s), `fields` replace those of its configuration.
    """
    source, name = Path(source), name or recognise(source)
    published = encoder_class(name).published_loader()(source, **fields)
    origin = {"file": source.name, "sha256": sha256(source), "licence": licence or LICENCES.get(name, "unknown")}
    with atomic_folder(destination) as folder:
        save_parts(folder, published.encoder, published.heads, {**published.facts, "source": origin})
    return Path(destination)


def sha256(path: Path) -> str | dict[str, str]:
    """Of a file; of the files of a folder that hold weights, by their names."""
    if path.is_dir():
        return {
            file.name: str(sha256(file)) for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".bin")
        }
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
