"""A trained encoder on disk: ``encoder.safetensors`` (encoder and heads) and ``config.json`` beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audio_llm.encoders import AudioEncoder, build_encoder, encoder_config
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.files import atomic_file, write_json
from audio_llm.heads import EventHead, SpatialHeads, build_classifier
from audio_llm.seld import SELDHead, SELDNetwork

CONFIG, WEIGHTS = "config.json", "encoder.safetensors"
VERSION = 1
# What a folder's config.json may say, beside what its writer adds; all but the encoder belong to some tasks only.
_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "encoder": ("a mapping", lambda value: isinstance(value, dict)),
    "labels": ("a list of names", lambda value: _all_are(value, str)),
    "task": ("a name", lambda value: isinstance(value, str)),
    "head": ("a mapping", lambda value: isinstance(value, dict)),
    "seld": ("a mapping", lambda value: isinstance(value, dict)),
    "thresholds": ("a list of finite numbers", lambda value: _all_are(value, (int, float), math.isfinite)),
}


def save_encoder(
    folder: str | Path, encoder: AudioEncoder, spatial: SpatialHeads, events: EventHead, labels: list[str]
) -> Path:
    """Write an encoder with the heads of spatial training; see :func:`save_parts`."""
    return save_parts(folder, encoder, {"spatial": spatial, "events": events}, {"labels": labels})


def save_parts(
    folder: str | Path, encoder: AudioEncoder, heads: Mapping[str, nn.Module], facts: Mapping[str, Any]
) -> Path:
    """Write both files atomically; the weights come last, so that a folder which has them is whole.

    `heads` are modules by the prefix of their keys, `facts` are entries of ``config.json`` (``labels``, ``task``, ...).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"encoder": encoder, **heads}
    state = {
        f"{part}.{key}": value.detach().cpu().contiguous()
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }
    config = {"version": VERSION, "encoder": encoder_config(encoder), **facts}
    write_json(folder / CONFIG, config)
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    return folder


def open_encoder(config: Mapping[str, Any]) -> AudioEncoder:
    """The encoder that a recipe names, in evaluation mode: ``{"path": folder}``, or what `build_encoder` takes.

    Beside either, ``channels`` says what an encoder of mono hears of two channels.
    """
    if "path" not in config:
        return build_encoder(dict(config)).eval()
    others = sorted(set(config) - {"path", "channels"})
    if others:
        expected = "'path' (and 'channels'), or 'name' with 'published'"
        raise ConfigError(describe("encoder", expected, f"'path' and '{others[0]}'"))
    encoder, channels = load_encoder(config["path"]), config.get("channels")
    return encoder if channels is None else encoder.hear(channels)


def load_encoder(folder: str | Path) -> AudioEncoder:
    """The encoder of a folder written by :func:`save_encoder`, in evaluation mode. Strict: every key must fit."""
    config, state = _read(Path(folder))
    try:
        encoder = build_encoder(config["encoder"])
    except ConfigError as error:
        raise CheckpointError(f"encoder folder {folder}: {error}") from error
    load_strictly(encoder, part_of(state, "encoder"), f"{folder}/{WEIGHTS}")
    return encoder.eval()


def load_heads(folder: str | Path) -> tuple[SpatialHeads, EventHead, list[str]]:
    """The heads of a folder written by :func:`save_encoder`, in evaluation mode, and the names of their classes."""
    spatial, labels = load_spatial(folder)
    _, state = _read(Path(folder))
    events = EventHead(state["events.norm.weight"].shape[0], len(labels))
    load_strictly(events, part_of(state, "events"), f"{folder}/{WEIGHTS}")
    return spatial, events.eval(), labels


def load_spatial(folder: str | Path) -> tuple[SpatialHeads, list[str]]:
    """The clip heads of an encoder folder (published weights have no others), and the names of their classes."""
    config, state = _read(Path(folder))
    part, labels = part_of(state, "spatial"), config.get("labels")
    if "fc_norm.weight" not in part or not labels:
        cure = "Train one with 'audio-llm train' and task: encoder, or convert a published one."
        raise CheckpointError(describe(f"encoder folder {folder}", "Spatial-AST's heads", "none", cure))
    spatial = SpatialHeads(part["fc_norm.weight"].shape[0], len(labels))
    load_strictly(spatial, part, f"{folder}/{WEIGHTS}")
    return spatial.eval(), list(labels)


def load_classifier(folder: str | Path) -> tuple[AudioEncoder, nn.Module, dict[str, Any]]:
    """Encoder and classifier of a folder written by classification or tagging (evaluation mode), and its config."""
    config, state = _read(Path(folder))
    if not {"head", "labels"} <= set(config) or config.get("task") not in ("classification", "tagging"):
        cure = "Train one with 'audio-llm train' and task: classification or tagging."
        raise CheckpointError(describe(f"encoder folder {folder}", "a classifier beside the encoder", "none", cure))
    encoder = load_encoder(folder)
    try:
        head = build_classifier(config["head"], encoder, len(config["labels"]))
    except ConfigError as error:
        raise CheckpointError(f"encoder folder {folder}: {error}") from error
    load_strictly(head, part_of(state, "head"), f"{folder}/{WEIGHTS}")
    return encoder, head.eval(), config


def load_seld(folder: str | Path) -> tuple[SELDNetwork, dict[str, Any]]:
    """The network of a folder that has a head of events in time (evaluation mode), and its config.

    The config's ``labels`` are its classes and ``thresholds``, where it has them, when each counts as heard.
    """
    config, state = _read(Path(folder))
    if "seld" not in config or "labels" not in config:
        cure = "Train one with 'audio-llm train' and task: seld, or convert a published one."
        raise CheckpointError(describe(f"encoder folder {folder}", "a head of events in time", "none", cure))
    count, thresholds = len(config["labels"]), config.get("thresholds")
    if thresholds is not None and len(thresholds) != count:
        expected, found = f"a threshold for each of {count} labels", f"{len(thresholds)} thresholds"
        raise CheckpointError(describe(f"encoder folder {folder}", expected, found))
    encoder = load_encoder(folder)
    try:
        head = SELDHead(encoder, count, **config["seld"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(describe(f"encoder folder {folder}: seld", "fields of its head", str(error))) from error
    load_strictly(head, part_of(state, "seld"), f"{folder}/{WEIGHTS}")
    return SELDNetwork(encoder, head).eval(), config


def part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries under ``part.``, without that prefix."""
    return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load every key or raise :class:`CheckpointError` with the missing, unexpected, misshapen and spoilt ones."""
    wanted = module.state_dict()
    problems = [f"missing {key} {tuple(wanted[key].shape)}" for key in wanted if key not in state]
    problems += [f"unexpected {key} {tuple(state[key].shape)}" for key in state if key not in wanted]
    problems += [
        f"{key}: expected {reason}" for key in wanted if key in state and (reason := _unfit(wanted[key], state[key]))
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"checkpoint {name}: {len(problems)} entries do not fit {type(module).__name__}: {shown}."
        )
    module.load_state_dict(dict(state))


def _unfit(wanted: Tensor, value: Tensor) -> str | None:
    """What was expected and found of a tensor that cannot take the place of `wanted`; None for one that can."""
    if wanted.shape != value.shape:
        return f"{tuple(wanted.shape)}, found {tuple(value.shape)}"
    if wanted.is_floating_point():  # integers of a quantised file would be copied as if they were the weights
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            return f"dense floating-point values, found {value.dtype}, {value.layout} on {value.device}"
        if not value.isfinite().all():
            return "finite values, found NaN or infinity"
    return None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            cure = "Train one with 'audio-llm train recipes/quickstart/encoder.yaml' or convert a published checkpoint."
            raise CheckpointError(describe(f"encoder folder {folder}", f"a file {name}", "none", cure))
    try:
        config = json.loads((folder / CONFIG).read_text())
        version = config["version"]
        state = load_file(folder / WEIGHTS)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"encoder folder {folder}: cannot be read ({type(error).__name__}: {error}).") from error
    if version != VERSION:
        raise CheckpointError(describe(f"encoder folder {folder}", f"version {VERSION}", repr(version)))
    for key, (expected, holds) in _ENTRIES.items():
        if (key in config or key == "encoder") and not holds(config.get(key)):
            found = repr(config[key])[:60] if key in config else "none"
            raise CheckpointError(describe(f"encoder folder {folder}: {key} in {CONFIG}", expected, found))
    return config, state


def _all_are(value: Any, kind: Any, holds: Callable[[Any], bool] = lambda item: True) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and holds(item) for item in value)
