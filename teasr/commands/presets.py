"""`teasr presets`: list the configs that come with teasr, or print one."""

from __future__ import annotations

import argparse
import difflib
import sys

from teasr.config import presets
from teasr.util import command_line

SUMMARY = "list the configs that come with teasr, or print one"
EXAMPLES = """examples:
  {prog}                                  all of them, each with its purpose
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
    try:
        print(_list() if options.action == "list" else _show(options.name), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _list() -> str:
    lines = []
    for folder, what in presets.KINDS.items():
        found = presets.names(folder)
        width = max(map(len, found))
        lines += [f"{what[0].upper()}{what[1:]}:"]
        lines += [f"  {name:{width}}  {presets.summary(path)}" for name, path in found.items()] + [""]
    return "\n".join(lines)


def _show(name: str) -> str:
    known = {n: path for folder in presets.KINDS for n, path in presets.names(folder).items()}
    plain = name.removesuffix(".yaml").removesuffix(".json")
    if plain not in known:
        near = difflib.get_close_matches(plain, known, 1)
        raise ValueError(f"no preset {name}: {f'did you mean {near[0]}? ' if near else ''}`teasr presets` lists them")
    return known[plain].read_text(encoding="utf-8")
