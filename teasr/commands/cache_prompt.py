"""`teasr cache-prompt`: compute the text embedding of the prompt once, into one file."""

from __future__ import annotations

import argparse

from teasr.util import command_line

SUMMARY = "compute the text embedding of the prompt once, into one file that training and inference read"
EXAMPLES = """examples:
  {prog} model=Qwen/Qwen-Image out=data/train/prompt.safetensors prompt=""
  {prog} model=stabilityai/stable-diffusion-3.5-medium out=data/sd3_prompt.safetensors
  {prog} model=~/models/qwen-image out=prompt.safetensors device=cpu

settings:
  model     local folder of a diffusers model, or its name on the hub; its model_index.json, tokenizers and text
            encoders are read
  out       output file; kept if prompt, model and library versions are unchanged, otherwise computed again
  prompt    everything after prompt= is the text (default: the empty prompt)
  device    auto (a GPU if there is one), cpu, cuda
  dtype     dtype of the text encoder and of the embedding: bf16 (default) or fp32

Exit code 2: an error that the message explains.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    return command_line.settings_parser(prog, SUMMARY, EXAMPLES, "model=Qwen/Qwen-Image out=prompt.safetensors")


def main(arguments: list[str] | None = None, prog: str = "teasr cache-prompt") -> int:
    """Write the embedding file unless it is up to date; returns the exit code."""
    options = parser(prog).parse_intermixed_args(arguments)
    command_line.quiet_libraries()  # errors are reported in one line
    return command_line.run("embedding a prompt", lambda: _cache(options.settings), stopped="nothing was written")


def _cache(settings: list[str]) -> None:
    from teasr.backbones.text_encoders import PromptConfig, cache_prompt
    from teasr.config import strict_yaml

    cache_prompt(strict_yaml.load_with_text(PromptConfig, settings, "prompt"))
