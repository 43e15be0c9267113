"""The contract of a corpus: items, the stages they go through, and the source they come from.

An item is a recording or a stretch of one. Every stage gives one result for each item, the item with more fields or a
reject with a reason, so that the numbers add up: in = out + rejects, stage by stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from audio_llm.errors import AudioLLMError

# Reasons of the engine, which any stage may have.
RAISED, TIMEOUT, DIED = "raised", "timeout", "worker_died"
FAILED = (RAISED, TIMEOUT, DIED)
# What a run makes in the corpus folder beside its shards.
FOLDERS = ("items", "ledger", "clips", "vectors", "replies", "figures")


class RunStopped(AudioLLMError):
    """What would meet every other item as well, an endpoint that serves nobody for one: it is no fault of an item's, so
    the run stops, and the same command goes on where it was."""


@dataclass(frozen=True)
class Item:
    """A recording or a stretch of one. `fields` hold values of JSON alone; paths are absolute, or below the corpus
    folder. `id` is unique in a corpus and can name members of a shard (:func:`audio_llm.shards.schema.check_key`)."""

    id: str
    fields: Mapping[str, Any]

    def adding(self, **fields: Any) -> Item:
        """The same item with more, or other, fields."""
        return Item(self.id, {**self.fields, **fields})


@dataclass(frozen=True)
class Reject:
    """An item that went no further: why, by a word of the stage's list, and what was found."""

    id: str
    reason: str
    detail: str = ""


@runtime_checkable
class Stage(Protocol):
    """One step. A stage is a dataclass of its recipe's keys, found by its ``name`` or as ``package.module:Class``.

    `needs` are the fields that decide the result of an item: a line of the ledger is known by them, the item's id and
    the stage's fingerprint. `gives` are the fields it sets; others that it sets are lost. Both may be properties where
    keys of the recipe decide. `reasons` is the closed list of its rejects;
    `retryable` are those that another try could change, which ``retry`` asks for. A field ``NAME_dropped`` counts, by
    reason, what an item that goes on has lost, so that it can be tried again as well.

    The fingerprint is made of name, `version` (raise it when the same input would give other fields), recipe and
    :meth:`digests`. `free` are keys of the recipe that decide nothing: addresses, sizes of batches, paths whose
    contents have a digest. Keys ``seed``, ``corpus`` and ``retry`` that an entry leaves out have the recipe's values.

    The result of an item must not depend on the other items of a call, nor on their order: calls are cut differently by
    other engines and after a stop. What depends on all items is `whole`: :meth:`run` has them all at once, in the
    driver. With `keeps` false a stage has no ledger, for what it leaves is files by which it goes on itself.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    whole: ClassVar[bool]
    keeps: ClassVar[bool]
    free: ClassVar[tuple[str, ...]]

    @property
    def reasons(self) -> tuple[str, ...]: ...
    @property
    def retryable(self) -> tuple[str, ...]: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def gives(self) -> tuple[str, ...]: ...

    def check(self) -> None:
        """Raise :class:`ConfigError` for values that do not go together; nothing heavy is imported."""

    def digests(self) -> Mapping[str, str]:
        """SHA-256 or the like of models, prompts and other files that decide the results, by what they are."""

    def before(self, stages: Sequence[Stage]) -> None:
        """Told, before anything else, which stages follow in the recipe: what they would refuse need not be made. What
        is taken from them belongs into :meth:`digests`."""

    def open(self, folder: Path) -> None:
        """Load what :meth:`run` needs: once, in the worker. `folder` is the corpus folder. What it raises stops the
        run."""

    def run(self, items: Sequence[Item]) -> list[Item | Reject]:
        """One result an item, in their order. What it raises is a reject of its item after one retry alone, but for
        :class:`RunStopped`."""

    def close(self) -> None:
        """Let go of what :meth:`open` holds."""

    def facts(self) -> Mapping[str, Any]:
        """What ``dataset.json`` is to say of a `whole` stage that ran."""


class Step:
    """Defaults of a :class:`Stage`: what most stages say about themselves."""

    version: ClassVar[int] = 1
    whole: ClassVar[bool] = False
    keeps: ClassVar[bool] = True
    free: ClassVar[tuple[str, ...]] = ()
    reasons: ClassVar[tuple[str, ...]] = ()
    retryable: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        pass

    def digests(self) -> Mapping[str, str]:
        return {}

    def before(self, stages: Sequence[Stage]) -> None:
        pass

    def open(self, folder: Path) -> None:
        pass

    def close(self) -> None:
        pass

    def facts(self) -> Mapping[str, Any]:
        return {}


@runtime_checkable
class Source(Protocol):
    """Where items come from: a dataclass of its recipe's keys. `gives` are fields that its items may have."""

    name: ClassVar[str]

    @property
    def reasons(self) -> tuple[str, ...]: ...
    @property
    def gives(self) -> tuple[str, ...]: ...

    def check(self) -> None:
        """As of a :class:`Stage`."""

    def items(self) -> Iterator[Item | Reject]:
        """Every item, always in the same order. What it yields before it raises :class:`DataError` is lost."""
