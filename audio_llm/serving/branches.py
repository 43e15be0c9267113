"""``oneOf`` in a JSON schema: kept as it is meant where no value fits two of its branches, refused elsewhere.

xgrammar reads ``oneOf`` as ``anyOf``. Where branches overlap, a reply that fits two of them is written and fits the
schema not at all. Branches are apart here where that can be seen: other types, other values, or a property that both
require and whose values are apart (as of a tagged union); what cannot be seen is taken for an overlap. A
``discriminator`` counts as required: without it every client of a tagged union refuses the value.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from audio_llm.errors import AudioLLMError, describe

_TYPES: dict[str, Any] = {
    "string": str,
    "null": type(None),
    "array": list,
    "object": dict,
    "number": (int, float),
    "integer": int,
}
_DEEPEST = 16  # references and properties that are followed; a schema may name itself


def is_of(value: Any, types: Any) -> bool:
    """Whether a value of JSON is of a schema's `type`, one or a list of them."""
    listed = types if isinstance(types, list) else [types]
    if isinstance(value, bool):
        return "boolean" in listed
    return any(isinstance(value, _TYPES.get(name, ())) for name in listed if isinstance(name, str))


def check_branches(schema: Any, where: str) -> None:
    """Raise :class:`AudioLLMError` for a ``oneOf`` anywhere in `schema` of which two branches may overlap."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            branches = node.get("oneOf")
            branches = branches if isinstance(branches, list) else []  # a property may be called so
            for (one, first), (two, second) in combinations(enumerate(branches), 2):
                if not _apart(first, second, schema) and not _tagged(node, first, second, schema):
                    cure = "Say anyOf where a value may fit both, or require a property whose const differs."
                    expected, found = "branches of which a value fits one at most", f"{one} and {two} that may overlap"
                    raise AudioLLMError(describe(f"{where}: oneOf", expected, found, cure))
            stack += [value for key, value in node.items() if key not in ("enum", "const", "default", "examples")]


def _tagged(node: dict[str, Any], one: Any, two: Any, root: Any) -> bool:
    """Whether the discriminator of a union parts two of its branches."""
    said = node.get("discriminator")
    name = said.get("propertyName") if isinstance(said, dict) else None
    found = [_target(part["$ref"], root) if isinstance(part, dict) and "$ref" in part else part for part in (one, two)]
    parts = [part.get("properties") if isinstance(part, dict) else None for part in found]
    first, second = (part.get(name, True) if isinstance(part, dict) else True for part in parts)
    return _apart(first, second, root)


def _apart(one: Any, two: Any, root: Any, depth: int = 0) -> bool:
    """Whether no value can fit both schemas."""
    if one is False or two is False:
        return True
    if not isinstance(one, dict) or not isinstance(two, dict) or depth > _DEEPEST:
        return False
    for this, other in ((one, two), (two, one)):
        if isinstance(this.get("$ref"), str):
            return _apart(_target(this["$ref"], root), other, root, depth + 1)
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(this.get(key), list):
                found = [_apart(part, other, root, depth + 1) for part in this[key]]
                if any(found) if key == "allOf" else all(found):
                    return True
    values, others = _values(one), _values(two)
    if values is not None and others is not None:
        return not any(_equal(value, other) for value in values for other in others)
    for mine, schema in ((values, two), (others, one)):
        if mine is not None and "type" in schema:
            return not any(is_of(value, schema["type"]) for value in mine)
    kinds, further = _kinds(one), _kinds(two)
    if not kinds & further:
        return True
    return kinds == further == {"object"} and _differ(one, two, root, depth)


def _differ(one: dict[str, Any], two: dict[str, Any], root: Any, depth: int) -> bool:
    """Whether two schemas of objects have a required property that parts them."""
    parts = {
        name: schema["properties"] if isinstance(schema.get("properties"), dict) else {}
        for name, schema in (("one", one), ("two", two))
    }
    wanted = [{name for name in _listed(schema.get("required")) if isinstance(name, str)} for schema in (one, two)]
    for name in wanted[0] & wanted[1]:
        if _apart(parts["one"].get(name, True), parts["two"].get(name, True), root, depth + 1):
            return True
    for needed, other, known in ((wanted[0], two, parts["two"]), (wanted[1], one, parts["one"])):
        closed = other.get("additionalProperties") is False and "patternProperties" not in other
        if closed and needed - set(known):
            return True
    return False


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """The only values that a schema allows; None where it allows others."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _kinds(schema: dict[str, Any]) -> set[str]:
    """The types of JSON that a schema allows; a whole number is a number as well."""
    said = _listed(schema["type"]) if "type" in schema else [*_TYPES, "boolean"]
    kinds = {kind for kind in said if isinstance(kind, str)}
    return kinds | {"integer"} if "number" in kinds else kinds


def _equal(one: Any, two: Any) -> bool:
    """Whether values of JSON are one: true is not 1, and 1.0 is."""
    if isinstance(one, (dict, list)) or isinstance(two, (dict, list)):
        return True  # not looked into
    return isinstance(one, bool) == isinstance(two, bool) and bool(one == two)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _target(reference: str, root: Any) -> Any:
    """What ``#/…`` names in `root`; anything (True) where that is not there."""
    node = root
    for part in reference.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or part not in node:
            return True
        node = node[part]
    return node
