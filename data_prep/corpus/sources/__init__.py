"""Sources of items by name: one file of this folder each, which ends with ``SOURCE = …``: a class or a tuple."""

from __future__ import annotations

from audio_llm.registry import Folder

SOURCES = Folder(__name__, "SOURCE", "source", needs="items")
