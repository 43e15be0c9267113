"""Errors a person can act on: the item, what was expected, what was found, and the cure.

Everything derived from :class:`AudioLLMError` is printed by the command line as one message, without a traceback,
with its exit code. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What a terminal obeys instead of showing: C0 and C1 controls, and marks that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


class AudioLLMError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class AudioError(AudioLLMError):
    """An audio file or array that cannot be used. `cause` says what is wrong in a word: none, outside, missing, empty,
    cut, channels, short, long, loud, "not finite", or "" for anything else."""

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


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


def visible(text: str) -> str:
    """`text` with what would steer a terminal written out, as JSON writes it (``\\u001b``); lines and tabs stay."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """`text` as :func:`visible` shows it, and in one line: a file's name may have line breaks."""
    return visible(text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"))


def describe(item: str, expected: str, found: str, cure: str | None = None) -> str:
    """The one sentence form of every error message: ``item: expected E, found F. Cure.``; F may be a sentence."""
    text = f"{item}: expected {expected}, found {found.removesuffix('.')}."
    return f"{text} {cure}" if cure else text


def nearest(word: object, words: Iterable[str]) -> str:
    """``' (did you mean X?)'`` for the closest of `words`, or an empty string. Of several, one with the same letters
    comes first: "mmua" is rather "mmau" than "mmsu". YAML's keys need not be texts: `word` is what it is written as."""
    close = difflib.get_close_matches(word := str(word), list(words), n=3, cutoff=0.5)
    close.sort(key=lambda one: sorted(one) != sorted(word))
    return f" (did you mean '{close[0]}'?)" if close else ""


def require(module: str, feature: str, extra: str) -> None:
    """Raise :class:`PrerequisiteError` with the pip line when `module` cannot be imported."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise PrerequisiteError(
            f"{feature} needs the package '{module}', which is not installed. "
            f"Install it in the repository: pip install -e '.[{extra}]'"
        )
