"""Encoder folders with the heads of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from audio_llm.encoders.heads import SpatialHeads, build_classifier
from audio_llm.encoders.seld_head import SELDHead, SELDNetwork
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.encoder import AudioEncoder
from audio_llm.model.folder import WEIGHTS, _read, load_encoder, load_strictly, part_of, save_parts
from audio_llm.tasks.spatial.heads import EventHead


def save_encoder(
    folder: str | Path, encoder: AudioEncoder, spatial: SpatialHeads, events: EventHead, labels: list[str]
) -> Path:
    """Write an encoder with the heads of spatial training; see :func:`save_parts`."""
    return save_parts(folder, encoder, {"spatial": spatial, "events": events}, {"labels": labels})


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
        cure = "Train one with 'audio-llm train' and task: spatial, or convert a published one."
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
