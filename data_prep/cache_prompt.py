"""Compute the text embedding of the prompt once, into one file that training and inference read.

    python data_prep/cache_prompt.py model=Qwen/Qwen-Image out=data/train/prompt.safetensors prompt=""
    python data_prep/cache_prompt.py model=~/models/qwen-image out=prompt.safetensors device=cpu

    model     local folder of a diffusers Qwen-Image model (text_encoder/ and tokenizer/ are read), or its hub name
    out       output file; kept if prompt, model and library versions are unchanged, otherwise computed again
    prompt    everything after prompt= is the text (default: the empty prompt)
    device    auto (a GPU if there is one), cpu, cuda
    dtype     dtype of the text encoder and of the embedding: bf16 (default) or fp32

Exit code 2: an error that the message explains.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # before import: errors are reported in one line
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "critical")

from teasr.backbones.prompts import PromptConfig, cache_prompt
from teasr.config import strict_yaml as cfg


def main(arguments: list[str] | None = None) -> int:
    """Write the embedding file unless it is up to date; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings listed above, such as model=Qwen/Qwen-Image out=prompt.safetensors",
    )
    options = parser.parse_intermixed_args(arguments)
    # the prompt is plain text and not parsed as YAML, which would turn an empty prompt into null
    texts = [setting.removeprefix("prompt=") for setting in options.settings if setting.startswith("prompt=")]
    others = [setting for setting in options.settings if not setting.startswith("prompt=")]
    try:
        data = cfg.override({}, others) | ({"prompt": texts[-1]} if texts else {})
        with cfg.named(None):
            config = cfg.build(PromptConfig, data)
        cache_prompt(config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
