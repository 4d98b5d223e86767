"""Encode a shard set with the VAE once, into sidecar shards; running the same command again resumes.

    python data_prep/cache_latents.py shards=data/train vae=Qwen/Qwen-Image
    python data_prep/cache_latents.py shards=data/train vae=~/models/qwen-image device=cuda compute_dtype=bf16 batch=32
    # one of 8 GPUs, on any number of machines
    RANK=3 WORLD_SIZE=8 CUDA_VISIBLE_DEVICES=3 python data_prep/cache_latents.py ..
    # 8 GPUs of this machine
    torchrun --nproc_per_node 8 data_prep/cache_latents.py ..

    shards         folder of the shard set
    vae            local folder of a Qwen-Image VAE, or of a model with one in vae/; or a model's name on the hub
    out            folder of the latents (default: latents/ inside `shards`)
    augment        none, flip (default) or dihedral: store the latents of 1, 2 or 8 flipped and rotated images, as many
                   as training with that data.augment needs
    device         auto (a GPU if there is one), cpu, cuda
    dtype          dtype of the stored latents: bf16 (default) or fp32
    compute_dtype  dtype of the VAE: fp32 (default) or bf16
    batch          images per batch (default 8)

Train with them by data.latents=data/train/latents.

Exit code 2: an error that the message explains.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # before import: errors are reported in one line
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "critical")

from teasr.backbones.prompts import pick_device
from teasr.backbones.qwen_image.vae import QwenCodec
from teasr.config import strict_yaml as cfg
from teasr.data.prep import engines
from teasr.data.prep.latents import DTYPES, LatentsConfig, cache_latents


def main(arguments: list[str] | None = None) -> int:
    """Write all missing sidecars, then the index; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings listed above, such as shards=data/train vae=Qwen/Qwen-Image",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace latents of other shards, weights or settings in out=, or write into a folder of other files",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        config = cfg.load(LatentsConfig, None, options.settings)
        part = engines.split_from_environment()
        device = pick_device(config.device)
        codec = QwenCodec.from_pretrained(config.vae, DTYPES[config.compute_dtype], key="vae").to(device)
        cache_latents(config, codec, device, *part, options.overwrite)
    except OSError as error:
        print(
            f"error: {error}; finished shards are kept; fix the problem and run the same command again",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; finished shards are kept; run the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
