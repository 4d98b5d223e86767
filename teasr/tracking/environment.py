"""Source commit and package versions that a run was made with."""

from __future__ import annotations

import functools
import platform
import subprocess
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


def environment() -> str:
    """Python version, platform, commit and the version of every installed package, as text."""
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}, key=str.lower)
    head = [f"python {platform.python_version()}", platform.platform(), f"commit {git_commit()}"]
    return "\n".join([*head, *packages]) + "\n"
