"""Read YAML and JSON strictly: one mapping for each file, no key twice, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LARGEST = 10**6  # characters of a file; /dev/zero never ends


class _Loader(yaml.SafeLoader):
    """YAML without Python objects, keys that are given twice, and values that contain themselves."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:i]):
                problem = f"the key {key.value} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=True)


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML text. Raises ValueError `<what>: problem`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError) as error:  # thousands of brackets, or a date such as 2020-13-01
        raise ValueError(f"{what}: this is not valid YAML ({error})") from None


def read_yaml(path: Path, kind: type = dict) -> Any:
    """Read a YAML file that contains a mapping, or a list with `kind=list`.

    Raises ValueError that names the file and the problem.
    """
    data = parse_yaml(_read(path), f"config {path} cannot be read")
    if not isinstance(data, kind):
        wanted = "`key: value` lines" if kind is dict else "a list"
        raise ValueError(f"config {path} must contain {wanted}, but its content is of type {type(data).__name__}")
    return data


def read_json(path: Path) -> dict:
    """Read a JSON file that contains an object. Raises ValueError that names the file and the problem."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        twice = [key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])]
        if twice:
            raise ValueError(f"the key {twice[0]} is given twice")
        return dict(pairs)

    def not_a_number(text: str) -> None:
        raise ValueError(f"{text} is not a finite number")

    try:
        data = json.loads(_read(path), object_pairs_hook=unique, parse_constant=not_a_number)
    except (RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"config {path} cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"config {path} cannot be used: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f'config {path} must contain {{"key": value}}, but its content is of type {type(data).__name__}'
        )
    return data


def _read(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # also a named pipe, as the shell makes for --config <(..)
            text = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise ValueError(f"config {path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        raise ValueError(f"config {path} cannot be read: {error}") from None
    if len(text) > LARGEST:
        raise ValueError(f"config {path} cannot be read: it has more than {LARGEST} characters")
    return text
