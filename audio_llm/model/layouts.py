"""How published models lie in their folders: what an encoder of a native audio model says of the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol


@dataclasses.dataclass(frozen=True)
class NativeLayout:
    """A published model of tower, projector and language model in one, as the three parts that it has here.

    `encoder` are fields of the encoder's configuration, `projector` and `text` configurations of the other two. `keys`
    are pairs of prefixes: our name of a weight, and the published one. `misnamed` are pairs of a prefix that some
    folders have, and the published one in its place; under `others` lies what hears nothing and is not ours.

    A longer clip is cut into up to `max_windows` windows of the encoder, of which a last one with fewer samples than
    `least_rest` is left out, as the published processor has no token for it. `chunk_length` are the seconds that the
    published feature extractor is set to, where these are not the encoder's window. `around` are the ids of tokens that
    the published processor, and not the template, writes before and behind a sound.
    """

    encoder: dict[str, Any]
    projector: dict[str, Any]
    text: dict[str, Any]
    keys: tuple[tuple[str, str], ...]
    audio_token_id: int
    misnamed: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()
    max_windows: int = 1
    least_rest: int = 1
    chunk_length: float | None = None
    around: tuple[int, int] | None = None

    def published(self, key: str) -> str:
        """The published name of the weight that a folder calls `key`."""
        return next((good + key.removeprefix(bad) for bad, good in self.misnamed if key.startswith(bad)), key)

    def ours(self, key: str) -> str | None:
        """Our name of the weight that a folder calls `key`; None where it is one of `others`, or unknown."""
        key = self.published(key)
        if key.startswith(self.others or "\0"):
            return None
        fitting = [pair for pair in self.keys if key.startswith(pair[1])]
        ours, theirs = max(fitting, key=lambda pair: len(pair[1]), default=("", ""))
        return ours + key.removeprefix(theirs) if fitting else None


@dataclasses.dataclass(frozen=True)
class NativeForm:
    """One of several kinds of folder for a native model: what its weights are called there (None: left out), from the
    published name in any of them, and its ``config.json``."""

    key: Callable[[str], str | None]
    config: Callable[[dict[str, Any]], dict[str, Any]]


class NativeEncoder(Protocol):
    """What the class of an encoder has beside the contract, where a published model of three parts begins with it."""

    name: ClassVar[str]
    native_types: ClassVar[tuple[str, ...]]  # `model_type` in the configurations of such models

    @classmethod
    def native_layout(cls, config: Any) -> NativeLayout:
        """How the published model with this Transformers configuration lies in its folder."""
        ...

    @classmethod
    def native_forms(cls) -> dict[str, NativeForm]:
        """The kinds of folder in which it can be written, the usual one first; none where there is but one."""
        ...
