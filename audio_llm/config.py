"""Recipes: dataclasses filled from YAML with dotted overrides. An unknown key is an error naming the nearest one.

A recipe names its verb (``verb: sft``), and the dataclass that it fills says whose it is (``verb: ClassVar[str]``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.yaml_text import read_yaml, yaml_of

T = TypeVar("T")

# Keys as recipes of version 0.1 spelled them, read for one release: old name → new name, dotted where it moved into a
# group. An old name is understood where it is no key of its own and the new one is.
ALIASES: dict[str, str] = {
    "log_every": "log_steps",
    "save_every": "save_steps",
    "eval_every": "eval_steps",
    "clip_norm": "max_grad_norm",
    "warmup": "warmup_share",
    "max_rejects": "max_reject_share",
    "encoder": "train.encoder",
    "projector": "train.projector",
    "channels": "hearing",
    "tensorboard": "report_to",
}
VALUES: dict[str, dict[Any, Any]] = {
    "task": {"encoder": "spatial"},
    "hearing": {"first": "left"},
    "report_to": {True: ["tensorboard"], False: []},
}
# Keys that only recipes of these verbs have: what a recipe without `verb` is for.
_SIGNS = (
    ("report", {"checks"}),
    ("train", {"task"}),
    ("prep", {"kind", "subsets", "splits"}),
    ("grpo", {"rewards", "engine", "grpo", "group_size", "prompts_per_step"}),
    ("sft", {"batch_size", "gradient_accumulation"}),
)


def load(kind: type[T], path: str | Path | None = None, overrides: list[str] | None = None) -> T:
    """Build dataclass `kind` from a YAML file and ``key.sub=value`` overrides (values are read as YAML).

    Raises :class:`ConfigError` for an unreadable file, an unknown or repeated key or a value of the wrong type.
    """
    return build(kind, read(path, overrides, getattr(kind, "verb", None)), where=str(path) if path else "overrides")


def read(path: str | Path | None = None, overrides: list[str] | None = None, verb: str | None = None) -> dict[str, Any]:
    """The plain mapping of a YAML file with its overrides: what :func:`load` fills a dataclass from.

    With a `verb`, a recipe of another one is refused with the command that takes it, and ``verb`` is no longer in it.
    """
    tree = _read(Path(path)) if path is not None else {}
    for override in overrides or []:
        _override(tree, override)
    _rename_values(tree)
    if verb is not None:
        right = verb_of(tree)
        if right not in (None, verb):
            cure = f"Give the command: audio-llm {right} {path}" + (" OUT" if right == "prep" else "")
            raise ConfigError(describe(f"recipe {path}", f"one of 'audio-llm {verb}'", f"one of '{right}'", cure))
        tree.pop("verb", None)
    return tree


def verb_of(tree: dict[str, Any]) -> str | None:
    """The verb that takes a recipe: what it says, else what its keys tell; None where they tell nothing."""
    if (said := tree.get("verb")) is not None:
        return str(said)
    if tree.get("task") == "folds":
        return "folds"
    return next((verb for verb, keys in _SIGNS if keys & set(tree)), None)


@cache  # once for every name
def note(old: str, new: str) -> None:
    """Say, once, that recipes have `new` where one has `old`."""
    print(
        f"note: recipes say '{new}' now where this one says '{old}'; the old form is read for one more release",
        file=sys.stderr,
    )


def renamed(tree: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, Any]:
    """`tree` with its old keys under their new names (:data:`ALIASES`), and old values (:data:`VALUES`)."""
    fresh = dict(tree)
    for old in tree:
        new = ALIASES.get(old)
        if new is None or old in known or (group := new.partition(".")[0]) not in known:
            continue
        value, inside = fresh.pop(old), new.partition(".")[2]
        taken = fresh.get(group) if inside else None
        if (group in fresh and not isinstance(taken, dict)) or (taken and inside in taken):
            raise ConfigError(f"{where}: '{old}' is the old name of '{new}'; found both.")
        fresh[group] = {**(taken or {}), inside: value} if inside else value
        note(old, new)
    _rename_values(fresh)
    return fresh


def _rename_values(tree: dict[str, Any]) -> None:
    for key, values in VALUES.items():
        if isinstance(old := tree.get(key), (str, bool)) and old in values:
            note(f"{key}: {old}", f"{key}: {values[old]}")
            tree[key] = values[old]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: not text, expected a YAML file.") from error
    except ValueError as error:
        raise ConfigError(f"recipe {path}: not valid YAML ({error}).") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path}: expected a mapping at the top, found {type(tree).__name__}.")
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override '{override}': expected key=value, for instance training.steps=20.")
    try:
        value = read_yaml(text) if text else None
    except ValueError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML ({error}).") from error
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{parent}' is a value, not a group of keys.")
    node[leaf] = value


def build(kind: type[T], tree: dict[str, Any], where: str = "config") -> T:
    """Build dataclass `kind` (nested dataclasses included) from a plain mapping."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in renamed(tree, fields, where).items():
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key '{key}'{nearest(str(key), fields)}. Known keys: {', '.join(sorted(fields))}."
            )
        values[key] = convert(hints[key], value, f"{where}: {key}")
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
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:  # what __post_init__ refuses is the recipe's fault, so it names the recipe
        raise ConfigError(f"{where}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value`, as YAML has it, as the type `hint` says. Raises :class:`ConfigError`, which begins with `where`."""
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
            if isinstance(value, dict) and dataclasses.is_dataclass(option):  # so that its keys are what is told of
                return convert(option, value, where)
            try:
                return convert(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0] if len(errors) == 1 else f"{where}: {value!r} fits none of {hint}.")
    if origin is typing.Literal:
        if isinstance(value, bool):  # YAML 1.1 reads these words so
            words = ("on", "yes", "true") if value else ("off", "no", "false")
            value = next((word for word in words if word in typing.get_args(hint)), value)
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
        return _convert_items(hint, value, where)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, found {value!r}.")
        args = typing.get_args(hint)
        if not args:
            return value
        return {_key(args[0], key, where): convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)  # of text as well: YAML 1.1 reads 1e-3 (no dot) as text
            if math.isnan(number):  # every comparison with it is false, so that no check of a range refuses it
                raise ConfigError(f"{where}: expected a number, found {value!r}.")
            return number
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    # YAML has words of its own: yes, no, on, off; and a name may be made of digits.
    cure = " Put it in quotes, where it is a name." if hint in (str, Path) and _is_word(value) else ""
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}.{cure}")


def _key(hint: Any, key: Any, where: str) -> Any:
    """A key of a mapping as the type `hint` says: a name that is a number in YAML is one of its digits."""
    if hint is str and isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    return convert(hint, key, f"{where}: key")


def _is_word(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _convert_items(hint: Any, value: Any, where: str) -> Any:
    """``list[T]``, ``tuple[T, ...]`` and ``tuple[A, B]``; the last one also fixes the length."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, found {value!r}.")
    if origin is list or len(args) == 2 and args[1] is Ellipsis:
        kinds = [args[0]] * len(value)
    elif len(args) == len(value):
        kinds = list(args)
    else:
        raise ConfigError(f"{where}: expected {len(args)} values, found {len(value)}.")
    return origin(
        [convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]
    )


def plain_of(config: Any) -> dict[str, Any]:
    """The values of a dataclass as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def dump(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML, so that a run folder always holds the resolved recipe."""
    plain = plain_of(config)
    if verb := getattr(config, "verb", None):
        plain = {"verb": verb, **plain}
    Path(path).write_text(yaml_of(plain), encoding="utf-8")
