"""Schemas in requests: what replies are not held to is refused, by xgrammar's own grammars; what is kept passes."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any, Literal

import pydantic
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from audio_llm.errors import AudioLLMError
from audio_llm.serving import checks
from tests.serving.test_guard import FACTS, chat

pytestmark = pytest.mark.vllm

# What xgrammar reads over with no more than a line in the server's log: replies would not be held to it.
OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "boolean"}}}
UNKEPT = {
    "not": ({"not": {"type": "null"}}, "'not'"),
    "if": ({"if": {"type": "string"}, "then": {"minLength": 3}}, "'if'"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {}}}, "'dependentSchemas'"),
    "$dynamicRef": ({"$dynamicRef": "#"}, "'$dynamicRef'"),
    "multipleOf": ({"multipleOf": 3}, "'multipleOf'"),
    "contains": ({"contains": {"type": "integer"}}, "'contains'"),
    "uniqueItems": ({"items": {}, "uniqueItems": True}, "'uniqueItems'"),
    "another file": ({"$ref": "other.json"}, "$ref: expected a part of the same schema"),
    "an address": ({"$ref": "http://127.0.0.1:1/x"}, "$ref: expected a part of the same schema"),
    "an anchor": ({"$ref": "#name"}, "$ref: expected a part of the same schema"),
    "no pointer": ({"$ref": "#/"}, "$ref: expected a part of the same schema"),
    "several": ({"allOf": [{"type": "integer"}, {"minimum": 5}]}, "allOf: expected one schema"),
    "none": ({"anyOf": []}, "anyOf: expected at least one schema"),
    "required of none": ({"type": "object", "required": ["a"]}, "required: expected names of its `properties`"),
    "required of others": ({**OBJECT, "required": ["b"]}, "found 'b'. Describe it there"),
    "required of patterns": ({"patternProperties": {"^a$": {}}, "required": ["a"]}, "required: expected names"),
    "required in a part": ({"anyOf": [{"required": ["a"]}]}, "required: expected names"),
    "beside allOf": ({**OBJECT, "allOf": [{}]}, "beside allOf: expected nothing that binds, found 'type'"),
    "beside anyOf": (
        {"anyOf": [{"type": "integer"}], "maximum": 5},
        "found 'maximum', which vLLM passes over",
    ),
    "another type": (
        {"type": "string", "anyOf": [{"type": "integer"}]},
        "beside anyOf: expected nothing that",
    ),
    "beside $ref": ({"$ref": "#/$defs/a", "maximum": 5, "$defs": {"a": {"type": "integer"}}}, "beside $ref: expected"),
    "beside const": ({"const": 9, "maximum": 8}, "passes over there. Leave out the values"),
    "values of another type": ({"enum": ["a", 1], "type": ["integer", "null"]}, "beside enum: expected nothing that"),
    "beside oneOf": ({"oneOf": [{"type": "integer"}], "enum": [1]}, "beside oneOf: expected nothing that binds"),
}
PLACES: dict[str, Any] = {
    "at the top": lambda schema: schema,
    "in a property": lambda schema: {"type": "object", "properties": {"not": schema}},
    "in a part": lambda schema: {"$ref": "#/$defs/a", "$defs": {"a": schema}},
    "in an entry": lambda schema: {"type": "array", "items": {"anyOf": [{"type": "null"}, schema]}},
}
WAYS: dict[str, Any] = {
    "json": lambda schema: {"structured_outputs": {"json": schema}},
    "text": lambda schema: {"structured_outputs": {"json": json.dumps(schema)}},
    "response_format": lambda schema: {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    },
    "structural_tag": lambda schema: {
        "structured_outputs": {"structural_tag": json.dumps({"format": {"type": "json_schema", "json_schema": schema}})}
    },
    "structures": lambda schema: {
        "response_format": {"type": "structural_tag", "structures": [{"begin": "a", "schema": schema, "end": "b"}]}
    },
    "tools": lambda schema: {"tools": [{"function": {"name": "f", "parameters": schema}}], "tool_choice": "required"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", UNKEPT)
def test_schemas_that_replies_are_not_held_to_are_refused(case: str, way: str) -> None:
    schema, reason = UNKEPT[case]
    for place in PLACES.values():
        with pytest.raises(AudioLLMError) as refused:
            checks.check_chat(chat(**WAYS[way](place(schema))), FACTS)
        assert reason in str(refused.value)


def test_what_is_refused_is_what_xgrammar_reads_over() -> None:
    """Each keyword does as much as one that nobody knows; one that xgrammar learns need not be refused any more."""
    from xgrammar import Grammar

    bases = ({}, {"type": "object"}, {"type": "array", "items": {}}, {"type": "string"}, {"type": "number"})
    keywords = {"dependencies": {"a": ["b"]}, "$recursiveRef": "#", "multipleOf": 3, "uniqueItems": True}
    keywords |= {name: schema[name] for name, (schema, _) in UNKEPT.items() if name in schema}
    assert set(keywords) == {*checks._UNKEPT, *checks._UNKEPT_COUNTS}
    for keyword, value in keywords.items():
        for base in bases:
            unknown, known = ({**base, "x-nothing": 1}, {**base, keyword: value})
            assert str(Grammar.from_json_schema(unknown)) == str(Grammar.from_json_schema(known)), (keyword, base)


@pytest.mark.parametrize(
    ("whole", "beside"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, {"maximum": 5, "enum": [5], "type": "string"}),
        *(({key: [{"type": "integer"}]}, {"maximum": 5, "type": "string"}) for key in ("anyOf", "oneOf", "allOf")),
        ({"const": 9}, {"maximum": 8, "type": "string"}),
        ({"enum": [7, 9]}, {"maximum": 8, "type": "string"}),
    ],
    ids=lambda schema: next(iter(schema)),
)
def test_what_binds_beside_a_whole_schema_is_read_over(whole: dict[str, Any], beside: dict[str, Any]) -> None:
    """Each of these as much as one that nobody knows: xgrammar has one grammar with it and without."""
    from xgrammar import Grammar

    checks._check_schema(whole, "schema")
    for key, value in beside.items():
        assert str(Grammar.from_json_schema(whole)) == str(Grammar.from_json_schema({**whole, key: value})), key
        with pytest.raises(AudioLLMError, match="nothing that binds"):
            checks._check_schema({**whole, key: value}, "schema")


def test_what_pydantic_writes_passes() -> None:
    """The schemas that clients send most: options, unions, references, values of an enumeration, notes."""

    class Side(enum.Enum):
        LEFT = "left"
        RIGHT = "right"

    class Event(pydantic.BaseModel):
        kind: Literal["event"] = "event"
        side: Side | None = pydantic.Field(None, description="where")
        metres: float = pydantic.Field(gt=0)

    class Noise(pydantic.BaseModel):
        kind: Literal["noise"] = "noise"

    class Scene(pydantic.BaseModel):
        """All that is heard."""

        heard: list[Annotated[Event | Noise, pydantic.Field(discriminator="kind")]]
        first: Event
        count: int | None = pydantic.Field(None, ge=0)
        sides: dict[str, Side] = {}

    checks.check_chat(chat(structured_outputs={"json": Scene.model_json_schema()}), FACTS)


NAMED = {"type": "object", "properties": {"is": {"const": "a"}, "n": {"type": "integer"}}, "required": ["is"]}
OTHER = {"type": "object", "properties": {"is": {"enum": ["b", "c"]}}, "required": ["is"]}
CLOSED = {"type": "object", "properties": {"n": {}}, "additionalProperties": False}
# Two schemas, and whether that no value fits both can be seen.
BRANCHES: list[tuple[Any, Any, bool]] = [
    ({"type": "integer"}, {"type": "string"}, True),
    ({"type": "integer"}, {"type": "number"}, False),
    ({"type": ["null", "string"]}, {"type": ["boolean", "array"]}, True),
    ({"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}, False),
    ({"const": 1}, {"const": True}, True),
    ({"const": 1}, {"enum": [2, 1.0]}, False),
    ({"const": "a"}, {"type": "integer"}, True),
    ({"const": 3}, {"type": "number"}, False),
    ({"const": "a"}, {}, False),
    ({}, {"type": "null"}, False),
    (NAMED, OTHER, True),
    (NAMED, {**OTHER, "required": []}, False),
    (NAMED, CLOSED, True),
    (NAMED, {**CLOSED, "patternProperties": {"^i": {}}}, False),
    ({"properties": {"is": {"const": "a"}}, "required": ["is"]}, OTHER, False),  # fits what is no object
    ({"$ref": "#/$defs/a"}, OTHER, True),
    ({"$ref": "#/$defs/me"}, {"$ref": "#/$defs/me"}, False),
    ({"anyOf": [{"type": "integer"}, {"const": "a"}]}, {"const": "b"}, True),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"const": "b"}, False),
]
VALUES = [None, True, 1, 1.0, 2.5, 3, "a", "b", "abc", [], {}, {"is": "a"}, {"is": "b"}, {"is": "a", "n": 1}, {"n": 1}]


@pytest.mark.parametrize(("one", "two", "apart"), BRANCHES)
def test_branches_of_one_of_that_may_overlap_are_refused(one: Any, two: Any, apart: bool, capfd: Any) -> None:
    """xgrammar reads oneOf as anyOf, with a warning where it cannot see that branches are apart; where we hold that
    they are, jsonschema finds no value that fits both, and where we do not, the reply could fit both."""
    jsonschema = pytest.importorskip("jsonschema")
    from xgrammar import Grammar

    schema = {"oneOf": [one, two], "$defs": {"a": NAMED, "me": {"$ref": "#/$defs/me"}}}
    if apart:
        checks.check_chat(chat(structured_outputs={"json": schema}), FACTS)
        fits = [jsonschema.Draft202012Validator(part | {"$defs": schema["$defs"]}) for part in (one, two)]
        assert not [value for value in VALUES if all(each.is_valid(value) for each in fits)]
        return
    for place in PLACES.values():
        with pytest.raises(AudioLLMError, match="oneOf: expected branches of which a value fits one at most"):
            checks._check_grammar({"structured_outputs": {"json": place({"oneOf": [one, two]})}})
    if {"$ref": "#/$defs/me"} not in (one, two):
        Grammar.from_json_schema(schema)
        assert "oneOf with overlapping" in capfd.readouterr().err


def test_a_sound_is_not_echoed() -> None:
    """vLLM repeats the last message as a text, and fails over a sound with status 500."""
    sound = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}, sound]}]
    with pytest.raises(AudioLLMError, match="echo: expected a last message of text alone, found one with a sound"):
        checks.check_chat(chat(messages=messages, echo=True), FACTS)
    checks.check_chat(chat(messages=messages), FACTS)
    checks.check_chat(chat(messages=[*messages, {"role": "assistant", "content": "It is"}], echo=True), FACTS)


@pytest.mark.parametrize("way", WAYS)
def test_schemas_that_are_kept_pass(way: str) -> None:
    schema = {
        "type": "object",
        "description": "if not, multipleOf",
        "properties": {"not": {"$ref": "#/$defs/side"}, "if": {"enum": [{"not": 1}]}, "n": {"type": "integer"}},
        "$defs": {"side": {"enum": ["left", "right"], "default": {"$ref": "nowhere"}}, "allOf": {"type": "null"}},
        "required": ["not", "if"],
        "additionalProperties": {"anyOf": [{"$ref": "#"}, {"allOf": [{"type": "null"}]}], "default": None},
        "uniqueItems": False,
    }
    checks.check_chat(chat(**WAYS[way](schema)), FACTS)


def test_a_tool_that_may_not_be_called_is_words_alone() -> None:
    tools = WAYS["tools"](UNKEPT["not"][0]) | {"tool_choice": "none"}
    checks.check_chat(chat(**tools), FACTS)


@pytest.mark.parametrize(
    "text", ['{"items":' * 5000 + "{}" + "}" * 5000, '{"type":', '{"minItems": 1' + "0" * 400 + "}"]
)
@pytest.mark.parametrize("key", ["json", "structural_tag"])
def test_schemas_in_a_text_are_read_as_bodies_are(key: str, text: str) -> None:
    with pytest.raises(AudioLLMError, match=f"structured_outputs.{key}: expected JSON"):
        checks.check_chat(chat(structured_outputs={key: text}), FACTS)
    with pytest.raises(AudioLLMError, match="repetitions"):
        checks.check_chat(chat(structured_outputs={"json": json.dumps({"type": "array", "minItems": 10**7})}), FACTS)
