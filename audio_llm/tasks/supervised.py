"""Encoder and heads of a task as one module: what :mod:`audio_llm.tasks.trainer` trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from audio_llm.model.encoder import AudioEncoder
from audio_llm.tasks.clips import Batch


class SupervisedTask(nn.Module):
    """Encoder and heads as one module, so that data-parallel training sees a single forward.

    What :meth:`targets` gives are tuples of tensors on the CPU; the trainer moves them and hands them to
    :meth:`forward` and :meth:`observe`.
    """

    def __init__(self, encoder: AudioEncoder, labels: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = {name: index for index, name in enumerate(labels)}

    def targets(self, batch: Batch) -> tuple[Any, ...]:
        """Named tuples of tensors for one batch."""
        raise NotImplementedError

    def forward(self, waveform: Tensor, lengths: Tensor, *targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its detached parts for the log; `waveform` ``(batch, channels, time)``."""
        raise NotImplementedError

    def observe(self, waveform: Tensor, lengths: Tensor, targets: tuple[Any, ...], batch: Batch) -> Any:
        """What one validation batch contributes, as a named tuple of plain arrays that processes can exchange."""
        raise NotImplementedError

    def summarise(self, parts: Sequence[Any]) -> dict[str, Any]:
        """Scores of all batches; ``score`` decides which weights are kept (higher is better)."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the encoder folder."""
        raise NotImplementedError
