"""Sound event localisation and detection: which sound is where in every 100 ms, and how far."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audio_llm import config as recipes
from audio_llm.encoders import seld_head
from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.model.encoder import AudioEncoder
from audio_llm.model.folder import WEIGHTS, load_encoder, load_strictly, part_of, read_parts, save_parts
from audio_llm.tasks.clips import Batch
from audio_llm.tasks.seld.scores import SCORES, file_counts, scores_of, tune_thresholds
from audio_llm.tasks.seld.tracks import adpit_labels, adpit_loss, decode, event_labels, event_rows
from audio_llm.tasks.supervised import SupervisedTask

# Thresholds tried at every validation; finer steps would follow the noise of some hundred clips.
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclasses.dataclass
class HeadConfig:
    """What a recipe may say of the head: `elements` of x, y, z, distance in this order, and `frames`."""

    elements: list[str] = dataclasses.field(default_factory=lambda: list(seld_head.ELEMENTS))
    frames: Literal["all", "covered"] = "all"

    def check(self) -> None:
        known = [["x", "y", *rest] for rest in ([], ["distance"], ["z"], ["z", "distance"])]
        if self.elements not in known:
            expected = " or ".join(str(elements) for elements in known)
            raise ConfigError(describe("head.elements", expected, str(self.elements)))


def build_head(config: dict[str, Any], encoder: AudioEncoder, num_classes: int) -> seld_head.SELDHead:
    """The head of a recipe. Raises :class:`ConfigError`."""
    head = recipes.build(HeadConfig, config, "head")
    head.check()
    return seld_head.SELDHead(encoder, num_classes, elements=head.elements, frames=head.frames)


class SELDTargets(NamedTuple):
    slots: Tensor  # (batch, frames, 6, 1 + elements or more, classes) float32, as `adpit_labels` gives them


class SELDObservations(NamedTuple):
    outputs: np.ndarray  # (clips, frames, tracks, elements, classes)
    rows: list[np.ndarray]  # the true table of each clip


class SELDTask(SupervisedTask):
    """Multi-ACCDOA with distance and the loss of auxiliary-duplicating permutations."""

    def __init__(
        self, encoder: AudioEncoder, labels: Sequence[str], head: Mapping[str, Any], *, distance_weight: float = 1.0
    ) -> None:
        super().__init__(encoder, labels)
        self.head = build_head(dict(head), encoder, len(labels))
        self.distance_weight = distance_weight
        self.thresholds = [0.5] * len(labels)  # per class, chosen on the validation clips

    def targets(self, batch: Batch) -> tuple[SELDTargets]:
        elements, frames = self.head.elements, self.head.frames
        if "z" in elements:
            slots = [event_labels(events, self.labels, frames, elements) for events in batch.events]
        else:
            slots = [adpit_labels(self._rows(events), frames, len(self.labels)) for events in batch.events]
        return (SELDTargets(torch.from_numpy(np.stack(slots))),)

    def _rows(self, events: Sequence[Any]) -> np.ndarray:
        return event_rows(events, self.labels, self.head.frames)

    def output(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """``(batch, frames, tracks, elements, classes)`` float32."""
        tokens, _ = self.encoder(waveform, lengths)
        return self.head(self.encoder.patches(tokens))

    def forward(self, waveform: Tensor, lengths: Tensor, *targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = adpit_loss(self.output(waveform, lengths), targets[0].slots, self.distance_weight)
        return loss, {"adpit": loss.detach()}

    def observe(self, waveform: Tensor, lengths: Tensor, targets: tuple[Any, ...], batch: Batch) -> SELDObservations:
        return SELDObservations(
            self.output(waveform, lengths).cpu().numpy(), [self._rows(events) for events in batch.events]
        )

    def summarise(self, parts: Sequence[SELDObservations]) -> dict[str, Any]:
        """The official scores with one threshold for all classes, and those of the thresholds that are kept."""
        outputs = np.concatenate([part.outputs for part in parts])
        rows = list(itertools.chain.from_iterable(part.rows for part in parts))
        by_name = {str(number): output for number, output in enumerate(outputs)}
        references = dict(zip(by_name, rows, strict=True))
        tuned, _ = tune_thresholds(by_name, references, THRESHOLDS, elements=self.head.elements)
        self.thresholds = tuned.tolist()
        scores = {"f_score_at_half": self._scores(outputs, rows, [0.5] * len(self.labels))["f_score"]}
        scores |= self._scores(outputs, rows, self.thresholds)
        return {**scores, "score": scores["f_score"]}

    def _scores(self, outputs: np.ndarray, rows: Sequence[np.ndarray], thresholds: Sequence[float]) -> dict[str, float]:
        sums = [
            file_counts(
                row, decode(output, thresholds, elements=self.head.elements).rows(), num_classes=len(thresholds)
            )
            for output, row in zip(outputs, rows, strict=True)
        ]
        values = scores_of(np.sum(sums, axis=0)).values.tolist()
        return {name: value for name, value in zip(SCORES[:4], values[:4], strict=True) if not math.isnan(value)}

    def save(self, folder: Path) -> None:
        facts = {"task": "seld", "labels": list(self.labels), "seld": self.head.facts, "thresholds": self.thresholds}
        save_parts(folder, self.encoder, {"seld": self.head}, facts)


def load_seld(folder: str | Path) -> tuple[seld_head.SELDNetwork, dict[str, Any]]:
    """The network of a folder that has a head of events in time (evaluation mode), and its config.

    The config's ``labels`` are its classes and ``thresholds``, where it has them, when each counts as heard.
    """
    config, state = read_parts(folder)
    if "seld" not in config or "labels" not in config:
        cure = "Train one with 'audio-llm train' and task: seld, or convert a published one."
        raise CheckpointError(describe(f"encoder folder {folder}", "a head of events in time", "none", cure))
    count, thresholds = len(config["labels"]), config.get("thresholds")
    if thresholds is not None and len(thresholds) != count:
        expected, found = f"a threshold for each of {count} labels", f"{len(thresholds)} thresholds"
        raise CheckpointError(describe(f"encoder folder {folder}", expected, found))
    encoder = load_encoder(folder)
    try:
        head = seld_head.SELDHead(encoder, count, **config["seld"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(describe(f"encoder folder {folder}: seld", "fields of its head", str(error))) from error
    load_strictly(head, part_of(state, "seld"), f"{folder}/{WEIGHTS}")
    return seld_head.SELDNetwork(encoder, head).eval(), config
