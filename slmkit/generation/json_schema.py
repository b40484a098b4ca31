"""What of a JSON schema (draft 2020-12) can be enforced while text is generated; the rest is refused by name.

llguidance enforces most keywords and refuses others. It ignores words that it does not know, the format "unknown", and
what older drafts meant by some keywords; it allows dates that no calendar has, and equal keys in one object.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from slmkit.config import UserError, kind_of_value, one_line

DEEPEST = 64  # schemas within schemas
LARGEST = 2**53 - 1  # whole numbers up to it are exact in every JSON reader (RFC 8259, section 6)
FINEST = 1e-9
# Characters that the counts of a pattern demand. All of a text that must follow is read for each mask: a million
# characters take half a second, for which the other rows wait.
MOST_DEMANDED = 10_000

# Keywords by what they hold: one schema, a list of schemas, schemas by name, or plain values.
ONE = {"items", "additionalProperties"}
LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
NAMED = {"properties", "patternProperties", "$defs", "definitions"}
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
PLAIN = {
    "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems", "maxItems", "minLength",
    "maxLength", "pattern", "format", "$ref", "$id", "$anchor",
}  # fmt: skip
# These accept every document. So does `$schema`: what is not refused means the same in all drafts since 6.
ANNOTATIONS = {
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "discriminator",
}  # fmt: skip
# At most one space between structural tokens: models write `, ` and `: `, and some would never stop at white space.
OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": "[ ]", "lenient": False, "coerce_one_of": False}
KNOWN = ONE | LISTS | NAMED | NUMBERS | PLAIN
TEXTS = {"format", "$ref", "$id", "$anchor"}
NEAR = 0.8  # how similar a misspelt word is: "minLenght" and "minLength", but not "uniqueItems" and "minItems"

# Formats that llguidance knows, with their longest text in characters.
FORMATS = {"duration": 64, "email": 254, "hostname": 253, "ipv4": 15, "ipv6": 45, "uri": 2048, "uuid": 36}
_LEAP = "(?:0[48]|[2468][048]|[13579][26])"  # multiples of four but 0, two digits
_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13-9]|1[0-2])-(?:0[1-9]|[12]\d|30)|(?:0[13578]|1[02])-31|02-(?:0[1-9]|1\d|2[0-8]))"
    rf"|(?:\d\d{_LEAP}|{_LEAP}00)-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
# Formats by a pattern of ours: no 29 February in other years, no year 0, no second 60, which most readers refuse.
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_SET_IN_SET = re.compile(r"\[\^?\]?[^\]]*(?:\[|&&|--|~~)")


def grammar_of_schema(schema: Any, bounded: bool = False) -> str:
    """A grammar for llguidance: the schema as JSON, without annotations, and with patterns in place of some formats.

    `bounded` adds bounds that the schema leaves open: of numbers (`LARGEST`, `FINEST`), of the length of `FORMATS`.
    Raises `UserError`, one line, for what llguidance would ignore, such as a misspelt keyword.
    """
    if not isinstance(schema, Mapping):
        raise UserError(f"JSON schema: expected an object, found {kind_of_value(schema)}")
    content = _copy(schema, "#", bounded) | {"x-guidance": OPTIONS}
    try:
        return json.dumps({"grammars": [{"json_schema": content}]}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"JSON schema: {one_line(error)}") from None


def check_pattern(pattern: Any, what: str) -> None:
    """Raise `UserError` unless `re` compiles the pattern, and it means the same in Rust's `regex`."""
    if not isinstance(pattern, str):
        raise UserError(f"{what}: expected a regular expression, found {kind_of_value(pattern)}")
    if _SET_IN_SET.search(_ESCAPED.sub("", pattern)):
        raise UserError(
            f"{what} {pattern!r:.60}: libraries differ on [, &&, -- and ~~ within [ ]: write \\ before them"
        )
    try:
        re.compile(pattern)
        demanded = _demanded(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{what} {pattern!r:.60}: {one_line(error)}") from None
    if demanded > max(MOST_DEMANDED, len(pattern)):
        raise UserError(f"{what} {pattern!r:.60}: its counts demand {demanded:,} characters: at most {MOST_DEMANDED:,}")


def _demanded(parsed: Any) -> int:
    """How many characters a parsed pattern demands, those of all its alternatives together."""
    total = 0
    for operation, argument in parsed:
        inner = argument[1] if operation is _parser.BRANCH else argument if isinstance(argument, tuple) else ()
        size = sum(_demanded(part) for part in inner if isinstance(part, _parser.SubPattern))
        total += max(size, 1) * (argument[0] if operation in _parser._REPEATCODES else 1)
    return total


def _copy(schema: Any, path: str, bounded: bool, depth: int = 0) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise UserError(f"JSON schema: {path}: expected an object, found {kind_of_value(schema)}")
    if depth > DEEPEST:
        raise UserError(f"JSON schema: {path[:60]}…: deeper than {DEEPEST} schemas: name the inner ones in $defs")
    made: dict[str, Any] = {}
    for keyword, value in schema.items():
        copy = functools.partial(_copy, bounded=bounded, depth=depth + 1)
        where = f"{path}/{keyword}"
        if keyword in ONE:
            made[keyword] = copy(value, where)
        elif keyword in LISTS and isinstance(value, list | tuple):
            made[keyword] = [copy(part, f"{where}/{place}") for place, part in enumerate(value)]
        elif keyword in NAMED and isinstance(value, Mapping):
            made[keyword] = {name: copy(part, f"{where}/{name}") for name, part in value.items()}
        elif keyword in NAMED:
            raise UserError(f"JSON schema: {where}: expected an object, found {kind_of_value(value)}")
        elif keyword in KNOWN:
            made[keyword] = value
        elif keyword not in ANNOTATIONS and not str(keyword).startswith("x-"):
            raise UserError(f"JSON schema: {path}: {keyword!r} cannot be enforced; {_near(str(keyword), KNOWN)}")
    _check_values(made, path)
    name, further = made.get("format"), made.get("allOf", [])
    if name in PATTERNS:
        made |= {"allOf": [*further, {"pattern": PATTERNS[name]}]}
        del made["format"]
    elif bounded and name in FORMATS:
        made |= {"allOf": [*further, {"maxLength": FORMATS[name]}]}
    return made | _bounds_of_numbers(made) if bounded else made


def _near(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=NEAR)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(sorted(known))


def _check_values(schema: dict[str, Any], path: str) -> None:
    """Raise `UserError` for values that llguidance ignores or enforces only in part."""
    for keyword in sorted(schema.keys() & (TEXTS | {"required"})):
        kind, what = (str, "text") if keyword in TEXTS else (list | tuple, "a list")
        if not isinstance(schema[keyword], kind):
            raise UserError(f"JSON schema: {path}/{keyword}: expected {what}, found {kind_of_value(schema[keyword])}")
    if schema.get("format", "date") not in FORMATS | PATTERNS:
        known = _near(schema["format"], FORMATS | PATTERNS)
        raise UserError(f"JSON schema: {path}: the format {schema['format']!r} cannot be enforced; {known}")
    for keyword in NUMBERS & schema.keys():
        if isinstance(schema[keyword], bool):
            raise UserError(f"JSON schema: {path}/{keyword}: expected a number, found true or false")
    if isinstance(step := schema.get("multipleOf"), int | float) and step <= 0:
        raise UserError(f"JSON schema: {path}/multipleOf: expected a number above 0, found {step}")
    required, least = schema.get("required", []), schema.get("minProperties", 0)
    if isinstance(least, int) and isinstance(required, list) and least > max(1, len({*map(str, required)})):
        raise UserError(
            f"JSON schema: {path}/minProperties: {least} keys cannot be enforced, since keys that are not in "
            "`required` may be equal: name them there"
        )
    for pattern in [schema.get("pattern", ""), *schema.get("patternProperties", {})]:
        check_pattern(pattern, f"JSON schema: {path}: the pattern")


def _bounds_of_numbers(schema: dict[str, Any]) -> dict[str, Any]:
    types = schema.get("type")
    kinds = {*types} if isinstance(types, list) else {types}
    if not kinds & {"integer", "number"} or schema.keys() & {"const", "enum"}:
        return {}
    bounds = {} if schema.keys() & {"minimum", "exclusiveMinimum"} else {"minimum": -LARGEST}
    bounds |= {} if schema.keys() & {"maximum", "exclusiveMaximum"} else {"maximum": LARGEST}
    return bounds | ({"multipleOf": schema.get("multipleOf", FINEST)} if "number" in kinds else {})
