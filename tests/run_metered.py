"""Print the peak memory in bytes that DeepSpeed holds for a network's trained weights: `run_metered.py recipe.json`.

The network is large and the images are small, so that the result covers weights, gradients and optimiser state, not
activations.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import velocity

from teasr.run_config import parse
from teasr.training.ema import Ema
from teasr.training.engine import _cutter, engine_settings, start_ranks
from teasr.util.distributed import World
from teasr.util.meter import Meter

if __name__ == "__main__":
    import deepspeed

    recipe, world = parse(json.loads(Path(sys.argv[1]).read_text())), World.from_environment()
    start_ranks(recipe.train, world)
    settings = engine_settings(recipe.train, 1)
    network = recipe.build_backbone()
    meter = Meter("cpu")
    network.to(world.device)
    table = network.net.transformer.modulation
    meter.ignore(*(p for p in network.net.parameters() if not p.requires_grad), table.image, table.text)
    with meter:
        for p in network.net.parameters():  # allocate them again, so that the meter counts them
            p.data = p.data.clone() if p.requires_grad else p.data
        _cutter(settings)(network.net)
        trained = [p for p in network.net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        engine, *_ = deepspeed.initialize(
            model=network.net, model_parameters=trained, optimizer=optimizer, config=settings, dist_init_required=False
        )
        network.net = engine
        ema = Ema(network.trained("student"), 0.9, world)
        del trained
        z, t = torch.randn(1, 16, 2, 2), torch.ones(1)
        for update in range(3):
            meter.peak = meter.now()
            with engine.coalesce_grad_reduction():
                for _ in range(2):
                    engine.backward(velocity(network, z, t, z, -t).square().mean())
            engine.step()
            ema.update(update)
    print(meter.peak)
