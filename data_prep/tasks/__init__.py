"""Kinds of data sets by name: one file of this folder each, which ends with ``KIND = Kind(…)``."""

from __future__ import annotations

from audio_llm.registry import Folder

KINDS = Folder(__name__, "KIND", "kind", needs="prepare")
