"""Scorers by name: what the files of this folder offer as ``SCORERS``; all of them read the same stored predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from audio_llm.errors import ConfigError
from audio_llm.registry import Folder
from eval.scorers.base import Configurable, Score, Scorer

__all__ = ["SCORERS", "Score", "Scorer", "get_scorers"]

SCORERS = Folder(__name__, "SCORERS", "scorer", needs="score", instances=True)


def get_scorers(names: Sequence[str], settings: Mapping[str, Mapping[str, str]] | None = None) -> list[Scorer]:
    """Scorers by name or ``package.module:NAME``, with `settings` by scorer. Raises :class:`ConfigError` for an unknown
    name, with the nearest, and for settings that a scorer does not take."""
    settings = settings or {}
    found = {name: SCORERS.find(name) for name in (*names, *settings)}
    return [_configured(found[name], settings.get(name, {})) for name in names]


def _configured(scorer: Scorer, options: Mapping[str, str]) -> Scorer:
    if not options:
        return scorer
    if not isinstance(scorer, Configurable):
        raise ConfigError(f"scorer '{scorer.name}': takes no settings, found {', '.join(options)}.")
    return scorer.configured(options)
