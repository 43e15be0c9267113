"""What an encoder is trained on: the interface between the trainer and its tasks, and their registry."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from audio_llm.encoders import AudioEncoder
from audio_llm.training.clips import Batch

if TYPE_CHECKING:
    from audio_llm.training.supervised import EncoderRecipe

# Named by module and class, as encoders are.
TASKS: dict[str, str] = {
    "encoder": "audio_llm.training.localisation:Localisation",
    "classification": "audio_llm.training.classification:Classification",
    "tagging": "audio_llm.training.classification:Tagging",
    "seld": "audio_llm.training.seld_task:Localisation",
}


class SupervisedTask(nn.Module):
    """Encoder and heads as one module, so that data-parallel training sees a single forward.

    A child is built from (encoder, labels, recipe). What :meth:`targets` gives are tuples of tensors on the CPU; the
    trainer moves them and hands them to :meth:`forward` and :meth:`observe`.
    """

    clip_level: ClassVar[bool] = False  # labels hold for the whole clip: it may be rolled in time and mixed with others
    places: ClassVar[bool] = False  # nothing is learnt from events without an azimuth and a distance

    def __init__(self, encoder: AudioEncoder, labels: Sequence[str], recipe: EncoderRecipe) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = {name: index for index, name in enumerate(labels)}

    def targets(self, batch: Batch) -> tuple[Any, ...]:
        """Named tuples of tensors for one batch."""
        raise NotImplementedError

    def forward(self, waveform: Tensor, lengths: Tensor, *targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its detached parts for the log."""
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


def task_class(name: str) -> type[SupervisedTask]:
    """The class registered under `name`."""
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
