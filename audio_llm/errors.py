"""Errors a person can act on: the item, what was expected, what was found, and the cure.

Everything derived from :class:`AudioLLMError` is printed by the command line as one message, without a traceback,
with its exit code. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_BREAKS = "\x7f\x85\u2028\u2029"


class AudioLLMError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class AudioError(AudioLLMError):
    """An audio file or array that cannot be used."""


class ShardError(AudioLLMError):
    """A shard, an index or a sample that breaks the schema."""


class DataError(AudioLLMError):
    """A published dataset whose files are missing, malformed or not what they are named."""


class ConfigError(AudioLLMError):
    """A recipe or an override that does not fit."""


class CheckpointError(AudioLLMError):
    """A checkpoint that cannot be loaded or written."""


class PrerequisiteError(AudioLLMError):
    """A missing package, compiler or system library."""


class NothingHeardError(AudioLLMError):
    """An evaluation that ran, and of whose sounds or questions none could be used: there is nothing to score."""

    exit_code = 1


class TrainingError(AudioLLMError):
    """A run that must not go on (too many rejects, parity bound broken, a launch that became one process)."""


def one_line(text: str) -> str:
    """`text` with line breaks and other control characters as escapes: a file's name may have them."""
    return "".join(ascii(char)[1:-1] if char in _BREAKS or ord(char) < 32 else char for char in text)


def describe(item: str, expected: str, found: str, cure: str | None = None) -> str:
    """The one sentence form of every error message: ``item: expected E, found F. Cure.``; F may be a sentence."""
    text = f"{item}: expected {expected}, found {found.removesuffix('.')}."
    return f"{text} {cure}" if cure else text


def nearest(word: str, words: Iterable[str]) -> str:
    """``' (did you mean X?)'`` for the closest of `words`, or an empty string."""
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def require(module: str, feature: str, extra: str) -> None:
    """Raise :class:`PrerequisiteError` with the pip line when `module` cannot be imported."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise PrerequisiteError(
            f"{feature} needs the package '{module}', which is not installed. "
            f"Install it in the repository: pip install -e '.[{extra}]'"
        )
