"""Scorers by name. Every file of this folder offers some; all of them read the same stored predictions."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module

from audio_llm.errors import ConfigError, nearest
from eval.scorers.base import Configurable, Score, Scorer

__all__ = ["SCORERS", "Score", "Scorer", "get_scorers"]


def _found() -> dict[str, Scorer]:
    scorers: dict[str, Scorer] = {}
    for module in pkgutil.iter_modules(__path__):
        for scorer in getattr(import_module(f"{__name__}.{module.name}"), "SCORERS", ()):
            scorers[scorer.name] = scorer
    return scorers


SCORERS: dict[str, Scorer] = _found()


def get_scorers(names: Sequence[str], settings: Mapping[str, Mapping[str, str]] | None = None) -> list[Scorer]:
    """Scorers by name, with `settings` by scorer. Raises :class:`ConfigError` for an unknown name, with the nearest."""
    settings = settings or {}
    for name in (*names, *settings):
        if name not in SCORERS:
            raise ConfigError(f"scorer '{name}': expected one of {', '.join(SCORERS)}{nearest(name, SCORERS)}.")
    return [_configured(SCORERS[name], settings.get(name, {})) for name in names]


def _configured(scorer: Scorer, options: Mapping[str, str]) -> Scorer:
    if not options:
        return scorer
    if not isinstance(scorer, Configurable):
        raise ConfigError(f"scorer '{scorer.name}': takes no settings, found {', '.join(options)}.")
    return scorer.configured(options)
