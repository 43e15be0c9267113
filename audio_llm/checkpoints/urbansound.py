"""Published weights of the UrbanSound8K CNN: ``best_model_this_fold.pt``, ``model_fold_{n}_best.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from audio_llm import config as recipes
from audio_llm.checkpoints.encoder import load_strictly
from audio_llm.checkpoints.published import Published, configured, length, read_published, state_dict_of
from audio_llm.encoders.urbansound_cnn import UrbanSoundCNN, UrbanSoundCNNConfig
from audio_llm.errors import CheckpointError, describe
from audio_llm.heads import UrbanSoundHead

# Class i of the published models; the numbers are those of UrbanSound8K's metadata (classID).
CLASSES = (
    "air conditioner",
    "car horn",
    "children playing",
    "dog bark",
    "drilling",
    "engine idling",
    "gun shot",
    "jackhammer",
    "siren",
    "street music",
)
_HEAD = ("conv1d.", "fc1.", "fc2.")


def load_published(path: str | Path, /, **fields: Any) -> Published:
    """Encoder, classifier and the names of its classes; `fields` replace those of its configuration. Strict.

    The widths of the convolutions and the number of classes are read off the file; a file with another number of
    classes than UrbanSound8K's ten does not say what they are called, so they are numbered.
    """
    state = state_dict_of(read_published(path), kind="urbansound_cnn", name=path)
    known = {"widths": _widths(state, str(path)), **fields}
    with configured(path):
        encoder = UrbanSoundCNN(recipes.build(UrbanSoundCNNConfig, known, where="encoder urbansound_cnn"))
    rest = {key: value for key, value in state.items() if not key.startswith(_HEAD)}
    load_strictly(encoder, rest, str(path))
    count = length(state["fc2.weight"]) if "fc2.weight" in state else len(CLASSES)
    head = UrbanSoundHead(encoder.hidden_size, encoder.grid, count)
    load_strictly(head, {key: value for key, value in state.items() if key.startswith(_HEAD)}, str(path))
    labels = list(CLASSES) if count == len(CLASSES) else [f"class {number}" for number in range(count)]
    # Its own loader mixed several channels to one.
    facts = {"task": "classification", "labels": labels, "head": {"name": "urbansound"}, "channels": "mean"}
    return Published(encoder.eval(), {"head": head.eval()}, facts)


def _widths(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    keys = [f"encoder{number}.conv.weight" for number in (1, 2, 3)]
    for key in keys:
        if key not in state or state[key].ndim != 4:
            found = f"{key} {tuple(state[key].shape)}" if key in state else f"no {key}"
            raise CheckpointError(describe(f"checkpoint {name}", "the UrbanSound CNN's convolutions", found))
    return tuple(length(state[key]) for key in keys)
