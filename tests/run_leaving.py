"""Updates whose gradients leave block by block, against updates that keep them: `run_leaving.py folder`.

Prints a line of JSON for each case: a hash of the trained weights after all updates, the logged losses and norms, and
the bytes of gradients that existed at most when a block was finished. Some updates are poisoned with NaN pixels.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from conftest import partitioning

from teasr.backbones.memory.sweeps import Sweeps
from teasr.data.batch import Batch
from teasr.run_config import parse
from teasr.training.engine import engine_settings, start_engine, start_ranks
from teasr.training.networks import Networks
from teasr.training.update import Update
from teasr.util.distributed import World

BACKBONE = {
    "name": "qwen_image", "model": "random", "prompt": "random", "lora_rank": 2, "lora_alpha": 2, "dtype": "fp32",
    "swap_blocks": 3,
    "transformer": {
        "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48,
        "axes_dims_rope": [8, 12, 12],
    },
    "vae": {"base_dim": 16, "num_res_blocks": 1},
}  # fmt: skip
SD3 = {  # all of its LoRA is in blocks
    "name": "sd3", "model": "random", "prompt": "random", "lora_rank": 2, "lora_alpha": 2, "dtype": "fp32",
    "transformer": {
        "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
        "caption_projection_dim": 32, "pooled_projection_dim": 20, "in_channels": 4, "out_channels": 4,
        "pos_embed_max_size": 16, "dual_attention_layers": [0],
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1},
}  # fmt: skip
POISONED = {
    "kept": (), "leaving": (), "zero2 poisoned": (1, 3), "kept poisoned": (1, 3), "leaving poisoned": (1, 3),
    "sd3 kept": (1,), "sd3 leaving": (1,),
}  # fmt: skip


def settings(folder: Path, case: str, ranks: int) -> dict:
    """The config of a tiny network in block-major order."""
    zero = json.loads(partitioning("zero2" if "zero2" in case else "zero2_offload", folder).read_text())
    zero["zero_optimization"]["reduce_bucket_size"] = 700  # elements
    (folder / "zero.json").write_text(json.dumps(zero))
    return {
        "run_dir": "unused",
        "backbone": SD3 if "sd3" in case else BACKBONE,
        "method": {"name": "teasr", "order": "blocks", "lambda_lpips": 0.0, "ramps": {}},
        "data": {"shards": "unused"},
        "train": {
            "updates": 5, "batch": 2, "micro_batch": 2 // ranks, "learning_rate": 1e-3, "cpu_threads": 1,
            "deepspeed": str(folder / "zero.json"),
        },
    }  # fmt: skip


def train(folder: Path, case: str) -> dict:
    """Five updates."""
    config = parse(settings(folder, case, WORLD.size))
    start_ranks(config.train, WORLD)
    method = config.build_method()
    networks = Networks(config, method)
    partitioned = engine_settings(config.train, WORLD.size)
    engines = {
        place: start_engine(base, config.train, partitioned, WORLD) for place, base in networks.trained_bases.items()
    }
    (engine,) = engines.values()
    engine.takes_gradients &= "kept" not in case
    (trained,) = (base.trained("student") for base in networks.trained_bases.values())
    alive, visit = [], Sweeps._through

    def through(self, *arguments):
        found = visit(self, *arguments)
        alive.append(sum(x.grad.nbytes for x in trained.values() if x.grad is not None))
        return found

    Sweeps._through = through
    update, logs = Update(method, networks, engines, config.train, 0, WORLD), []
    for n in range(config.train.updates):
        generator = torch.Generator().manual_seed(10 * n + WORLD.rank)
        x = torch.rand(2, config.train.micro_batch, 3, 32, 32, generator=generator) * 2 - 1
        if n in POISONED[case] and WORLD.main:
            x[0, 0, :, :8, :8] = float("nan")
        found = update(n, [Batch(x[0], x[1], [""] * config.train.micro_batch)], {})
        logs.append([found["skipped"], found.get("loss"), found.get("grad_norm")])
    Sweeps._through = visit
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained.values())).hexdigest()
    return {"case": case, "weights": digest, "logs": logs, "alive": max(alive)}


if __name__ == "__main__":
    WORLD = World.from_environment()
    own = Path(sys.argv[-1]) / f"rank-{WORLD.rank}"
    own.mkdir()
    for case in POISONED:
        line = json.dumps(train(own, case))
        if WORLD.main:
            print(line, flush=True)
