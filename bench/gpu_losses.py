"""Print the losses of some updates of a preset on fixed random pictures as JSON; a part of bench/gpu_check.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from teasr import run_config
from teasr.data.batch import Batch
from teasr.training.engine import engine_settings, start_engine, start_ranks
from teasr.training.networks import Networks
from teasr.training.update import Update
from teasr.util.distributed import World


def main() -> None:
    """Train for the number of updates on the command line, which the preset and overrides follow."""
    os.chdir(Path(__file__).resolve().parent.parent)
    updates, preset, *overrides = sys.argv[1:]
    config = run_config.load(
        Path(f"launch/presets/{preset}.yaml"), ["train.batch=8", "train.micro_batch=8", *overrides]
    )
    config = config.with_random_weights()
    world, partitioning = World.from_environment(), engine_settings(config.train, 1)
    start_ranks(config.train, world)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    method = config.build_method()
    method.load()
    method.to(world.device)
    networks = Networks(config, method)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 64, 64, generator=generator) * 2 - 1
    if networks.student.needs_fit:
        networks.student.fit([(p, p) for p in x] * 8)
    engines = {
        place: start_engine(base, config.train, partitioning, world) for place, base in networks.trained_bases.items()
    }
    step = Update(method, networks, engines, config.train, config.seed, world)
    x = x.to(world.device)
    found = [step(i, [Batch(x, x, [""] * 8)], {})["loss"] for i in range(int(updates))]
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
