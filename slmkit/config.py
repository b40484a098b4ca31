"""Base class of settings: strict validation, dotted overrides, one-line errors.

A settings file is YAML. Every value can be overridden by its dotted key (`train.learning_rate=3e-4`). An unknown key
or a value of the wrong type gives one line that names the key and the nearest known one.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import functools
import inspect
import json
import logging
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import pydantic
import yaml

if typing.TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(pydantic.BaseModel)


class UserError(Exception):
    """An error that the user can resolve: one line that says what was found and what to do (exit code 2)."""


class _OneLineErrors(ModelMetaclass):
    """Makes calls of the class raise `UserError`. Not in `__init__`, which pydantic also calls for nested settings."""

    def __call__(cls, *positional: Any, **values: Any) -> Any:  # noqa: N805 (of a metaclass)
        if positional:
            raise UserError(f"{cls.__name__}: give the values by name, as in name=value")
        try:
            return super().__call__(**values)
        except pydantic.ValidationError as error:
            raise UserError(_first_problem(cls, error, cls.__name__)) from None  # type: ignore[arg-type]


class Settings(pydantic.BaseModel, metaclass=_OneLineErrors):
    """Base of all settings. Unknown keys and invalid values, also on assignment, raise `UserError`."""

    model_config = pydantic.ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())
    hints: ClassVar[Mapping[str, str]] = {}  # key in other libraries → hint for the error message

    @classmethod
    def key_names(cls) -> list[str]:
        """The names of the settings as written in YAML."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except pydantic.ValidationError as error:
            raise UserError(_first_problem(type(self), error, type(self).__name__)) from None


S = TypeVar("S", bound=Settings)
P = ParamSpec("P")
T = TypeVar("T")


def arguments_checked(call: Callable[P, T]) -> Callable[P, T]:
    """Wrap a method so that an unknown keyword argument raises a `UserError` that names the nearest known one."""
    known = [name for name in inspect.signature(call).parameters if name != "self"]

    @functools.wraps(call)
    def checked(*positional: P.args, **named: P.kwargs) -> T:
        for name in named:
            if name not in known:
                owner = positional[0] if isinstance(positional[0], type) else type(positional[0])
                method = "" if call.__name__ in ("__init__", "__call__", "forward") else f".{call.__name__}"
                raise UserError(f"{owner.__name__}{method}: unknown argument {name!r}; {did_you_mean(name, known)}")
        return call(*positional, **named)

    return checked


@functools.cache
def warn_once(line: str) -> None:
    """Log a line once, since a command reads the same file several times."""
    logging.getLogger(__name__).warning(line)


def kind_of_value(value: object) -> str:
    """The kind of a value as error messages name it: nothing, true or false, a whole number, text, a list, …"""
    if value is None:
        return "nothing"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", bytes: "bytes"}
    words |= {list: "a list", tuple: "a list", Mapping: "an object"}
    found = next((word for kind, word in words.items() if isinstance(value, kind)), None)
    return found or f"a value of type {type(value).__name__}"


def spelled(value: object) -> str:
    """A value as error messages show it: its `repr`, except for nothing, true and false."""
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def one_line(error: BaseException) -> str:
    """The message of a library's error, in one line."""
    return " ".join(str(error).split())


def methods_checked(owner: type[T]) -> type[T]:
    """Apply `arguments_checked` to all public methods of a class, except those with `**kwargs`."""
    for name, method in list(vars(owner).items()):
        call = method.__func__ if isinstance(method, classmethod) else method
        if not inspect.isfunction(call) or (name.startswith("_") and name not in ("__init__", "__call__")):
            continue
        if inspect.Parameter.VAR_KEYWORD not in {one.kind for one in inspect.signature(call).parameters.values()}:
            checked = arguments_checked(call)
            setattr(owner, name, classmethod(checked) if isinstance(method, classmethod) else checked)
    return owner


def did_you_mean(word: str, choices: Iterable[str], hints: Mapping[str, str] | None = None) -> str:
    """The entry of `hints` if any, else `did you mean 'x'?` if a choice is similar, else the list of choices."""
    choices, hint = list(choices), (hints or {}).get(word.lower().replace("-", "_"))
    if hint is not None:
        key, _, note = hint.partition(" ")
        return f"did you mean {key!r}?{f' {note}' if note else ''}"
    near = difflib.get_close_matches(word[:100], choices, n=1, cutoff=0.6)  # takes seconds for a word of a megabyte
    if near:
        return f"did you mean {near[0]!r}?"
    return "known: " + ", ".join(sorted(choices))


@contextlib.contextmanager
def importing(what: str) -> Iterator[None]:
    """For imports that only an extra brings: where they fail, a `UserError` of `what`, which names the extra."""
    try:
        yield
    except ImportError:
        raise UserError(what) from None


def read_json_object(path: Path, way_out: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError`, with the way out, for a file that has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {kind_of_value(content)}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable {path.name}: {error}{way_out and f'; {way_out}'}") from None
    return content


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `UserError` if the file is missing, unreadable or no mapping."""
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # _Loader is a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else "a list" if isinstance(content, list) else "one value"
        raise UserError(f"{path}: expected `key: value` lines, found {found}")
    return content


def read_table(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of the package, by libyaml where it is there: ten times as fast as `read_yaml`."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def to_yaml(settings: Settings) -> str:
    """All values of `settings`, defaults included, as YAML for `load_settings`."""
    return yaml.safe_dump(settings.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def load_settings(kind: type[S], content: dict[str, Any], overrides: Sequence[str] = (), origin: str = "") -> S:
    """Build `kind` from a mapping and `dotted.key=value` overrides.

    Raises `UserError` for an unknown key (with the nearest known one), a wrong type or a malformed override.
    """
    content = _copy(content)
    for override in overrides:
        _apply(content, override)
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(kind, error, origin)) from None


class _Loader(yaml.SafeLoader):
    """Reads `3e-4` as a number and refuses duplicate keys; PyYAML reads a string and keeps the last value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} is set twice: keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"), list("-+0123456789.")
)


def _copy(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list) else content


def _apply(content: Any, override: str) -> None:
    """Set the value of a dotted key; entries of lists are numbered from 0."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: expected key=value, such as train.learning_rate=3e-4")
    *parents, leaf = key.split(".")
    for name, below in zip(parents, [*parents[1:], leaf]):
        if isinstance(content, dict) and content.get(name) is None:
            content[name] = [] if below.isdecimal() else {}  # a list or a section that was null
        content = content[name if isinstance(content, dict) else _entry(content, name, key)]
        if not isinstance(content, dict | list):
            raise UserError(f"{key}: {name!r} is a single value, so it has no keys below it")
    content[leaf if isinstance(content, dict) else _entry(content, leaf, key)] = value_of(text)


def value_of(text: str) -> Any:
    """The value of an override (the part after `=`), parsed as YAML."""
    try:
        return yaml.load(text, Loader=_Loader) if text else ""
    except yaml.YAMLError:
        return text


def _entry(content: list[Any], name: str, key: str) -> int:
    if not content:
        raise UserError(f"{key}: the list is empty, so it has no entry {name!r}: set the whole list")
    if not name.isdecimal() or int(name) >= len(content):
        raise UserError(f"{key}: {name!r} is not an entry of a list of {len(content)}: number them from 0")
    return int(name)


def _first_problem(kind: type[Settings], error: pydantic.ValidationError, origin: str) -> str:
    # Default factories that depend on an invalid field are not run; that is not a problem of its own.
    problems = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
    # Of the branches of a union, the one that fails furthest inside the value is the one that was meant.
    first = _place(kind, problems[0]["loc"])
    below = [each for each in problems if f"{_place(kind, each['loc'])}.".startswith(f"{first}.")]
    problem = max(below, key=lambda each: len(each["loc"]))
    location = [str(part) for part in problem["loc"]]
    where = f"{origin}: " if origin else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] in ("extra_forbidden", "no_such_attribute"):
        return f"{where}unknown key {'.'.join(location)!r}; {_nearest_key(kind, location)}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return f"{where}{message}{more}"
    place, found = _place(kind, location), problem.get("input")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type") and place in kind.hints:
        near = did_you_mean(place, [], kind.hints)
        return f"{where}{place}: expected keys below it, found {spelled(found)}; {near}{more}"
    same_place = [each for each in problems if _place(kind, each["loc"]) == place]
    expected = list(dict.fromkeys(_expected(kind, place, each) for each in same_place))
    more = f" (and {len(problems) - len(expected)} more)" if len(problems) > len(expected) else ""
    shown = "" if problem["type"] == "missing" or isinstance(found, dict) else f", found {spelled(found)}"
    return f"{where}{place}: {' or '.join(expected).replace(' or expected', ' or')}{shown}{more}"


EXPECTED = {  # prefix of pydantic's error type → expected value
    "missing": "is missing",
    "int": "expected a whole number",
    "float": "expected a number",
    "finite_number": "expected a finite number",
    "bool": "expected true or false",
    "string": "expected text",
    "list": "expected a list, such as [a, b]",
    "dict": "expected keys with values below it",
    "model": "expected keys with values below it",
    "literal_error": "expected {expected}",
    "too_short": "expected {min_length} or more entries",
}
BOUNDS = {"ge": "{} or more", "gt": "more than {}", "le": "up to {}", "lt": "less than {}"}


def _bounds(kind: type[Settings], place: Sequence[str], problem: Any) -> str:
    """The whole range of a number and what its `description` says about it, for the error message."""
    names = [part for part in place if not part.isdigit()]  # without places in lists
    fields = _section(kind, names[:-1]).model_fields
    field = next((field for name, field in fields.items() if names[-1:] == [field.alias or name]), None)
    found = dict(problem.get("ctx", {}))
    for one in _metadata(field):
        found |= {name: getattr(one, name) for name in BOUNDS if hasattr(one, name)}
    words = [words.format(_short(found[name])) for name, words in BOUNDS.items() if name in found]
    note = f" ({field.description})" if field and field.description else ""
    return f"expected {' and '.join(words)}{note}"


def _metadata(annotation: Any) -> Iterator[Any]:
    """The entries of all `Annotated[…]` in an annotation or a field, such as `annotated_types.Ge`."""
    yield from getattr(annotation, "metadata", ())
    yield from getattr(annotation, "__metadata__", ())
    for part in (getattr(annotation, "annotation", None), *typing.get_args(annotation)):
        if part is not None:
            yield from _metadata(part)


def _short(number: float) -> str:
    return "2^63" if number == 2**63 else str(int(number) if number == int(number) else number)


def _expected(kind: type[Settings], place: str, problem: Any) -> str:
    """The expected value, for the error message; messages of our own validators are kept."""
    if problem["type"].startswith(("greater_than", "less_than")):
        return _bounds(kind, place.split("."), problem)
    for prefix in sorted(EXPECTED, key=len, reverse=True):
        if problem["type"].startswith(prefix):
            return EXPECTED[prefix].format_map(collections.defaultdict(str, problem.get("ctx", {})))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}"


def _place(kind: type[Settings], location: Sequence[Any]) -> str:
    """The dotted key of a problem, without pydantic's names of union branches."""
    parts: list[str] = []
    for part in map(str, location):
        if part.isdigit() or not parts or part in fields_at(kind, parts):
            parts.append(part)
    return ".".join(parts)


def _nearest_key(kind: type[Settings], location: Sequence[str]) -> str:
    """The known key most similar to the wrong one, from the same section or any other below `kind`."""
    word, known = location[-1], fields_at(kind, location[:-1])
    hint, section = kind.hints.get(word.lower().replace("-", "_"), ""), ".".join([*location[:-1], ""])
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if (hint.startswith(section) and hint) or (hint and not near):
        return did_you_mean(word, known, kind.hints)
    leaves = {key.rpartition(".")[2]: key for key in reversed(list(_dotted_keys(kind)))}
    if word not in leaves and near:
        return f"did you mean {near[0]!r}?"
    far = difflib.get_close_matches(word, leaves, n=1, cutoff=0.75)
    return f"did you mean {leaves[far[0]]!r}?" if far else did_you_mean(word, known)


def _dotted_keys(kind: type[Settings], above: str = "") -> Iterator[str]:
    """All dotted keys below `kind`; entries of lists have none."""
    for name in kind.key_names():
        yield above + name
        field = kind.model_fields.get(name)
        inner = field and _settings_in(field.annotation)
        if field and inner and typing.get_origin(field.annotation) is not list:
            yield from _dotted_keys(inner, f"{above}{name}.")


def fields_at(kind: type[Settings], location: Sequence[str]) -> list[str]:
    """The names of the settings in the section `location` below `kind`."""
    return _section(kind, location).key_names()


def _section(kind: type[Settings], location: Sequence[str]) -> type[Settings]:
    """The class of the section `location` below `kind`, or of the last section on the way there."""
    for name in location:
        if name.isdigit():  # a place in a list
            continue
        field = kind.model_fields.get(name)
        inner = field and _settings_in(field.annotation)
        if not inner:
            break
        kind = inner
    return kind


def _settings_in(annotation: Any) -> type[Settings] | None:
    """The `Settings` class inside an annotation such as `Optimizer | None` or `list[Optimizer]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        return next((found for part in typing.get_args(annotation) if (found := _settings_in(part))), None)
    return None
