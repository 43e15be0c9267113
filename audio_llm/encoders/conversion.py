"""Published encoders as encoder folders: whose weights are these, where do they come from, and on what terms."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from audio_llm.encoders.published import PublishedFile, listed, read_json, read_published, signs_in, state_dict_of
from audio_llm.errors import CheckpointError, describe
from audio_llm.files import atomic_folder
from audio_llm.model.encoder import ENCODERS, Published
from audio_llm.model.folder import WEIGHTS, save_parts


def recognise(path: str | os.PathLike[str]) -> str:
    """The name of the encoder whose weights `path` (a file or a Transformers folder) holds, by its `signs`.

    Raises :class:`CheckpointError` for weights of none, or with the signs of several.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file():
        cure = "Nothing is to be converted: give this folder where a recipe or a verb asks for one."
        raise CheckpointError(describe(f"model {path}", "a published encoder", "an encoder folder", cure))
    if folder.is_dir():
        known = {kind.transformers_type: name for name in ENCODERS if (kind := ENCODERS.find(name)).transformers_type}
        found = read_json(folder / "config.json", "a Transformers model's configuration").get("model_type")
        if found not in known:
            expected = f"a published encoder ({', '.join(sorted(known))})"
            raise CheckpointError(describe(f"model {path}", expected, f"model_type {found}"))
        return known[found]
    state = state_dict_of(read_published(path), name=path)
    names = signs_in(state)
    if len(names) != 1:
        told = f"signs of {' and '.join(names)}" if names else f"the keys {listed(state)}"
        advice = "Name the encoder." if names else None
        raise CheckpointError(
            describe(f"checkpoint {path}", f"weights of one of {', '.join(sorted(ENCODERS))}", told, advice)
        )
    return names[0]


def open_published(path: str | os.PathLike[str], name: str | None = None, /, **fields: Any) -> Published:
    """What a published file holds; `name` is the encoder's (by default :func:`recognise`'s), `fields` replace those of
    its configuration."""
    file = path if isinstance(path, PublishedFile) else PublishedFile(path)
    return ENCODERS.find(name or recognise(file)).load_published(file, **fields)


def convert(
    source: str | Path, destination: str | Path, name: str | None = None, licence: str | None = None, /, **fields: Any
) -> Path:
    """Write a published checkpoint as an encoder folder, which says in ``source`` where its weights come from.

    `name` and `fields` as in :func:`open_published`; `licence` replaces what the encoder's class says of the terms.
    """
    file = PublishedFile(source)
    published = open_published(file, name, **fields)
    origin = {"file": file.path.name, "sha256": file.sha256, "licence": licence or published.encoder.licence}
    with atomic_folder(destination) as folder:
        save_parts(folder, published.encoder, published.heads, {**published.facts, "source": origin})
    return Path(destination)
