"""Shared fixtures: single-threaded torch, photographs from scikit-image, a small shard set and a small config."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # environment variables, so that child processes inherit them
os.environ.setdefault("TEASR_METRIC_WEIGHTS", "/nowhere")  # weights in the user's cache must not change a result
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (
    "test_resume.py",
    "test_nodes.py",
    "test_training.py",
    "test_demo.py",
    "test_footprint.py",
    "test_qwen_image.py",
    "test_tiny.py",
    "test_roles.py",
    "test_tracking.py",
    "test_golden.py",
    "test_generic.py",
    "test_sd_unet.py",
    "test_methods.py",
    "test_pairs.py",
    "test_sweeps.py",
)


def pytest_collection_modifyitems(items):
    """Run the longest files first, so that two workers finish at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder with three photographs."""
    import shutil

    import skimage.data

    folder = tmp_path_factory.mktemp("photos")
    for name in ("coffee.png", "chelsea.png", "rocket.jpg"):
        shutil.copyfile(Path(skimage.data.__file__).parent / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def shards(photos, tmp_path_factory) -> Path:
    """A shard set: 48 random crops of 64 px in 4 shards, degraded by the default preset."""
    return make_shards(photos, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A run folder with a checkpoint of a tiny network that was never trained but whose output is not zero."""
    from teasr.run_config import parse
    from teasr.training import checkpoint

    root = tmp_path_factory.mktemp("untrained")
    recipe = parse(small_recipe(root, root / "run"))
    backbone = recipe.build_backbone()
    generator = torch.Generator().manual_seed(0)
    backbone.fit([torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(8)])
    torch.nn.init.normal_(backbone.net.proj_out.weight, 0, 0.05, generator=generator)
    writer = checkpoint.Writer(root / "run/checkpoints", 1)
    weights = {name: p.detach() for name, p in backbone.exported().items()}
    for name in ("weights", "ema"):
        writer.tensors(f"{name}.safetensors", weights)
    writer.tensors("fixed.safetensors", backbone.fixed_state())
    writer.text("config.yaml", recipe.to_yaml())
    writer.text("state.json", json.dumps({"update": 1, "commit": "none"}))
    writer.commit(1)
    assert writer.problem is None
    return root / "run"


def make_shards(photos: Path, out: Path, **settings) -> Path:
    """Make a small shard set and return its folder."""
    from teasr.data.prep.job import make_set
    from teasr.data.prep.plan import PrepConfig

    defaults = {"crop_px": 64, "crops_per_photo": 16, "shard_samples": 12}
    make_set(PrepConfig(photos=str(photos), out=str(out), **(defaults | settings)))
    return out


def small_recipe(shards: Path, run_dir: Path, zero: str = "zero3", **changes) -> dict:
    """A config that trains in seconds, as nested mappings; keys of `changes` are dotted keys with __ for the dots."""
    data = {
        "run_dir": str(run_dir),
        "backbone": {"name": "tiny", "width": 32, "depth": 2, "heads": 2, "lora_rank": 4, "lora_alpha": 4},
        "method": {
            "name": "teasr",
            "lambda_mse": 10.0,
            "lambda_lpips": 0.0,
            "w_cap": 10.0,
            "ramps": {"rectify": {"start": 0, "length": 2}},
        },
        "data": {"shards": str(shards), "streams": 4},
        "train": {
            "updates": 5,
            "batch": 4,
            "micro_batch": 2,
            "learning_rate": 2e-3,
            "ema": 0.9,
            "cpu_threads": 1,
            "deepspeed": str(ROOT / f"ds_configs/{zero}.json"),
        },
        "preview": {"every_updates": 0},
        "tracking": {"mlflow": False},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            data[section][name] = value
        else:
            data[section] = value
    return data


def partitioning(zero: str, folder: Path) -> Path:
    """A copy of a ds_configs file under which even tiny parameters are partitioned, as large ones normally are."""
    settings = json.loads((ROOT / f"ds_configs/{zero}.json").read_text())
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{zero}.json"
    path.write_text(json.dumps(settings))
    return path


def velocity(backbone, z_t, t_cur, z_lq, t_tar) -> torch.Tensor:
    """Call `velocity` of the student on this backbone."""
    from teasr.backbones.model import Condition, Model

    return Model(backbone).velocity(z_t, t_cur, Condition(z_lq, t_tar))
