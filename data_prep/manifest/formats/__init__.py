"""Formats of rows by name: one file of this folder each, which ends with ``FORMAT = Format(…)`` or a tuple of them."""

from __future__ import annotations

from audio_llm.registry import Folder

FORMATS = Folder(__name__, "FORMAT", "format", needs="rows")
