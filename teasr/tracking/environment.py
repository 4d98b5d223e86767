"""Source commit and package versions that a run was made with."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path


@functools.cache
def git_commit() -> str:
    """Commit of the source tree, with `+changes` appended when it is not clean; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Name of the processor and the number of its cores that this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def command_line_of_process() -> str:
    """Return what was typed to start this process, without the path of the program."""
    program, arguments = Path(sys.argv[0]), shlex.join(sys.argv[1:])
    if program.match("teasr/cli.py"):
        return f"teasr {arguments}"
    if program.suffix != ".py":
        return f"{program.name} {arguments}"
    here = Path.cwd()
    return f"python {program.relative_to(here) if program.is_relative_to(here) else program} {arguments}"


def environment() -> str:
    """Python version, platform, commit and the version of every installed package, as text."""
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}, key=str.lower)
    head = [f"python {platform.python_version()}", platform.platform(), processor(), f"commit {git_commit()}"]
    return "\n".join([*head, *packages]) + "\n"
