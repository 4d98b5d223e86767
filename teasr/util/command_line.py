"""What the parsers of all verbs have in common, and help texts that several of them show."""

from __future__ import annotations

import argparse

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
