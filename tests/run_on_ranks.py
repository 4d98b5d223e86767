"""Measure properties of a network on two ranks: `run_on_ranks.py recipe.json model-folder`.

The results are printed as JSON on rank 0's last line:
- velocity: largest difference between the velocity under the engine and that of the network alone, with LoRA and with
  adapters disabled, for each ZeRO stage.
- private: bytes of private memory used by loading and partitioning under ZeRO-3, at the end and at the peak, and the
  size of the weights.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import velocity
from peft.tuners.tuners_utils import BaseTunerLayer

from teasr.run_config import parse
from teasr.training.engine import engine_settings, start_engine, start_ranks
from teasr.util.distributed import World, leave


def private_bytes() -> int:
    """Memory private to this process: excludes the pages of mapped files, which all ranks share."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def velocities(network, inputs) -> list[torch.Tensor]:
    """The network's velocities with LoRA and without."""
    found = []
    for on in (True, False):
        for layer in network.net.modules():
            if isinstance(layer, BaseTunerLayer):
                layer._disable_adapters = not on
        with torch.no_grad():
            found.append(velocity(network, *inputs))
    return found


def build(recipe):
    """A network whose LoRA has a non-zero effect."""
    network = recipe.build_backbone()
    for name, p in network.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return network


def settings_of(recipe, stage: int, world: World) -> dict:
    """The config's engine settings at another stage, with every parameter partitioned."""
    settings = engine_settings(recipe.train, world.size)
    zero = {"stage": stage, "reduce_bucket_size": 100_000}
    return settings | {"zero_optimization": zero | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model")
    parser.add_argument("--local_rank", type=int, default=0)
    options = parser.parse_args()
    data = json.loads(options.recipe.read_text())
    recipe, world = parse(data), World.from_environment()
    start_ranks(recipe.train, world)
    generator = torch.Generator().manual_seed(1)
    z, z_lq = (torch.randn(2, 16, 8, 6, generator=generator) for _ in range(2))
    inputs = (z, torch.tensor([1.0, 0.5]), z_lq, torch.tensor([0.0, -0.5]))
    result = {"velocity": {}}
    alone = build(recipe)
    alone.to(world.device)
    wanted = velocities(alone, inputs)
    for stage in (1, 2, 3):
        network = build(recipe)
        start_engine(network, recipe.train, settings_of(recipe, stage, world), world)
        found = velocities(network, inputs)
        result["velocity"][stage] = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3

    data["backbone"] |= {"model": options.model, "dtype": "bf16", "transformer": {}, "vae": {}}
    large, before, most, done = parse(data), private_bytes(), 0, False

    def watch() -> None:
        global most
        while not done:
            most = max(most, private_bytes() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    network = large.build_backbone()
    weights = sum(p.nbytes for name, p in network.net.named_parameters() if "lora_" not in name and "_mod." not in name)
    start_engine(network, large.train, settings_of(large, 3, world), world)
    done = True
    watcher.join()
    result["private"] = {"end": private_bytes() - before, "most": most, "weights": weights}
    gathered = [None] * world.size
    dist.all_gather_object(gathered, result)
    if world.main:
        print(json.dumps(gathered), flush=True)
    dist.barrier()
    leave(0)
