"""Generated pages of the documentation: every setting of a run with its meaning, and every command with its options.

The meaning of a setting is the comment beside its field, and what the docstring of its class says about it. The
allowed values come from its annotation.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import os
import textwrap
import tokenize
import typing
from types import NoneType, UnionType

from teasr import cli
from teasr.config.limits import in_words

SECTIONS = {  # heading -> how to import its dataclasses: module, class
    "data": ("data.config", "DataConfig"),
    "train": ("config.settings", "TrainConfig"),
    "preview": ("config.settings", "PreviewConfig"),
    "tracking": ("config.settings", "TrackingConfig"),
}
TOP = """# All settings of a training

    teasr train --config tiny_teasr --print        # the whole config of a run, with every default filled in
    teasr train --config tiny_teasr train.updates=100 method.lambda_adv=0.5

A config is a YAML file with a section for each heading below; on the command line, a setting is a dotted key. This
page is generated from the code.

| key | default | allowed | meaning |
|---|---|---|---|
| `run_dir` | required | text | folder of the run |
| `seed` | 0 | whole number >= 0 | of initial weights, noise, times and the order of the data |
| `scale` | {scale} | {scales} | HQ is this many times as large as LQ; 1 is restoration without enlarging |
"""


def settings() -> str:
    """Return the page of all settings, as Markdown."""
    from importlib import import_module

    from teasr.data.layout import DEFAULT_SCALE, SCALES
    from teasr.run_config import BACKBONES, METHODS

    parts = [TOP.format(scale=DEFAULT_SCALE, scales=", ".join(map(str, SCALES)))]
    for section, registry in (("backbone", BACKBONES), ("method", METHODS)):
        for name, load in registry.items():
            parts.append(table(f"{section}, name: {name}", section, load()[0]))
    for section, (module, name) in SECTIONS.items():
        parts.append(table(section, section, getattr(import_module(f"teasr.{module}"), name)))
    return "\n".join(parts)


def commands() -> str:
    """Return the page of all commands, as Markdown."""
    os.environ["COLUMNS"] = "110"  # argparse wraps at it
    parts = ["# All commands\n\nThis page is generated from `--help`.\n"]
    for verb, (_, what) in cli.VERBS.items():
        text = cli.command(verb).parser(f"teasr {verb}").format_help()
        parts.append(f"## teasr {verb}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def table(heading: str, section: str, kind: type) -> str:
    """Return a heading, the docstring of a dataclass, and a table of its fields."""
    said = {key: text for part in reversed(kind.__mro__[:-1]) for key, text in comments(part).items()}
    hints = typing.get_type_hints(kind, include_extras=True)
    rows = [f"## {heading}", "", *_paragraphs(inspect.getdoc(kind)), "", "| key | default | allowed | meaning |"]
    rows.append("|---|---|---|---|")
    for field in dataclasses.fields(kind):
        cells = (f"`{section}.{field.name}`", _default(field), allowed(hints[field.name]), said.get(field.name, ""))
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*rows, ""])


def _paragraphs(doc: str) -> list[str]:
    """Lines of a docstring; a line such as `train: ..` begins a paragraph of its own."""
    lines = []
    for line in doc.splitlines():
        head, colon, _ = line.partition(": ")
        if colon and head.replace(", ", "").replace("_", "").isalnum() and lines and lines[-1]:
            lines.append("")
        lines.append(line)
    return lines


def comments(kind: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: above the field, or at the end of its last line."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {
        token.start[0]: (token.start[1], token.string[1:].strip()) for token in tokens if token.type == tokenize.COMMENT
    }
    said, lines = {}, source.splitlines()
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above, at = [], node.lineno - 1
            while at in found and lines[at - 1].strip().startswith("#"):
                above.insert(0, found[at][1])
                at -= 1
            beside = [found[n][1] for n in range(node.lineno, node.end_lineno + 1) if n in found]
            said[node.target.id] = " ".join(above + beside)
    return said


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    if isinstance(value, dict):
        value = {name: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x for name, x in value.items()}
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value)}`" if value is None or isinstance(value, bool) else f"`{value}`"


def allowed(hint) -> str:
    """Describe in words which values an annotation allows."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [x for x in inner[1:] if isinstance(x, str)]
        return f"{allowed(inner[0])} {', '.join([in_words(limits[0]), *limits[1:]])}" if limits else allowed(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys("`null`" if x is NoneType else allowed(x) for x in inner))
    if origin is tuple:
        return f"list of {allowed(inner[0])}" + (f", {len(inner)} of them" if inner[-1] is not Ellipsis else "")
    if origin is dict:
        return f"mapping of names to {allowed(inner[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
    if dataclasses.is_dataclass(hint):
        return "mapping with " + ", ".join(f"`{field.name}`" for field in dataclasses.fields(hint))
    return names.get(hint, getattr(hint, "__name__", str(hint)))
