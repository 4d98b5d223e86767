"""`teasr cache-latents`: encode a shard set with the VAE once; running the same command again resumes."""

from __future__ import annotations

import argparse
import sys

from teasr.util import command_line

SUMMARY = "encode a shard set with the VAE once, into sidecar shards; running the same command again resumes"
EXAMPLES = """examples:
  {prog} shards=data/train vae=Qwen/Qwen-Image
  {prog} shards=data/train vae=~/models/qwen-image device=cuda compute_dtype=bf16 batch=32
  RANK=3 WORLD_SIZE=8 CUDA_VISIBLE_DEVICES=3 {prog} ..                one of 8 GPUs, on any number of machines
  torchrun --nproc_per_node 8 --module teasr.commands.cache_latents ..       8 GPUs of this machine

settings:
  shards         folder of the shard set
  vae            local folder of a diffusers VAE, or of a model with one in vae/; or a model's name on the hub
  out            folder of the latents (default: latents/ inside `shards`)
  augment        none, flip (default) or dihedral: store the latents of 1, 2 or 8 flipped and rotated images, as many
                 as training with that data.augment needs
  device         auto (a GPU if there is one), cpu, cuda
  dtype          dtype of the stored latents: bf16 (default) or fp32
  compute_dtype  dtype of the VAE: fp32 (default) or bf16
  batch          images per batch (default 8)

Train with them by data.latents=data/train/latents. Exit code 2: an error that the message explains.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    return command_line.settings_parser(
        prog, SUMMARY, EXAMPLES, "shards=data/train vae=Qwen/Qwen-Image", "latents of other shards, weights or settings"
    )


def main(arguments: list[str] | None = None, prog: str = "teasr cache-latents") -> int:
    """Write all missing sidecars, then the index; returns the exit code."""
    options = parser(prog).parse_intermixed_args(arguments)
    command_line.quiet_libraries()  # errors are reported in one line
    return command_line.run_by_shard("encoding with a VAE", lambda: _cache(options))


def _cache(options: argparse.Namespace) -> None:
    from teasr.backbones.codecs import load_codec
    from teasr.backbones.text_encoders import pick_device
    from teasr.config import strict_yaml
    from teasr.data.prep import engines
    from teasr.data.prep.latents import DTYPES, LatentsConfig, cache_latents

    config = strict_yaml.load(LatentsConfig, None, options.settings)
    part = engines.split_from_environment()
    device = pick_device(config.device)
    codec = load_codec(config.vae, DTYPES[config.compute_dtype], key="vae").to(device)
    cache_latents(config, codec, device, *part, options.overwrite)


if __name__ == "__main__":
    sys.exit(main(prog="python -m teasr.commands.cache_latents"))
