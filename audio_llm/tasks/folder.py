"""Published checkpoints that bring the heads of a task."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from audio_llm.encoders.conversion import open_published, recognise
from audio_llm.encoders.published import PublishedFile, state_dict_of
from audio_llm.errors import CheckpointError, describe


@cache
def published_name(path: Path) -> tuple[str, bool] | None:
    """The encoder whose published checkpoint a file is, and whether PANNs' classifier is in it; None for no file.

    Raises :class:`CheckpointError` for a file that is none.
    """
    if not path.is_file():
        return None
    file = PublishedFile(path)
    keys = state_dict_of(file.tree, name=path)
    return recognise(file), any(key.endswith("fc_audioset.weight") for key in keys)


def load_published(path: Path, head: str, task: str) -> Any:
    """``Published(encoder, heads, facts)`` of a file that has the part `head` and names its classes.

    Raises :class:`CheckpointError` for one without; `task` is what would train it.
    """
    published = open_published(path)
    if head not in published.heads or "labels" not in published.facts:
        cure = f"Train one on it: audio-llm train with task: {task}."
        raise CheckpointError(describe(f"checkpoint {path}", f"a part '{head}' beside the encoder", "none", cure))
    return published
