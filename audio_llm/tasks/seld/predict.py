"""Sound events of files of any length: which, when, where and how far, by a trained or a published network."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio_llm import audio
from audio_llm.datasets import seld_tables
from audio_llm.encoders import seld_head
from audio_llm.errors import ConfigError, describe, one_line
from audio_llm.model.validate import read_facts
from audio_llm.tasks.base import LONGEST
from audio_llm.tasks.folder import load_published, published_name
from audio_llm.tasks.seld.task import load_seld
from audio_llm.tasks.seld.tracks import Detections, decode, join_events, locate

_PUBLISHED = (("cnn14", False), ("htsat", False))  # encoders with published heads of events, and not with PANNs' own


@dataclass
class Locator:
    """A network, its classes, and from which length of its vectors on each class counts as heard (None: one half)."""

    network: seld_head.SELDNetwork
    labels: list[str]
    thresholds: float | Sequence[float] | None = None
    hearing: str = "refuse"  # of sound in another layout

    def __post_init__(self) -> None:
        self.network.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def locate(self, waveform: audio.Waveform, name: str = "audio") -> Detections:
        """What is heard, frame by frame; of two channels, in the half circle that those can tell apart (in front).

        Raises :class:`AudioError` for channels that are not the network's.
        """
        encoder = self.network.encoder
        waveform = audio.hear(waveform, encoder.layouts, self.hearing, name=name)
        output = locate(self.network, audio.resample(waveform, encoder.sample_rate).samples)
        threshold = 0.5 if self.thresholds is None else self.thresholds
        found = decode(output, threshold, elements=self.network.head.elements)
        if encoder.num_channels == 2:
            front = np.abs(found.vector[:, :1])
            found = dataclasses.replace(found, vector=np.concatenate((front, found.vector[:, 1:]), axis=1))
        return found


def recognises(path: Path) -> bool:
    """Whether `path` is an encoder folder or a published file with a head of events in time."""
    return published_name(path) in _PUBLISHED if path.is_file() else "seld" in read_facts(path)


def load(path: str | Path, threshold: float | None = None, hearing: str = "refuse") -> Locator:
    """From an encoder folder or a published file; `threshold` replaces those that training chose for each class.

    Raises :class:`CheckpointError` for a path that is no such network, :class:`ConfigError` for a wrong threshold.
    """
    path = Path(path)
    if threshold is not None and not 0 < threshold < math.sqrt(2):
        raise ConfigError(describe("threshold", "a length of vectors between 0 and 1.41", f"{threshold:g}"))
    if not path.is_file():
        network, config = load_seld(path)
        return Locator(network, config["labels"], threshold or config.get("thresholds"), hearing)
    published = load_published(path, "seld", "seld")
    network = seld_head.SELDNetwork(published.encoder, published.heads["seld"])
    return Locator(network, published.facts["labels"], threshold, hearing)


def locate_file(locator: Locator, path: str | Path) -> Detections:
    """Decode a file and locate what is in it."""
    return locator.locate(audio.decode(path, max_seconds=LONGEST), name=str(path))


# ------------------------------------------------------------------------------------------------------ as text


def as_text(path: str, found: Detections, labels: Sequence[str], form: str) -> str:
    """Detections as ``csv`` (DCASE's rows, every 100 ms), or joined to events: ``json`` (one line) or a ``table``."""
    if form == "csv":
        return seld_tables.format_rows(found.rows()).rstrip("\n")
    events = join_events(found, labels)
    return (
        json.dumps({"file": path, "events": events}, ensure_ascii=False) if form == "json" else as_table(path, events)
    )


def as_table(path: str, events: Sequence[dict[str, Any]]) -> str:
    """The file, and a line for every event."""
    count = f"{len(events)} event{'' if len(events) == 1 else 's'}"
    return "\n".join([f"{one_line(path)}: {count}", *(_line(event) for event in events)])


def _line(event: dict[str, Any]) -> str:
    azimuth = round(event["azimuth"])
    side = " left" if azimuth > 0 else " right" if azimuth < 0 else ""
    far = f", {event['distance']:.1f} m" if "distance" in event else ""
    return f"{event['onset']:8.1f} to {event['offset']:.1f} s  {event['label']}, {abs(azimuth)}°{side}{far}"
