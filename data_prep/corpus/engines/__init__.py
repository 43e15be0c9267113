"""Engines by name: one file of this folder each, which ends with ``ENGINE = …``."""

from __future__ import annotations

from audio_llm.registry import Folder

ENGINES = Folder(__name__, "ENGINE", "engine", needs="pool")
