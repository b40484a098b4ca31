"""JSON schemas: what is enforced holds in every walk over the allowed tokens, by `jsonschema`; the rest is refused."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any

import jsonschema
import pytest

from slmkit.generation.constraints import Grammar
from slmkit.generation.json_schema import ANNOTATIONS, FORMATS, KNOWN, PATTERNS
from slmkit.tokenizer import SLMTokenizer
from tests.generation.walks import Bias, accepts, byte_level_tokenizer, refusal, tokenizer_of, walk

OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}
SHORT = {"type": "string", "maxLength": 4}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}

# All of them bounded, so that a walk over the allowed tokens ends.
SCHEMAS: dict[str, dict[str, Any]] = {
    "null": {"type": "null"},
    "types": {"type": ["boolean", "null", "integer"]},
    "string": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": r'^[a-c]{2}\d"\w$'},
    "pattern-in-text": {"type": "string", "pattern": "[xy]", "maxLength": 6},
    "integer": {"type": "integer"},
    "integer-range": {"type": "integer", "minimum": -12, "exclusiveMaximum": 107},
    "integer-multiple": {"type": "integer", "multipleOf": 7},
    "number": {"type": "number"},
    "number-range": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25},
    "number-multiple": {"type": "number", "multipleOf": 0.25, "minimum": 0},
    "const": {"const": {"a\"\\\n": ["é", "\U0001f600", 1.5, None, True, {}]}},
    "enum": {"enum": ["red", "green", 1, None, ["x"], {"a": 2}]},
    "enum-of-type": {"type": "string", "enum": ["red", 1, "green"], "maxLength": 3},
    "array": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [SHORT, DIGIT], "items": False, "minItems": 2},
    "tuple-and-rest": {"type": "array", "prefixItems": [{"type": "null"}], "items": DIGIT, "maxItems": 3},
    "object": OBJECT | {"properties": {"name": SHORT, "age": DIGIT}, "required": ["name", "age"]},
    "optional": OBJECT | {"properties": {"a": SHORT, "b": DIGIT, "c": {"type": "boolean"}}, "required": ["b"]},
    "nested": OBJECT | {"properties": {"in": OBJECT | {"properties": {"x": DIGIT}, "required": ["x"]}}},
    "odd-names": OBJECT | {"properties": {'a"\\é\n': DIGIT, "": SHORT}, "required": ['a"\\é\n', ""]},
    "open-names": {"type": "object", "properties": {"a": DIGIT}, "additionalProperties": False, "required": ["a"]},
    "pattern-names": OBJECT | {"patternProperties": {"^k[0-9]$": DIGIT}, "minProperties": 1, "maxProperties": 3},
    "other-names": {
        "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a", "b"], "maxProperties": 2,
        "additionalProperties": DIGIT,
    },
    "any-of": {"anyOf": [SHORT, DIGIT, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "one-of": {
        "oneOf": [
            OBJECT | {"properties": {"kind": {"const": "a"}, "x": DIGIT}, "required": ["kind", "x"]},
            OBJECT | {"properties": {"kind": {"const": "b"}, "y": SHORT}, "required": ["kind"]},
        ]
    },
    "all-of": {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}, {"pattern": "^[a-z]*$"}]},
    "reference": {"$ref": "#/$defs/p", "$defs": {"p": OBJECT | {"properties": {"x": DIGIT}, "required": ["x"]}}},
    "reference-and-more": {"$ref": "#/$defs/s", "maxLength": 3, "$defs": {"s": {"type": "string", "minLength": 1}}},
    "anchor": {"$ref": "#s", "$defs": {"x": SHORT | {"$anchor": "s"}}},
    "annotated": DIGIT | {"title": "t", "description": "d", "default": 3, "examples": [4], "$comment": "c", "x-y": 1},
    **{name: {"type": "string", "format": name} for name in [*FORMATS, *PATTERNS] if name != "uri"},
}  # fmt: skip


@pytest.fixture(scope="module")
def byte_level() -> SLMTokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory: pytest.TempPathFactory) -> SLMTokenizer:
    return tokenizer_of("gemma-like", tmp_path_factory.mktemp("kinds"))


def check(text: str, schema: dict[str, Any]) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize("kind", ["byte_level", "gemma_like"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_walks_validate(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer, schema = request.getfixturevalue(kind), SCHEMAS[name]
    grammar = Grammar.json_schema(tokenizer, schema)
    for seed in range(8):
        check(walk(grammar, tokenizer, seed), schema)


BIASES: dict[str, Bias] = {
    "white space": lambda token: 20.0 * bool(token) * token.isspace(),
    "digits": lambda token: 20.0 * bool(token) * token.strip(b" ").isdigit(),
    "backslashes": lambda token: 20.0 * bool(token) * (token.strip(b"\\") == b""),
    "zeros": lambda token: 20.0 * bool(token) * (token.strip(b"0") == b"") + 15 * (token == b"."),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_models_that_repeat_themselves_end(name: str, bias: str, byte_level: SLMTokenizer) -> None:
    schema = SCHEMAS[name]
    text = walk(Grammar.json_schema(byte_level, schema), byte_level, 0, BIASES[bias], most=512)
    check(text, schema)


def test_white_space_is_one_space_at_most(byte_level: SLMTokenizer) -> None:
    schema = OBJECT | {"properties": {"a": {"type": "array", "items": DIGIT, "maxItems": 3}}, "required": ["a"]}
    grammar = Grammar.json_schema(byte_level, schema)
    text = walk(grammar, byte_level, 0, BIASES["white space"])
    assert '"a" : [ ' in text
    assert "  " not in text
    assert not text[0].isspace()
    assert not text[-1].isspace()
    compact = walk(grammar, byte_level, 0, lambda token: -40.0 * (b" " in token))
    assert " " not in compact


def test_any_object(byte_level: SLMTokenizer) -> None:
    grammar, ends = Grammar.json_object(byte_level), {b"}": 6.0, b"]": 6.0, b'"': 6.0, b'"}': 6.0}
    for seed in range(20):
        assert isinstance(json.loads(walk(grammar, byte_level, seed, lambda token: ends.get(token, 0.0))), dict)


def test_numbers_are_bounded_unless_the_schema_bounds_them(byte_level: SLMTokenizer) -> None:
    def says(schema: dict[str, Any], text: str) -> bool:
        return accepts(Grammar.json_schema(byte_level, schema), byte_level.encode(text))

    whole, real = {"type": "integer"}, {"type": "number"}
    assert says(whole, "-9007199254740991")
    assert not says(whole, "9007199254740992")
    assert says(whole | {"maximum": 10**18}, str(10**18))
    assert says({"allOf": [whole, {"minimum": 10**17}]}, str(10**17))  # its parts bound it where no part does alone
    assert says(real, "0.123456789")
    assert not says(real, "0.1234567891")
    assert says(real | {"multipleOf": 0.5}, "-2.5")
    assert not says(real | {"multipleOf": 0.5}, "2.25")
    assert says({"enum": [10**20]}, str(10**20))


# Every keyword of the vocabularies of draft 2020-12, and words of older drafts and of OpenAPI, that is not enforced.
REFUSED: dict[str, Any] = {
    "not": {"type": "string"}, "if": {"type": "string"}, "then": {}, "else": {}, "dependentSchemas": {"a": {}},
    "dependentRequired": {"a": ["b"]}, "propertyNames": {"pattern": "a"}, "contains": {"type": "null"},
    "minContains": 1, "maxContains": 1, "uniqueItems": True, "unevaluatedItems": False,
    "unevaluatedProperties": False, "$dynamicRef": "#a", "$dynamicAnchor": "a", "$recursiveRef": "#",
    "$recursiveAnchor": True, "dependencies": {}, "additionalItems": False, "id": "x", "nullable": True, "maxLenght": 3,
}  # fmt: skip


@pytest.mark.parametrize("keyword", REFUSED)
@pytest.mark.parametrize("place", ["root", "property", "items", "branch"])
def test_a_keyword_that_cannot_be_enforced_is_named(keyword: str, place: str, byte_level: SLMTokenizer) -> None:
    part = {keyword: REFUSED[keyword]}
    schema = {
        "root": part, "property": {"properties": {"a": part}}, "items": {"items": part},
        "branch": {"anyOf": [part, {"type": "null"}]},
    }[place]  # fmt: skip
    assert f"{keyword!r} cannot be enforced" in refusal(lambda: Grammar.json_schema(byte_level, schema))


def test_every_keyword_of_the_standard_is_enforced_an_annotation_or_refused() -> None:
    vocabularies = [
        schema.contents
        for uri, schema in jsonschema.Draft202012Validator(True)._resolver._registry.items()
        if "draft/2020-12" in uri
    ]
    words = {word for schema in vocabularies for word in schema.get("properties", {})}
    assert {"prefixItems", "$ref", "contentMediaType", "unevaluatedItems", "not", "title"} <= words
    assert words <= KNOWN | ANNOTATIONS | REFUSED.keys()
    assert not (KNOWN | ANNOTATIONS) & REFUSED.keys()


VALUES: dict[str, tuple[Any, str]] = {
    "no object": ([], "JSON schema: expected an object, found a list"),
    "true": (True, "expected an object, found true or false"),
    "nothing": (None, "expected an object, found nothing"),
    "type": ({"type": "text"}, "Invalid type: text"),
    "format": ({"properties": {"a": {"format": "idn-email"}}}, "#/properties/a: the format 'idn-email' cannot be"),
    "format unknown": ({"type": "string", "format": "unknown"}, "the format 'unknown' cannot be enforced"),
    "format of numbers": ({"type": "integer", "format": "int32"}, "the format 'int32' cannot be enforced"),
    "overlapping": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported"),
    "equal keys": ({"type": "object", "minProperties": 2}, "2 keys cannot be enforced, since keys that are not in"),
    "draft 4": ({"minimum": 3, "exclusiveMinimum": True}, "exclusiveMinimum: expected a number, found true or false"),
    "items of old": ({"items": [{"type": "null"}]}, "#/items: expected an object, found a list"),
    "step": ({"type": "integer", "multipleOf": -2}, "multipleOf: expected a number above 0"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "border": ({"type": "string", "pattern": r"\bfoo"}, "lookarounds not supported"),
    "group": ({"type": "string", "pattern": r"(a)\1"}, "backreferences are not supported"),
    "no pattern": ({"type": "string", "pattern": "["}, "unterminated character set"),
    "classes": ({"type": "string", "pattern": "[[:alpha:]]"}, "libraries differ on"),
    "pattern of names": ({"patternProperties": {"(": {}}}, "missing ), unterminated subpattern"),
    "other names": ({"patternProperties": {"a": {}, "b": {}}}, "not disjoint"),
    "remote": ({"$ref": "http://localhost/x"}, "http://localhost/x"),
    "file": ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
    "missing": ({"$ref": "#/$defs/b"}, "/$defs/b"),
    "none": ({"enum": []}, "Unsatisfiable schema"),
    "impossible": ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength (3) is greater than maxLength (2)"),
    "infinite": ({"const": float("inf")}, "Out of range float values are not JSON compliant"),
    "an object": ({"const": object()}, "not JSON serializable"),
    "options": ({"x-guidance": {"lenient": True}, "not": {}}, "'not' cannot be enforced"),
    "named by a number": ({"patternProperties": 5}, "#/patternProperties: expected an object, found a whole number"),
    "named by a list": ({"items": {"properties": []}}, "#/items/properties: expected an object, found a list"),
    "format of a list": ({"format": []}, "#/format: expected text, found a list"),
    "reference to a number": ({"$ref": 5}, "#/$ref: expected text, found a whole number"),
    "required by a number": ({"type": "array", "required": 5}, "#/required: expected a list, found a whole number"),
    "itself": ({"$ref": "#"}, "a $ref leads back to itself and nowhere else"),
    "itself by name": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "a $ref leads back to itself"),
    "misspelt": ({"minLenght": 1}, "'minLenght' cannot be enforced; did you mean 'minLength'?"),
    "not misspelt": ({"uniqueItems": True}, "'uniqueItems' cannot be enforced; known: $anchor, $defs"),
    "another format": ({"format": "phone"}, "the format 'phone' cannot be enforced; known: date, date-time"),
    "format misspelt": ({"format": "datetime"}, "did you mean 'date-time'?"),
    "huge": ({"enum": [f"value {i}" for i in range(9000)]}, "at most 65,536 are compiled"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_cannot_be_enforced_is_named(name: str, byte_level: SLMTokenizer) -> None:
    schema, said = VALUES[name]
    assert said in refusal(lambda: Grammar.json_schema(byte_level, schema))


def test_deep_schemas_are_refused_and_recursive_ones_are_not(byte_level: SLMTokenizer) -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(2000):
        deep = {"type": "array", "items": deep}
    assert "deeper than 64 schemas" in refusal(lambda: Grammar.json_schema(byte_level, deep))
    circle: dict[str, Any] = {"type": "array"}
    circle["items"] = circle
    assert "deeper than 64 schemas" in refusal(lambda: Grammar.json_schema(byte_level, circle))
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    refusal(lambda: Grammar.json_schema(byte_level, {"const": value}))
    refusal(lambda: Grammar.json_schema(byte_level, {"const": json.loads("[" * 300 + "]" * 300)}))
    node = OBJECT | {"properties": {"v": DIGIT, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    for seed in range(5):
        check(walk(Grammar.json_schema(byte_level, schema), byte_level, seed), schema)


def test_dates_are_those_of_the_calendar() -> None:
    for year in [*range(1, 2500, 7), 1600, 1700, 1900, 2000, 2100, 9999, 9996]:
        for month, day in [(1, 31), (2, 1), (2, 28), (2, 29), (10, 9), (12, 31)]:
            try:
                is_one = bool(date(year, month, day))
            except ValueError:
                is_one = False
            assert bool(re.search(PATTERNS["date"], f"{year:04}-{month:02}-{day:02}")) == is_one, (year, month, day)
    assert not re.search(PATTERNS["date"], "0000-01-01")
    assert re.search(PATTERNS["date-time"], "2024-02-29T23:59:59Z")
    assert not re.search(PATTERNS["date-time"], "2024-02-29T23:59:60Z")
