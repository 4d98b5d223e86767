"""Parse YAML strictly into frozen dataclasses; apply dotted overrides; compare configs.

An unknown key is an error that suggests the closest valid key. A number outside the limits of its field, NaN and
infinity are errors too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from teasr.config import limits
from teasr.config.reading import parse_yaml, read_yaml

T = TypeVar("T")


@contextlib.contextmanager
def named(path: Path | str | None, assignments: Sequence[str] = ()) -> Iterator[None]:
    """Context manager that begins a ValueError with where the wrong key was given: file, override or command line."""
    try:
        yield
    except ValueError as error:
        guilty = [text for text in assignments if text.partition("=")[0] in str(error)]
        source = " ".join([f"{path} with", *guilty] if guilty else [str(path)]) if path else "command line"
        raise ValueError(f"{source}: {error}") from None


def load(cls: type[T], path: Path | None, assignments: Sequence[str]) -> T:
    """Build the dataclass `cls` from a YAML file (if any) and `key=value` overrides.

    Raises ValueError that names the file and the key.
    """
    data = override(read_yaml(path) if path else {}, assignments)
    with named(path, assignments):
        return build(cls, data)


def load_with_text(cls: type[T], assignments: Sequence[str], text: str) -> T:
    """Build the dataclass `cls` from `key=value` assignments, of which the one named `text` is plain text.

    It is not parsed as YAML, which would turn an empty text into null. Raises ValueError that names the wrong key.
    """
    texts = [a.removeprefix(f"{text}=") for a in assignments if a.startswith(f"{text}=")]
    data = override({}, [a for a in assignments if not a.startswith(f"{text}=")])
    with named(None):
        return build(cls, data | ({text: texts[-1]} if texts else {}))


def override(data: dict, assignments: Sequence[str]) -> dict:
    """Apply `a.b=value` assignments (the value in YAML) to a copy of nested mappings.

    Raises ValueError for an assignment without a name or `=`, or one that treats a value as a section.
    """
    data = {key: override(value, []) if isinstance(value, dict) else value for key, value in data.items()}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"override {assignment!r} is not of the form section.key=value, such as train.updates=100")
        *sections, key = name.split(".")
        target = data
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ValueError(f"override {assignment!r}: {section} is a value, not a section with keys")
        target[key] = parse_yaml(value, f"override {assignment!r}: the value is not valid YAML")
    return data


def build(cls: type[T], data: Any, where: str = "") -> T:
    """Build the dataclass `cls` from a mapping. `where`: dotted path of `data`, for error messages.

    Raises ValueError for unknown or missing keys and for values of the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the config'} must be a section with keys, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in data:
        if key not in fields:
            raise ValueError(unknown_key(_join(where, key), str(key), list(fields)))
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = [n for n in fields if n in required and n not in data]
    if missing:
        raise ValueError(
            f"config key {_join(where, missing[0])} is missing: add it (type {_type_name(hints[missing[0]])})"
        )
    return cls(**{key: convert(hints[key], value, _join(where, key)) for key, value in data.items()})


def unknown_key(where: str, key: str, allowed: list[str]) -> str:
    """Error message for a key that does not exist."""
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(allowed))}"
    return f"config key {where} does not exist: {hint}"


def convert(hint: Any, value: Any, where: str) -> Any:
    """Check a YAML value against a type hint and convert it. Raises ValueError that names the key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        inner, interval, *reasons = arguments
        value = convert(inner, value, where)
        limits.check(interval, tuple(reasons), value, where)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        wanted = [a for a in arguments if a is not type(None)]
        lists = isinstance(value, list)
        return convert(next((a for a in wanted if (typing.get_origin(a) is tuple) == lists), wanted[0]), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"config key {where} = {value!r}: allowed are {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, list) and arguments[-1] is ... else arguments
        if not isinstance(value, list) or len(kinds) != len(value):
            raise ValueError(f"config key {where} = {value!r}: expected a {_type_name(hint)}")
        return tuple(convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"config key {where} = {value!r}: expected a section with keys")
        return {str(k): convert(arguments[1], v, _join(where, k)) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        value = _float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config key {where} = {value!r}: must be a finite number")
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"config key {where} = {value!r}: expected {_type_name(hint)}")


def _float(value: int | float | str) -> float | str:
    """The number, which YAML parses as a string when written as 1e-4; `value` itself if it is none."""
    try:
        return float(value)
    except ValueError:
        return value
    except OverflowError:  # an integer with more than 308 digits
        return math.inf


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _type_name(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_type_name(parts[0])} {limits.in_words(parts[1])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in parts)
    if origin is tuple:
        count = "" if parts[-1] is ... else f"{len(parts)} "
        return f"list of {count}values of type {_type_name(parts[0])}"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def to_dict(config: Any) -> Any:
    """Convert dataclasses to plain dicts, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return [to_dict(value) for value in config] if isinstance(config, tuple | list) else config


def flatten(data: dict, where: str = "") -> dict[str, Any]:
    """Flatten nested mappings to {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, _join(where, key)) if isinstance(value, dict) else {_join(where, key): value}
    return flat


def diff(old: dict, new: dict) -> list[str]:
    """Differences between two nested mappings as lines `key: old -> new`."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a.get(k, '(none)')} -> {b.get(k, '(none)')}" for k in sorted(a | b) if a.get(k) != b.get(k)]
