"""YAML as recipes are written in it: no key twice, ``1e-3`` is a number wherever it stands, ``~/`` the home folder.

PyYAML reads YAML 1.1, in which ``010`` is eight, ``1:30`` ninety, ``2026-01-31`` a date, and ``1e-3`` a text. Here they
are what version 1.2 has them as, or what stands there: names and ids, of which recipes have more than of the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

_NUMBERS = {
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    "float": re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
}
_TAG = "tag:yaml.org,2002:"
_FIRST = list("-+.0123456789")


def read_yaml(text: str) -> Any:
    """The tree that `text` holds. Raises :class:`ValueError` with what is wrong, and in which line."""
    import yaml

    try:
        tree = yaml.load(text, Loader=_loader())
        if _holds_itself(tree):
            raise ValueError("a value that holds itself")
        return tree
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        told = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{told}, line {mark.line + 1}" if mark else told) from error
    except RecursionError as error:
        raise ValueError("brackets nested without end") from error


@cache
def _loader() -> type:
    """A SafeLoader that refuses a key given twice: plain YAML keeps the last one without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:  # as they are written: what `<<` brings may be given anew
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        told = f"key '{key.value}' given twice"
                        raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
                    seen.add(key.value)
            return node

        def flatten_mapping(self, node: Any) -> None:
            """Put what ``<<`` names into a mapping (yaml.org/type/merge): what stands beside it wins, then the earlier
            one of several. In PyYAML 6.0.4 the later one does, and in 6.0.3 the earlier one."""
            found: dict[Any, Any] = {}
            own = []
            for key, value in node.value:
                if key.tag != f"{_TAG}merge":
                    own.append((key, value))
                    continue
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(part, yaml.MappingNode):
                        told = f"expected a mapping to merge, found {part.id}"
                        raise yaml.constructor.ConstructorError(None, None, told, part.start_mark)
                    self.flatten_mapping(part)
                    for pair in part.value:
                        found.setdefault(pair[0].value if isinstance(pair[0], yaml.ScalarNode) else id(pair[0]), pair)
            beside = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
            node.value = [pair for key, pair in found.items() if key not in beside] + own

        def construct_text(self, node: Any) -> str:
            text = str(self.construct_scalar(node))
            return os.path.expanduser(text) if text.startswith("~/") else text

    Loader.add_constructor(f"{_TAG}str", Loader.construct_text)
    others = {f"{_TAG}{name}" for name in (*_NUMBERS, "timestamp", "value")}
    Loader.yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] not in others]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, pattern in _NUMBERS.items():
        Loader.add_implicit_resolver(f"{_TAG}{name}", pattern, _FIRST)
    return Loader


def _holds_itself(tree: Any) -> bool:
    """Whether an anchor stands within what it names: ``&a [*a]``."""

    def parts(node: Any) -> Iterator[Any]:
        return iter(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())

    path, open_parts, done = [id(tree)], [parts(tree)], set[int]()
    while open_parts:
        part = next(open_parts[-1], done)
        if part is done:  # no more of them
            done.add(path.pop())
            open_parts.pop()
        elif isinstance(part, (dict, list)):
            if id(part) in path:
                return True
            if id(part) not in done:
                path.append(id(part))
                open_parts.append(parts(part))
    return False


def yaml_of(tree: Any) -> str:
    """`tree` as text that :func:`read_yaml` reads again."""
    import yaml

    class Dumper(yaml.SafeDumper):  # with quotes around texts that look like numbers of the loader's
        pass

    def text(dumper: Any, value: str) -> Any:
        quoted = '"' if set(value) & set("\x85\u2028\u2029") else None  # else written as breaks, and read as blanks
        return dumper.represent_scalar(f"{_TAG}str", value, style=quoted)

    Dumper.add_representer(str, text)
    for name, pattern in _NUMBERS.items():
        Dumper.add_implicit_resolver(f"{_TAG}{name}", pattern, _FIRST)
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True))
