"""Every allowed pair of backbone and method: one update on random weights reaches everything that is trained."""

import pytest
import torch
from large import CASES, settings

from teasr import registry, run_config
from teasr.data.batch import Batch
from teasr.methods.base import Progress
from teasr.training.networks import Networks
from teasr.training.update import backpropagate

QWEN = {
    "transformer": {
        "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24,
        "axes_dims_rope": [8, 12, 12],
    },
    "vae": {"base_dim": 8, "num_res_blocks": 1},
}  # fmt: skip
LARGE = {"model": "random", "prompt": "random", "null_prompt": "random", "lora_rank": 2, "lora_alpha": 2}
BACKBONES = {
    "tiny": {"width": 32, "depth": 2, "heads": 2, "lora_rank": 2, "train": "lora", "base": "random"},
    "unet": {"noise_widths": [8, 8], "condition_widths": [8, 8], "trunk_width": 8, "trunk_depth": 1, "base": "random"},
    "qwen_image": LARGE | QWEN | {"dtype": "fp32", "modulation_table": None},
} | {name: settings(name, **LARGE) for name in CASES}
METHODS = {
    "coarse": {},
    "d3sr": {"disc_blocks": 1, "lambda_ea_dists": 0.0, "adv_ramp": {"start": 0, "length": 0}},
    "score_distillation": {"lambda_lpips": 0.0},
    "tadsr": {"lambda_lpips": 0.0},
    "teasr": {"lambda_lpips": 0.0},
}
PAIRS = [(backbone, method) for backbone, methods in registry.FITTING.items() for method in methods]


@pytest.mark.parametrize(("backbone", "method"), PAIRS)
def test_one_update(backbone, method):
    own = {"name": backbone} | BACKBONES[backbone]
    if method == "coarse":
        own |= {"train": "trunk", "base": None}
    config = run_config.parse(
        {
            "run_dir": "unused",
            "backbone": own,
            "method": {"name": method} | METHODS[method],
            "data": {"shards": "unused"},
            "train": {"updates": 2, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3},
        }
    )
    built = config.build_method()
    networks = Networks(config, built)
    for base in networks.bases.values():
        base.to(torch.device("cpu"))
    networks.student.fit([(torch.rand(3, 64, 64) * 2 - 1, torch.rand(3, 64, 64) * 2 - 1) for _ in range(8)])
    networks.share_codec()
    x_hq, x_lq = (torch.rand(2, 3, 64, 64) * 2 - 1 for _ in range(2))
    batch = [Batch(x_hq, x_lq, ["a", "b"])] * built.cycle
    logs = backpropagate(built, networks.models, batch, 0, Progress(1, 2), lambda _, value: value.backward())
    assert all(torch.as_tensor(value).isfinite() for value in logs.values())
    for role in networks.trained_roles:
        own = networks.base(role.name).trained(role.name)
        assert own and all(p.grad is not None and p.grad.isfinite().all() for p in own.values()), role.name
