"""Compute the text embedding of the prompt once, into one file that training and inference read.

    python data_prep/cache_prompt.py model=Qwen/Qwen-Image out=data/train/prompt.safetensors prompt=""
    python data_prep/cache_prompt.py model=~/models/qwen-image out=prompt.safetensors device=cpu

    model     local folder of a diffusers Qwen-Image model (text_encoder/ and tokenizer/ are read), or its name on the hub
    out       the file; with the same prompt, model and library versions it is kept, otherwise made again
    prompt    all that follows prompt= is the text (default: the empty prompt)
    device    auto (a GPU if there is one), cpu, cuda
    dtype     bf16 (default) or fp32: of the text encoder and of the embedding

Exit code 2: a mistake that the message explains.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # before they are imported: errors are one line of our own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "critical")

from teasr.backbones.prompts import PromptConfig, cache_prompt
from teasr.config import strict_yaml as cfg


def main(arguments: list[str] | None = None) -> int:
    """Write the prompt's file unless it is there; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see above")
    options = parser.parse_intermixed_args(arguments)
    # a prompt is text, not YAML, in which the empty one would be nothing at all
    texts = [setting.removeprefix("prompt=") for setting in options.settings if setting.startswith("prompt=")]
    others = [setting for setting in options.settings if not setting.startswith("prompt=")]
    try:
        data = cfg.override({}, others) | ({"prompt": texts[-1]} if texts else {})
        cache_prompt(cfg.build(PromptConfig, data))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
