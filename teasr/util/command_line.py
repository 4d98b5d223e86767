"""What the parsers of all verbs have in common, and help texts that several of them show."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from teasr.util.optional import needed_for

MODEL_HELP = (
    "folder of a run, a checkpoint or an export; name of a model shipped with teasr; or owner/name of a model on the "
    "Hugging Face hub (default: the shipped model `small`)"
)
DTYPE_HELP = "precision of the weights: fp32, bf16 or fp16; for large models also fp8 or nf4 (default: as trained)"
DEVICE_HELP = "device: cuda, cuda:1, mps or cpu (default: the NVIDIA GPU if there is one, otherwise the CPU)"
OFFLOAD_HELP = "keep the weights in host memory, for a GPU that is too small to hold them"


def parser(prog: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser without options.

    prog: how the program was called; summary: what it does, without a full stop; examples: text below the options, in
    which {prog} stands for the program.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples.replace("{prog}", prog).rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def settings_parser(
    prog: str, summary: str, examples: str, such_as: str, replaces: str = ""
) -> argparse.ArgumentParser:
    """Return a parser of settings `key=value`, which `examples` explains; such_as: two settings, for the help.

    replaces: what of another origin --overwrite replaces; without it there is no such option.
    """
    made = parser(prog, summary, examples)
    made.add_argument("settings", nargs="*", metavar="key=value", help=f"settings listed above, such as {such_as}")
    if replaces:
        made.add_argument(
            "--overwrite",
            action="store_true",
            help=f"replace {replaces} in out=, or write into a folder of other files",
        )
    return made


def run_by_shard(purpose: str, act: Callable[[], int | None]) -> int:
    """Call `act` as `run` does. It writes one shard after another, and skips finished ones when it is called again."""
    return run(
        purpose,
        act,
        stopped="finished shards are kept; run the same command to resume",
        kept="; finished shards are kept; fix the problem and run the same command again",
    )


def run(purpose: str, act: Callable[[], int | None], stopped: str | None = None, kept: str = "") -> int:
    """Call `act` and return its exit code: 2 for an error, which is printed in one line, 130 for Ctrl-C.

    purpose: what a missing package is needed for. stopped: what is printed after Ctrl-C (None: Ctrl-C is passed on).
    kept: what is added to the message when a file cannot be read or written.
    """
    try:
        with needed_for(purpose):
            return act() or 0
    except (OSError, ValueError) as error:
        print(f"error: {error}{kept if isinstance(error, OSError) else ''}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if stopped is None:
            raise
        print(f"\nstopped; {stopped}", file=sys.stderr, flush=True)
        return 130


def quiet_libraries() -> None:
    """Silence the log lines of diffusers and transformers; call it before they are imported."""
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
