"""What the body of a request may say: vLLM passes over keys that it does not know, and takes some it answers wrongly.

Every check gets the request and the facts of the server (``launcher.guard_facts``), and raises
:class:`~audio_llm.errors.AudioLLMError` with the key that was meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from audio_llm.errors import AudioLLMError, describe, nearest
from audio_llm.files import parse_json
from audio_llm.language.templates import refuse_marks
from audio_llm.model.validate import check_adapter, is_checkpoint
from audio_llm.serving.branches import check_branches, is_of

# Keys of OpenAI's that change no answer; its clients send them and vLLM has none of them.
NOTES = frozenset({"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES, MAX_PARTS, MAX_REPLIES = 1000, 1000, 128
MAX_GRAMMAR_BYTES, MAX_CHOICES, MAX_WEIGHT = 2**16, 1000, 200_000
MAX_OPEN = 128  # parts in a row of which each may be left out: xgrammar's time grows with their square, or cube
_KINDS = ("choice", "json", "regex", "grammar", "json_object", "structural_tag")
GRAMMAR_KEYS = (*_KINDS, "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
LOAD_KEYS = frozenset({"lora_name", "lora_path", "load_inplace"})
_NAME = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_COUNTED = re.compile(r"\{(\d+)?,?(\d+)?\}")
_WORD = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)  # an escape, a class, a count, a character
_LITERAL = re.compile(rf'"(?:\\.|[^"\\])*"|{_WORD.pattern}', re.DOTALL)  # of a grammar: a text as well
_RULE = re.compile(r"^\s*[\w?!.-]+\s*(?:::=|:)", re.MULTILINE)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# Keywords of JSON Schema that bind what they describe, and that xgrammar reads over (a warning on the server's side).
_UNKEPT = ("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
_UNKEPT_COUNTS = ("contains", "uniqueItems", "multipleOf")
# A schema under one of these keys, or values, stands for itself: xgrammar reads over what binds beside it.
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_NOTES = frozenset(
    "title description default examples deprecated readOnly writeOnly discriminator nullable $comment $schema $id "
    "$anchor $defs definitions".split()
)
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # their keys are names, no keywords
_DATA = frozenset({"enum", "const", "default", "examples"})


def check_chat(request: dict[str, Any], facts: dict[str, Any]) -> None:
    """A chat whose keys are known, whose messages are a list of turns, and whose grammar is of a size to build."""
    if request.get("modalities") == ["text"]:
        request = {key: value for key, value in request.items() if key != "modalities"}
    _check_keys(request, _fields("chat_completion", "ChatCompletionRequest") | NOTES)
    messages = request.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise AudioLLMError(describe("messages", "a list of messages", type(messages).__name__))
    if len(messages) > MAX_MESSAGES:
        raise AudioLLMError(describe("messages", f"at most {MAX_MESSAGES}", str(len(messages))))
    for number, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise AudioLLMError(
                describe(f"messages[{number}].role", f"one of {', '.join(ROLES)}", repr(message.get("role"))[:40])
            )
        parts = message.get("content")
        if isinstance(parts, list) and len(parts) > MAX_PARTS:
            raise AudioLLMError(describe(f"messages[{number}].content", f"at most {MAX_PARTS} parts", str(len(parts))))
    written = [request[key] for key in ("tools", "functions", "documents", "chat_template_kwargs") if key in request]
    refuse_marks([*messages, *written], facts["special_words"])
    last = messages[-1].get("content") if messages else None
    if request.get("echo") and isinstance(last, list) and not all(_is_text(part) for part in last):
        cure = "Leave echo out: vLLM fails over what is no text."
        raise AudioLLMError(describe("echo", "a last message of text alone", "one with a sound", cure))
    _check_replies(request)
    _check_grammar(request)


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")


def check_completion(request: dict[str, Any], facts: dict[str, Any]) -> None:
    """A completion whose keys are known, without audio placeholders: this endpoint has no audio."""
    _check_keys(request, _fields("completion", "CompletionRequest") | NOTES)
    words, ids = facts["audio_marks"], set(facts["audio_mark_ids"])
    stack = [request.get("prompt"), request.get("suffix")]
    while stack:
        prompt = stack.pop()
        if isinstance(prompt, str):
            found = any(word in prompt for word in words)
        else:
            found = isinstance(prompt, list) and any(isinstance(part, int) and part in ids for part in prompt)
        if found:
            raise AudioLLMError(
                f"prompt: {' '.join(words) or 'the placeholder'} stands for audio, and this endpoint has none. "
                "Use /v1/chat/completions with input_audio or audio_url parts."
            )
        if isinstance(prompt, list):
            stack += [entry for entry in prompt if isinstance(entry, (str, list))]
    _check_replies(request)
    _check_grammar(request)


def check_load(request: dict[str, Any], facts: dict[str, Any]) -> None:
    """An adapter that would be mis-scaled or partly ignored, of another base, or answering from stale caches."""
    _check_updates(facts)
    _check_keys(request, LOAD_KEYS)
    if request.get("load_inplace"):
        raise AudioLLMError(
            "load_inplace: prompts that were answered with the old weights would be answered from its cache. "
            "Load the new adapter under a new name, then unload the old one."
        )
    name, folder = request.get("lora_name"), request.get("lora_path")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == facts["name"]:
        raise AudioLLMError(
            describe("lora_name", "a name of letters, digits, '.', '-', '_', not the model's", "another")
        )
    if not isinstance(folder, str) or not folder or not Path(folder).is_absolute():
        raise AudioLLMError(describe("lora_path", "the full path of an adapter's folder", "something else"))
    if not (Path(folder) / "adapter_config.json").is_file():  # whatever else there may be: it is not told
        raise AudioLLMError(describe("lora_path", "a PEFT adapter folder with adapter_config.json", "none"))
    if is_checkpoint(folder):
        raise AudioLLMError(describe("lora_path", "a folder of an adapter alone", "one that holds a model as well"))
    check_adapter(folder, facts["checkpoint"], facts["max_lora_rank"])


def check_unload(request: dict[str, Any], facts: dict[str, Any]) -> None:
    """The name of an adapter, by which vLLM knows it."""
    _check_updates(facts)
    _check_keys(request, frozenset({"lora_name", "lora_int_id"}))


def _check_updates(facts: dict[str, Any]) -> None:
    if not facts["adapters"]:
        cure = "Start the server with --allow-adapter-updates."
        raise AudioLLMError(describe("adapter", "a server that loads adapters while it runs", "another", cure))


@cache
def _fields(module: str, name: str) -> frozenset[str]:
    """The keys of one of vLLM's requests."""
    import importlib

    fields = getattr(importlib.import_module(f"vllm.entrypoints.openai.{module}.protocol"), name).model_fields
    return frozenset(fields) | {field.alias for field in fields.values() if field.alias}


def _check_keys(request: dict[str, Any], known: Collection[str], where: str = "") -> None:
    for key in request:
        if key in known:
            continue
        if key.startswith("guided_"):
            kind = {"guided_decoding": "choice", "guided_json": "json"}.get(key, key.removeprefix("guided_"))
            cure = f"Say it as structured_outputs: {{'{kind}': ...}}."
            raise AudioLLMError(describe(key, "keys that this server heeds", "one that vLLM no longer has", cure))
        raise AudioLLMError(f"{where}{key[:80]!r}: no such key{nearest(key[:80], known)}.")


def _check_replies(request: dict[str, Any]) -> None:
    for key in ("n", "best_of", "prompt_logprobs", "logprobs", "top_logprobs"):
        value = request.get(key)
        if isinstance(value, int) and value > MAX_REPLIES:
            raise AudioLLMError(describe(key, f"at most {MAX_REPLIES}", str(value)[:20]))


def _check_grammar(request: dict[str, Any]) -> None:
    """Constraints that take minutes or gigabytes to build are refused before anything is built."""
    wanted = request.get("structured_outputs")
    if isinstance(wanted, dict):
        _check_keys(wanted, GRAMMAR_KEYS, "structured_outputs: ")
        choices = wanted.get("choice")
        if isinstance(choices, list) and not 1 <= len(choices) <= MAX_CHOICES:
            expected = f"1 to {MAX_CHOICES} choices"
            raise AudioLLMError(describe("structured_outputs.choice", expected, str(len(choices))))
    for name in ("structured_outputs", "response_format", "tools"):
        tree = request.get(name)
        if tree is None:
            continue
        size = len(json.dumps(tree))
        if size > MAX_GRAMMAR_BYTES:
            raise AudioLLMError(describe(name, f"at most {MAX_GRAMMAR_BYTES} bytes", str(size)))
        tree = _read_texts(name, tree)
        if _weight(tree) > MAX_WEIGHT:
            expected = f"at most {MAX_WEIGHT} characters when its repetitions are written out"
            raise AudioLLMError(describe(name, expected, "more"))
        if _open_squares(tree) > MAX_OPEN**2:
            expected = f"at most {MAX_OPEN} optional properties (or optional and repeated parts of a text) in a row"
            cure = "List in `required` what is always wanted; minProperties and maxProperties count for more."
            raise AudioLLMError(describe(name, expected, "more", cure))
        if name != "tools" or request.get("tool_choice") not in (None, "none", "auto"):  # else they are words alone
            for schema in _schemas(tree):
                _check_schema(schema, name)
                check_branches(schema, name)


def _read_texts(name: str, tree: Any) -> Any:
    """`tree` with what ``structured_outputs`` may hold as the text of JSON read, so that it is seen by every check."""
    if name != "structured_outputs" or not isinstance(tree, dict):
        return tree
    texts = {key: tree[key] for key in ("json", "structural_tag") if isinstance(tree.get(key), str)}
    try:
        return tree | {key: parse_json(text) for key, text in texts.items()}
    except ValueError as error:
        raise AudioLLMError(describe(f"{name}.{next(iter(texts))}", "JSON", f"other text ({error})")) from error


def _schemas(tree: Any) -> list[Any]:
    """The JSON schemas in a constraint: a value under one of these keys that is not itself what holds such a key."""
    found: list[Any] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            for key, value in node.items():
                holder = key == "json_schema" and isinstance(value, dict) and "schema" in value
                is_schema = key in ("json", "json_schema", "schema", "parameters") and not holder
                (found if is_schema else stack).append(value)
    return found


def _check_schema(schema: Any, where: str) -> None:
    """A schema of which no part is passed over in silence: the reply would look constrained and would not be."""
    if not isinstance(schema, dict):
        return
    unkept = [key for key in _UNKEPT if key in schema] + [key for key in _UNKEPT_COUNTS if schema.get(key)]
    if unkept:
        cure = "Say what is allowed by type, enum, anyOf, pattern and bounds."
        found = f"'{unkept[0]}', which vLLM passes over"
        raise AudioLLMError(describe(where, "a schema that replies can be held to", found, cure))
    target = schema.get("$ref")
    if isinstance(target, str) and target != "#" and not (target.startswith("#/") and target != "#/"):
        raise AudioLLMError(describe(f"{where}: $ref", "a part of the same schema ('#/$defs/NAME')", repr(target[:80])))
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        if isinstance(parts, list) and (not parts or (key == "allOf" and len(parts) > 1)):
            expected = "one schema (several are not held to)" if key == "allOf" else "at least one schema"
            raise AudioLLMError(describe(f"{where}: {key}", expected, str(len(parts) or "none")))
    _check_beside(schema, where)
    names, wanted = schema.get("properties"), schema.get("required")
    unknown = [name for name in wanted if name not in (names or {})] if isinstance(wanted, list) else []
    if unknown and isinstance(names, (dict, type(None))):
        expected, cure = "names of its `properties` (others are not held to)", "Describe it there, if only as {}."
        raise AudioLLMError(describe(f"{where}: required", expected, repr(unknown[0])[:80], cure))
    for key, value in schema.items():
        if key in _DATA:
            continue
        if isinstance(value, dict):
            value = list(value.values()) if key in _NAMED else [value]
        for part in value if isinstance(value, list) else []:
            _check_schema(part, where)


def _check_beside(schema: dict[str, Any], where: str) -> None:
    """Raise for a part that binds beside one that stands for itself. A `type` may, where it says nothing new."""
    whole = next((key for key in _WHOLE if key in schema), None)
    if whole is None:
        return
    others = [key for key in schema if key != whole and key not in _NOTES and not key.startswith("x-")]
    said, parts = schema.get("type"), schema[whole] if isinstance(schema[whole], list) else [schema[whole]]
    if whole in ("const", "enum"):
        alike = all(is_of(part, said) for part in parts)
    else:
        alike = whole != "$ref" and all(isinstance(part, dict) and part.get("type") == said for part in parts)
    if "type" in others and alike:
        others.remove("type")
    if others:
        cure = f"Put it into {'the part that it names' if whole == '$ref' else f'the schemas under {whole}'}."
        if whole in ("const", "enum"):
            cure = "Leave out the values that it does not allow."
        found = f"'{others[0]}', which vLLM passes over there"
        raise AudioLLMError(describe(f"{where}: beside {whole}", "nothing that binds", found, cure))


def _open_squares(node: Any) -> int:
    """The squares of how many parts stand in a row of which each may be left out or repeated, summed over the rows."""
    if isinstance(node, list):
        return sum(map(_open_squares, node))
    if not isinstance(node, dict):
        return 0
    squares = 0
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict):
        wanted = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        counted = "minProperties" in node or "maxProperties" in node
        squares += 8 * len(properties) ** 2 if counted else len(properties.keys() - wanted) ** 2
    for key, value in node.items():
        if key in ("regex", "pattern") and isinstance(value, str):
            squares += _row_squares(_WORD.findall(value))
        elif key == "grammar" and isinstance(value, str):
            squares += sum(_row_squares(_LITERAL.findall("".join(rule.split()))) for rule in _RULE.split(value))
        elif key == "patternProperties" and isinstance(value, dict):
            squares += sum(_row_squares(_WORD.findall(pattern)) for pattern in value)
        squares += _open_squares(value)
    return squares


def _row_squares(words: list[str]) -> int:
    """The same of an expression: an alternative is a row; a bracket in it is as many parts as its own longest has."""
    squares = row = 0  # `row` of the alternative that is being read
    outer: list[tuple[int, int, bool]] = []  # of each open bracket: the row before it, its longest so far, several
    longest, several = 0, False
    for before, word in pairwise(["(", *words]):
        if word == "(":
            outer.append((row, longest, several))
            row, longest, several = 0, 0, False
        elif word == "|" or (word == ")" and outer):
            row += before in "(|"  # nothing is one of the alternatives
            squares += row**2 if several or word == "|" else 0
            longest, several = max(longest, row), True
            if word == "|":
                row = 0
            else:
                inner = longest
                row, longest, several = outer.pop()
                row += inner
        elif word in ("?", "*", "+", '""') or (word[0] == "{" and len(word) > 1):
            row += (before, word) != ("(", "?")  # which opens a bracket of another kind
    return squares + sum(parts for parts, _, _ in outer) ** 2 + row**2


def _weight(node: Any) -> float:
    """How many characters a grammar, a regular expression or a JSON schema has when its repetitions are written out."""
    if isinstance(node, dict):
        counts = [node[key] for key in _COUNTS if isinstance(node.get(key), (int, float))]
        return max([1, *counts]) * (1 + sum(map(_weight, node.values())))
    if isinstance(node, list):
        return 1 + sum(map(_weight, node))
    return _text_weight(node) if isinstance(node, str) else 1


def _text_weight(text: str) -> float:
    groups: list[float] = [0.0]  # weights of the open brackets, the whole text's first
    last = 0.0  # of what a following {m,n} repeats
    for word in _WORD.findall(text):
        if word == "(":
            groups.append(0.0)
            continue
        if word == ")" and len(groups) > 1:
            last = groups.pop()
        elif counts := _COUNTED.fullmatch(word):
            times = max(int(count) for count in ("1", *counts.groups()) if count)
            last *= max(times - 1, 0)
        else:
            last = 1.0
        groups[-1] += last
        if word[0] == "{":
            last = groups[-1]
    return sum(groups)
