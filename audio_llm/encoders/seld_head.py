"""The head of events in time (multi-ACCDOA) and its network, as published checkpoints have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_llm.datasets.seld_tables import FRAME_SECONDS
from audio_llm.errors import ConfigError, describe
from audio_llm.model.encoder import AudioEncoder

CLASSES = (
    "female speech", "male speech", "clapping", "telephone", "laughter", "domestic sounds", "footsteps", "door",
    "music", "musical instrument", "water tap", "bell", "knock",
)  # fmt: skip


TRACKS = 3
ELEMENTS: tuple[str, ...] = ("x", "y", "distance")


def column_weights(
    columns: int, column_seconds: float, frames: int, mode: Literal["repeat", "linear"], steps: int = 5
) -> Tensor:
    """How label frames are made of an encoder's time columns: ``(frames, columns)`` float32, rows that sum to one.

    Each frame is the mean of `steps` instants; an instant takes the column it lies in ("repeat") or both nearest
    columns by their distance ("linear"). Instants after the last column take the last one.
    """
    instants = (torch.arange(frames * steps, dtype=torch.float64) + 0.5) * (FRAME_SECONDS / steps) / column_seconds
    if mode == "repeat":
        weights = F.one_hot(instants.floor().long().clamp(max=columns - 1), columns).double()
    else:
        position = (instants - 0.5).clamp(0, columns - 1)
        weights = (1 - (position[:, None] - torch.arange(columns)).abs()).clamp(min=0)
    return weights.unflatten(0, (frames, steps)).mean(dim=1).float()


class SELDHead(nn.Module):
    """Multi-ACCDOA with distance on the token grid of an encoder: one map, resampled to frames of 100 ms.

    The output is ``(batch, frames, tracks, elements, classes)``: x, y (and z) through tanh, their length the activity;
    distance in metres through ReLU. Where the grid has one row the map is linear, else a convolution over all rows and
    three columns, as published. `frames` is ``"all"`` of the window, or ``"covered"``: only those the columns cover to
    the end, which leaves the last frame out of 5 s of CNN14 (49), as its published training did.
    """

    def __init__(
        self,
        encoder: AudioEncoder,
        num_classes: int = len(CLASSES),
        *,
        tracks: int = TRACKS,
        elements: Sequence[str] = ELEMENTS,
        frames: Literal["all", "covered"] = "all",
    ) -> None:
        super().__init__()
        if encoder.grid is None:
            raise ConfigError(describe(f"encoder '{encoder.name}'", "an encoder with a token grid", "none"))
        self.num_classes, self.tracks, self.elements = num_classes, tracks, tuple(elements)
        self.facts = {"tracks": tracks, "elements": list(elements), "frames": frames}  # what a folder says of it
        columns, rows = encoder.grid
        frame_count = getattr(encoder, "column_frames", None)
        hop = getattr(encoder.config, "hop", 0)
        seconds = frame_count * hop / encoder.sample_rate if frame_count else encoder.window_seconds / columns
        count = round(encoder.window_seconds / FRAME_SECONDS)
        if frames == "covered":
            count = min(count, int(columns * seconds / FRAME_SECONDS + 1e-6))
        outputs = tracks * len(self.elements) * num_classes
        self.projection: nn.Module
        if rows == 1:
            self.projection = nn.Linear(encoder.hidden_size, outputs)
        else:
            self.projection = nn.Conv2d(encoder.hidden_size, outputs, (rows, 3), padding=(0, 1))
        weights = column_weights(columns, seconds, count, "repeat" if rows == 1 else "linear")
        self.weights: Tensor
        self.register_buffer("weights", weights, persistent=False)

    @property
    def frames(self) -> int:
        """Label frames in the output for one window."""
        return self.weights.shape[0]

    def forward(self, patches: Tensor) -> Tensor:
        """`patches` ``(batch, columns, rows, hidden)``, as ``encoder.patches`` gives them."""
        if isinstance(self.projection, nn.Linear):
            columns = self.projection(patches[:, :, 0])
        else:
            columns = self.projection(patches.permute(0, 3, 2, 1))[:, :, 0].transpose(1, 2)
        with torch.autocast(columns.device.type, enabled=False):  # half a precision of metres is too little
            frames = torch.einsum("fc,bco->bfo", self.weights.float(), columns.float())
        output = frames.unflatten(-1, (self.tracks, len(self.elements), self.num_classes))
        parts = [
            F.relu(part) if name == "distance" else torch.tanh(part)
            for name, part in zip(self.elements, output.unbind(dim=3), strict=True)
        ]
        return torch.stack(parts, dim=3)


class SELDNetwork(nn.Module):
    """Encoder and head: ``(batch, channels, time)`` and lengths → ``(batch, frames, tracks, elements, classes)``."""

    def __init__(self, encoder: AudioEncoder, head: SELDHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        tokens, _ = self.encoder(waveform, lengths)
        return self.head(self.encoder.patches(tokens))
