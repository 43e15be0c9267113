"""The contract of a kind of data set that ``audio-llm prep`` makes: one file of this folder, which ends with ``KIND``.

What such a file imports at its top is light, so that a recipe is checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.ledger import Summary


class Prepare(Protocol):
    """Makes the data set of a recipe in the folder `out`; what an earlier run of the same recipe left is kept.

    Raises :class:`ConfigError` for values that do not fit, and when `out` holds the data set of another recipe, unless
    `overwrite` (:class:`data_prep.ledger.Ledger`).
    """

    def __call__(
        self, recipe: Any, out: Path, /, *, workers: int | None = None, overwrite: bool = False, quiet: bool = False
    ) -> Summary: ...


@dataclass(frozen=True)
class Kind:
    """A kind of data set: `name` is what a recipe says under ``kind``, `recipe` the dataclass of its keys.

    `flags` are those of ``--sounds`` and ``--folds`` that it takes, with the key of the recipe that each sets; `draw`
    is what ``--plot`` does, and gives the pictures' paths. `details` are lines about a manifest, printed before the
    last one. `parts` are the dataclasses of what is named within its recipes, such as stages, by those names.
    """

    name: str
    recipe: type
    prepare: Prepare
    flags: Mapping[str, str] = field(default_factory=dict)
    draw: Callable[[Path], Iterable[Path]] | None = None
    details: Callable[[Mapping[str, Any]], Iterable[str]] = lambda manifest: ()
    parts: Callable[[], Mapping[str, type]] = dict
