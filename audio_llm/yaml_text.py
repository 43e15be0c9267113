"""YAML as recipes are written in it: no key twice, ``1e-3`` is a number wherever it stands, ``~/`` the home folder."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

# A number of YAML 1.2; PyYAML, which reads YAML 1.1, takes it for text where a dot or a sign is missing.
_FLOATS = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """The tree that `text` holds. Raises :class:`ValueError` with what is wrong, and in which line."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
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
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen: set[Any] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key.value}' given twice", key.start_mark
                    )
                seen |= {key.value} - {"<<"} if isinstance(key, yaml.ScalarNode) else set()
            return super().construct_mapping(node, deep)

        def construct_text(self, node: Any) -> str:
            text = str(self.construct_scalar(node))
            return os.path.expanduser(text) if text.startswith("~/") else text

    Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_text)
    Loader.add_implicit_resolver(*_FLOATS)
    return Loader


def yaml_of(tree: Any) -> str:
    """`tree` as text that :func:`read_yaml` reads again."""
    import yaml

    class Dumper(yaml.SafeDumper):  # with quotes around texts that look like numbers of the loader's
        pass

    def text(dumper: Any, value: str) -> Any:
        quoted = '"' if set(value) & set("\x85\u2028\u2029") else None  # else written as breaks, and read as blanks
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=quoted)

    Dumper.add_representer(str, text)
    Dumper.add_implicit_resolver(*_FLOATS)
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True))
