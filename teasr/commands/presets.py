"""`teasr presets`: list the configs and models that come with teasr, or print a config."""

from __future__ import annotations

import argparse
import difflib

from teasr import assets
from teasr.config import presets
from teasr.util import command_line

SUMMARY = "list the configs and models that come with teasr, or print a config"
EXAMPLES = """examples:
  {prog}                                  all of them, each with its purpose, and the models
  {prog} show tiny_teasr > mine.yaml      a copy to edit
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list", help="default: list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the preset to show").presets = tuple(presets.KINDS)
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr presets") -> int:
    """List or print; returns the exit code: 0 on success, 2 for an error that the message explains."""
    checked = parser(prog)
    options = checked.parse_args(arguments)
    if (options.action == "show") != (options.name is not None):
        checked.error("give a name after `show`, and only there")
    show = options.action == "show"
    return command_line.run("the presets", lambda: print(_show(options.name) if show else _list(), end=""))


def _list() -> str:
    tables = {"models that come with teasr": assets.MODELS}
    for folder, what in presets.KINDS.items():
        tables[what] = {name: presets.summary(path) for name, path in presets.names(folder).items()}
    lines = []
    for what, found in tables.items():
        width = max(map(len, found))
        lines += (
            [f"{what[0].upper()}{what[1:]}:"] + [f"  {name:{width}}  {text}" for name, text in found.items()] + [""]
        )
    return "\n".join(lines)


def _show(name: str) -> str:
    known = {n: path for folder in presets.KINDS for n, path in presets.names(folder).items()}
    plain = name.removesuffix(".yaml").removesuffix(".json")
    if plain not in known:
        near = difflib.get_close_matches(plain, known, 1)
        raise ValueError(f"no preset {name}: {f'did you mean {near[0]}? ' if near else ''}`teasr presets` lists them")
    return known[plain].read_text(encoding="utf-8")
