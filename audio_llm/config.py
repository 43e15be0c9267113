"""Recipes: dataclasses filled from YAML with dotted overrides. An unknown key is an error that names the nearest one."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from audio_llm.errors import ConfigError, nearest

T = TypeVar("T")


def load(kind: type[T], path: str | Path | None = None, overrides: list[str] | None = None) -> T:
    """Build dataclass `kind` from a YAML file and ``key.sub=value`` overrides (values are read as YAML).

    Raises :class:`ConfigError` for an unreadable file, an unknown key or a value of the wrong type.
    """
    import yaml

    tree: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"recipe {path}: cannot be read ({error.strerror}).") from error
        try:
            tree = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"recipe {path}: not valid YAML ({str(error).splitlines()[0]}).") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"recipe {path}: expected a mapping at the top, found {type(tree).__name__}.")
    for override in overrides or []:
        key, sep, value = override.partition("=")
        if not sep:
            raise ConfigError(f"override '{override}': expected key=value, for instance training.steps=20.")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override '{override}': '{parent}' is a value, not a group of keys.")
        node[leaf] = yaml.safe_load(value) if value else None
    return build(kind, tree, where=str(path) if path else "overrides")


def build(kind: type[T], tree: dict[str, Any], where: str = "config") -> T:
    """Build dataclass `kind` (nested dataclasses included) from a plain mapping."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key '{key}'{nearest(key, fields)}. Known keys: {', '.join(sorted(fields))}."
            )
        values[key] = _convert(hints[key], value, f"{where}: {key}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}.")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        errors = []
        for option in typing.get_args(hint):
            if option is type(None):
                continue
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0] if len(errors) == 1 else f"{where}: {value!r} fits none of {hint}.")
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            options = [str(option) for option in typing.get_args(hint)]
            raise ConfigError(
                f"{where}: expected one of {', '.join(options)}, found {value!r}{nearest(str(value), options)}."
            )
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a group of keys, found {value!r}.")
        return build(typing.cast(type, hint), value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}.")
        args = typing.get_args(hint)
        items = [_convert(args[0] if args else Any, item, f"{where}[{i}]") for i, item in enumerate(value)]
        return origin(items)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, found {value!r}.")
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 (no dot) as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}.")


def dump(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML, so that a run folder always holds the resolved recipe."""
    import yaml

    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    Path(path).write_text(yaml.safe_dump(plain, sort_keys=False))
