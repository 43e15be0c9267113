"""Things by name: what a recipe or a flag names is looked up here, ours and other people's alike.

Encoders, data sets, tasks, engines and gyms are guests: a package adds one by an entry point of the group
``audio_llm.encoders``, ``.datasets``, ``.tasks``, ``.engines`` or ``.gyms``, and the core never names any of them.
Benchmarks and scorers are found by the files of their folder. Wherever a name is understood, ``package.module:Name`` is
as well.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from audio_llm.errors import ConfigError, describe, nearest


def find(kind: str, name: Any, known: Mapping[str, Any], needs: str = "", instances: bool = False) -> Any:
    """What `known` has under `name`, or what ``package.module:Name`` stands for.

    Raises :class:`ConfigError`, which calls it a `kind`, for a name that is neither, and for something from elsewhere
    that lacks the attribute `needs`, or that is a class where `instances` are wanted.
    """
    module, colon, attribute = str(name).partition(":")
    why = ""
    try:
        if str(name) in known:
            return known[str(name)]
        if colon:
            found = getattr(importlib.import_module(module), attribute)
            if needs and not hasattr(found, needs):
                why = f" (it has no '{needs}')"
            elif instances and isinstance(found, type):
                why = " (it is a class: name an object made of it)"
            else:
                return found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        why = f" ({error})"
    expected = f"one of {', '.join(sorted(known))}, or package.module:Name"
    raise ConfigError(describe(kind, expected, f"'{name}'{nearest(str(name), known)}{why}"))


class Registry(Mapping[str, Any]):
    """The entry points of ``audio_llm.<group>`` by name; one is loaded when it is asked for.

    `kind` is what an error calls them, `needs` an attribute that each of them has.
    """

    instances = False

    def __init__(self, group: str, kind: str, needs: str = "") -> None:
        self.group, self.kind, self.needs = f"{__package__}.{group}", kind, needs

    @cached_property
    def _known(self) -> Mapping[str, Any]:
        return {point.name: point for point in entry_points(group=self.group)}

    def __getitem__(self, name: str) -> Any:
        return self._known[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, name: Any) -> Any:
        """What is registered under `name`, or ``package.module:Name``; :class:`ConfigError` as of :func:`find`."""
        return find(self.kind, name, self, self.needs, self.instances)


class Folder(Registry):
    """What the files of a package offer as `attribute`, one thing or a tuple of them, each known by its ``name``.

    `instances` says that these are no classes. The files are imported when the first name is asked for; ``base`` is the
    contract and offers nothing.
    """

    def __init__(self, package: str, attribute: str, kind: str, needs: str, instances: bool = False) -> None:
        self.package, self.attribute, self.kind = package, attribute, kind
        self.needs, self.instances = needs, instances

    @cached_property
    def files(self) -> list[str]:
        """The names of the files, of which none is imported."""
        path = importlib.import_module(self.package).__path__
        return [file.name for file in pkgutil.iter_modules(path) if file.name != "base"]

    @cached_property
    def _known(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for file in self.files:
            offered = getattr(importlib.import_module(f"{self.package}.{file}"), self.attribute, ())
            found |= {thing.name: thing for thing in (offered if isinstance(offered, tuple) else (offered,))}
        return found

    def __getitem__(self, name: str) -> Any:
        return self._known[name]
