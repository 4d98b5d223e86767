"""`teasr completion`: print a script with which bash, zsh or fish completes the verbs and options of `teasr`.

The scripts are made from the parsers of all verbs, so they are never out of date.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass

from teasr import cli
from teasr.config import presets
from teasr.util import command_line

SUMMARY = "print a script with which bash, zsh or fish completes the verbs and options of teasr"
EXAMPLES = """examples:
  source <({prog} bash)                                    for this shell; put the line in ~/.bashrc to keep it
  {prog} zsh > ~/.zfunc/_teasr                             a folder of zsh's fpath
  {prog} fish > ~/.config/fish/completions/teasr.fish
"""


@dataclass(frozen=True)
class Option:
    """An option of a verb, or a positional argument (without names), as a shell needs to know it."""

    names: tuple[str, ...]
    values: tuple[str, ...]  # what may follow it, or stand in its place
    files: bool  # files may do so too
    takes_value: bool
    help: str


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr completion") -> int:
    """Print the script; returns the exit code."""
    options = parser(prog).parse_args(arguments)
    print(SCRIPTS[options.shell]({verb: options_of(verb) for verb in cli.VERBS}), end="")
    return 0


def options_of(verb: str) -> list[Option]:
    """Return the options and positional arguments of a verb, from its parser."""
    found = []
    for action in cli.command(verb).parser(f"teasr {verb}")._actions:
        if action.help == argparse.SUPPRESS:
            continue
        values = tuple(map(str, action.choices or ()))
        kinds = getattr(action, "presets", ())
        for folder in (kinds,) if isinstance(kinds, str) else kinds:
            values += tuple(presets.names(folder))
        files = isinstance(kinds, str) or not values
        text = (action.help or "").replace("%%", "%").partition(" (default")[0]
        found.append(Option(tuple(action.option_strings), values, files, action.nargs != 0, text))
    return found


def bash(verbs: dict[str, list[Option]]) -> str:
    """Return the script for bash."""
    cases, values = [], []
    for verb, options in verbs.items():
        words = [name for option in options for name in option.names]
        words += [value for option in options if not option.names for value in option.values]
        cases.append(f"    {verb}) words={shlex.quote(' '.join(words))} ;;")
        for option in options:
            if option.names and option.takes_value:
                patterns = "|".join(f"{verb}:{name}" for name in option.names)
                values.append(f"    {patterns}) words={shlex.quote(' '.join(option.values))} ;;")
    return f"""# completion of teasr for bash, made by `teasr completion bash`
_teasr() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    words={shlex.quote(" ".join([*verbs, "--help", "--version"]))}
  else
    case ${{COMP_WORDS[1]}} in
{_indented(cases)}
    esac
    case ${{COMP_WORDS[1]}}:$before in
{_indented(values)}
    esac
  fi
  local IFS=$' \\t\\n'
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _teasr teasr
"""


def zsh(verbs: dict[str, list[Option]]) -> str:
    """Return the script for zsh."""
    cases = []
    for verb, options in verbs.items():
        places = [option for option in options if not option.names]
        values = tuple(value for option in places for value in option.values)
        lines = [f"*: :{_zsh_values(values, any(option.files for option in places))}"] if places else []
        for option in options:
            after = f": :{_zsh_values(option.values, option.files)}" if option.takes_value else ""
            lines += [f"{name}[{_zsh_text(option.help)}]{after}" for name in option.names]
        cases.append(f"    {verb}) _arguments {shlex.join(lines)} ;;")
    described = " ".join(shlex.quote(f"{verb}:{_zsh_text(cli.VERBS[verb][1])}") for verb in verbs)
    return f"""#compdef teasr
# completion of teasr for zsh, made by `teasr completion zsh`
_teasr() {{
  local -a verbs
  verbs=({described})
  if (( CURRENT == 2 )); then
    _describe verb verbs
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{_indented(cases, 0)}
  esac
}}
if [ "$funcstack[1]" = _teasr ]; then
  _teasr "$@"
else
  compdef _teasr teasr
fi
"""


def fish(verbs: dict[str, list[Option]]) -> str:
    """Return the script for fish."""
    lines = ["# completion of teasr for fish, made by `teasr completion fish`"]
    for verb in verbs:
        text = _fish_quote(cli.VERBS[verb][1])
        lines.append(f"complete -c teasr -f -n __fish_use_subcommand -a {verb} -d {text}")
    for verb, options in verbs.items():
        condition = f"-n '__fish_seen_subcommand_from {verb}'"
        for option in options:
            values = f" -a {_fish_quote(' '.join(option.values))}" if option.values else ""
            values = values if option.files else f" -f{values}"
            if not option.names:
                if option.values:
                    lines.append(f"complete -c teasr {condition}{values}")
                continue
            flags = "".join(f" -l {n[2:]}" if n.startswith("--") else f" -s {n[1:]}" for n in option.names)
            value = (" -r" + values) if option.takes_value else ""
            lines.append(f"complete -c teasr {condition}{flags}{value} -d {_fish_quote(option.help)}")
    return "\n".join(lines) + "\n"


def _indented(lines: list[str], by: int = 2) -> str:
    return "\n".join(" " * by + line for line in lines)


def _zsh_text(text: str) -> str:
    for character in "\\[]:":
        text = text.replace(character, "\\" + character)
    return text


def _zsh_values(values: tuple[str, ...], files: bool) -> str:
    """Return the action of `_arguments` that completes one of these values, or a file."""
    if values and files:
        return f"{{compadd {' '.join(values)}; _files}}"
    return f"({' '.join(values)})" if values else "_files"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
