"""``audio-llm keys [VERB]``: every key that a recipe of a verb may have, with its type, default and meaning.

What a key means is said where it is defined: by the comment on its line, else by the lines above it, else by the
sentence of the class's docstring that names it in backquotes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

HELP = "list the keys of a verb's recipes, with their defaults and what they mean"
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", Any: "anything"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "verb", metavar="VERB", nargs="?", help="prep, train, folds, sft or grpo; without it, they are listed"
    )
    parser.add_argument("kind", metavar="KIND", nargs="?", help="of train: the task; of prep: the kind of data set")
    parser.epilog = "Set a key in the recipe, or behind it on the command line: key=value, group.key=value."


def run(args: argparse.Namespace) -> int:
    from audio_llm.errors import ConfigError, describe, nearest

    verbs = {point.name: point for point in entry_points(group="audio_llm.verbs")}
    known = {name: module.recipes for name, point in verbs.items() if hasattr(module := point.load(), "recipes")}
    if args.verb is None:
        for name, recipes in known.items():
            kinds = [kind for kind in recipes() if kind]
            line = f"audio-llm keys {name}" + (f" [{' | '.join(kinds)}]" if kinds else "")
            print(textwrap.fill(line, 110, subsequent_indent=" " * 8, break_on_hyphens=False))
        return 0
    if args.verb not in known:
        found = f"'{args.verb}'{nearest(args.verb, known)}"
        raise ConfigError(describe("audio-llm keys", f"a verb with recipes: {', '.join(known)}", found))
    recipes = known[args.verb]()
    if args.kind is not None and args.kind not in recipes:
        found = f"'{args.kind}'{nearest(args.kind, recipes)}"
        raise ConfigError(describe(f"audio-llm keys {args.verb}", f"one of {', '.join(filter(None, recipes))}", found))
    chosen = {name: kind for name, kind in recipes.items() if args.kind in (None, name)}
    for number, (name, recipe) in enumerate(chosen.items()):
        print("\n" * (number > 0) + f"{args.verb} {name}".strip() + ":")
        for line in table(recipe):
            print(f"  {line}")
    return 0


def table(recipe: type) -> Iterator[str]:
    """A line a key; what it means is folded beside it."""
    for key in keys(recipe):
        default = "required" if key.default is dataclasses.MISSING else _shown(key.default)
        head = f"{key.name} = {default}  ({key.type})"
        yield head if not key.meaning else f"{head}\n      {textwrap.fill(key.meaning, 108, subsequent_indent=' ' * 6)}"


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a recipe; `default` is ``dataclasses.MISSING`` where it has to be given."""

    name: str
    type: str
    default: Any
    meaning: str


def keys(recipe: type, prefix: str = "") -> Iterator[Key]:
    """The keys of a recipe's dataclass, those of groups with dots."""
    hints = typing.get_type_hints(recipe)
    meant = meanings(recipe)
    for field in dataclasses.fields(recipe):
        inner = next(
            (part for part in (hints[field.name], *typing.get_args(hints[field.name])) if _is_group(part)), None
        )
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        name = f"{prefix}{field.name}"
        if inner is None:
            yield Key(name, _typed(hints[field.name]), default, meant[field.name])
        else:
            for key in keys(inner, f"{name}."):
                own = getattr(default, key.name.removeprefix(f"{name}.").partition(".")[0], dataclasses.MISSING)
                plain = "." not in key.name.removeprefix(f"{name}.") and own is not dataclasses.MISSING
                yield dataclasses.replace(key, default=own) if plain else key


def meanings(recipe: type) -> dict[str, str]:
    """What each field of a dataclass is said to mean, its own or a parent's; "" where nothing is said."""
    found: dict[str, str] = {}
    for kind in reversed(recipe.__mro__):
        if dataclasses.is_dataclass(kind):
            found |= {name: meaning for name, meaning in _said(kind).items() if meaning or name not in found}
    return found


def _said(kind: type) -> dict[str, str]:
    """Of the fields in the body of `kind` alone."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines, tree = source.split("\n"), ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    told = " ".join((ast.get_docstring(tree) or "").split())
    sentences = re.split(r"(?<=[.;]) ", told)
    found, end = {}, 0
    for item in tree.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.end_lineno is not None:
            name = item.target.id
            beside = lines[item.end_lineno - 1].partition("  # ")[2]
            before = (line.strip() for line in lines[end : item.lineno - 1])
            above = [line.removeprefix("# ") for line in before if line.startswith("#")]
            named = next((sentence for sentence in sentences if f"`{name}`" in sentence), "")
            found[name] = (beside or " ".join(filter(None, above)) or named).rstrip(" .;")
        end = item.end_lineno or end
    return {name: meaning for name, meaning in found.items() if name in kind.__annotations__}


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _typed(hint: Any) -> str:
    """A type as a person says it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_typed, inner))
    if origin is list or hint is list:
        return f"list of {_typed(inner[0])}" if inner else "list"
    if origin is tuple:
        return f"list of {len(inner)}: {_typed(inner[0])}"
    if origin is dict or hint is dict:
        return "group of keys"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _shown(value: Any) -> str:
    """A default as a recipe has it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'
