"""A fingerprint of each clip, by which ``deduplicate`` knows it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from audio_llm.audio import Waveform
from audio_llm.errors import AudioError
from audio_llm.inspection import fingerprints
from data_prep.corpus.sounds import hear
from data_prep.corpus.stage import Item, Reject, Step

UNREADABLE = "unreadable"


@dataclass
class FingerprintStage(Step):
    """Gives ``fingerprint``, a kilobyte for five seconds (:mod:`audio_llm.inspection.fingerprints`), after ``cut``."""

    name: ClassVar[str] = "fingerprint"
    reasons: ClassVar[tuple[str, ...]] = (UNREADABLE,)
    retryable: ClassVar[tuple[str, ...]] = reasons
    needs: ClassVar[tuple[str, ...]] = ("content",)
    gives: ClassVar[tuple[str, ...]] = ("fingerprint",)

    def open(self, folder: Path) -> None:
        self._folder = folder
        fingerprints.fingerprint(Waveform(np.zeros((1, 2), np.float32), 2 * fingerprints.RATE, "mono"))  # loads SciPy

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        found: list[Item | Reject] = []
        for item in items:
            try:
                waveform = hear(item.fields, self._folder, max_seconds=3600)
            except AudioError as error:
                found.append(Reject(item.id, UNREADABLE, str(error)))
                continue
            found.append(item.adding(fingerprint=fingerprints.fingerprint(waveform).encode()))
        return found


STAGE = FingerprintStage
