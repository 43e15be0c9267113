"""Stages by name: one file of this folder each, which ends with ``STAGE = …``: a class, or a tuple of them.

What such a file imports at its top is light; models are loaded by :meth:`data_prep.corpus.stage.Stage.open`.
"""

from __future__ import annotations

from audio_llm.registry import Folder

STAGES = Folder(__name__, "STAGE", "stage", needs="run")
