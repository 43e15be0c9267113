"""Guests by name: encoders, data sets, tasks and engines come in through entry points, as verbs do.

A package adds one by an entry point of the group ``audio_llm.encoders``, ``.datasets``, ``.tasks`` or ``.engines``; the
core never names any of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from audio_llm.errors import ConfigError, describe, nearest


class Registry(Mapping[str, Any]):
    """The entry points of ``audio_llm.<group>`` by name; one is loaded when it is asked for.

    `kind` is what an error calls them. Besides names, ``package.module:Attribute`` is understood.
    """

    def __init__(self, group: str, kind: str) -> None:
        self.group, self.kind = f"{__package__}.{group}", kind

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def __getitem__(self, name: str) -> Any:
        if name in self._points:
            return self._points[name].load()
        module, colon, attribute = str(name).partition(":")
        if not colon:
            raise KeyError(name)
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def find(self, name: Any) -> Any:
        """What is registered under `name`; :class:`ConfigError` with the names that there are otherwise."""
        try:
            return self[str(name)]
        except (KeyError, ImportError, AttributeError) as error:
            known = f"one of {', '.join(sorted(self))}, or package.module:Name"
            found = f"'{name}'{nearest(str(name), self)}" + ("" if isinstance(error, KeyError) else f" ({error})")
            raise ConfigError(describe(self.kind, known, found)) from error
