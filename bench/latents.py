"""Measure an update with and without cached latents, on Qwen-Image's real classes and the VAE's real size.

    python bench/latents.py data/train [--layers 2] [--rounds 5] [--updates 2] [train.batch=4 ..]

All weights are random. The VAE has its published size; the transformer is narrow, with `--layers` blocks, so that the
update fits on a CPU. The share of the encoder is therefore larger than at 20 B parameters: for those, compare two dry
runs (`launch/train.py --dry-run`), with and without data.latents=.. . Latents are cached by data_prep/cache_latents.py,
then two trainers alternate round by round. Reports the largest relative difference of their losses, the median seconds
per update of each, and the median ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from teasr import run_config
from teasr.backbones.qwen_image.vae import QwenCodec
from teasr.data.prep.latents import LatentsConfig, cache_latents
from teasr.training.trainer import Trainer
from teasr.util.tensor_file import pack

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("flow", "cons", "adv", "mse")


def save_model(folder: Path, layers: int) -> None:
    """Save a diffusers model with random weights and a prompt of five tokens."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    torch.manual_seed(0)
    QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=layers, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=64, axes_dims_rope=(16, 24, 24),
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderKLQwenImage().save_pretrained(folder / "vae")
    (folder / "prompt.safetensors").write_bytes(pack({"prompt_embeds": torch.randn(5, 64)}, {"prompt": ""}))


class Run:
    """A trainer whose updates are timed; each call does some more of them."""

    def __init__(self, config: run_config.RunConfig):
        self.trainer = Trainer(config)
        self.trainer.state.save = lambda score=None: None  # a checkpoint is not part of an update

    def __call__(self, updates: int) -> float:
        """Return the mean seconds per update."""
        trainer = self.trainer
        trainer.train = replace(trainer.train, updates=trainer.update + updates)
        trainer.fit()
        return statistics.mean(float(row["update_s"]) for row in self.rows("timing.csv")[-updates:])

    def rows(self, file: str) -> list[dict[str, str]]:
        """Rows of a CSV file of the run."""
        return list(csv.DictReader((self.trainer.run_dir / file).open()))


def main() -> None:
    """Cache the latents, time both trainers in turn, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder of a shard set")
    parser.add_argument("--layers", type=int, default=2, help="number of transformer blocks (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="number of alternating rounds (default: 5)")
    parser.add_argument("--updates", type=int, default=2, help="updates of each trainer per round (default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, such as train.batch=4")
    options = parser.parse_intermixed_args()
    work = Path(tempfile.mkdtemp())
    save_model(work / "model", options.layers)
    model = str(work / "model")
    cached = LatentsConfig(options.shards, model, str(work / "latents"), dtype="fp32")
    cache_latents(cached, QwenCodec.from_pretrained(model, torch.float32), torch.device("cpu"))
    common = [
        f"data.shards={options.shards}", f"backbone.model={model}", f"backbone.prompt={model}/prompt.safetensors",
        "backbone.dtype=fp32", "backbone.lora_rank=16", "method.lambda_lpips=0", "train.batch=1", "train.micro_batch=1",
        "data.streams=1", "preview.every_updates=0", "tracking.mlflow=false", "train.save_every_updates=1000000",
        *options.overrides,
    ]  # fmt: skip
    runs = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name, own in (("encoded", []), ("cached", [f"data.latents={cached.out}"])):
            changes = [*common, f"run_dir={work / name}", *own]
            runs[name] = Run(run_config.load(ROOT / "launch/presets/qwen_teasr.yaml", changes))
            runs[name](1)
        rounds = [{name: run(options.updates) for name, run in runs.items()} for _ in range(options.rounds)]
    rows = zip(*(run.rows("metrics.csv") for run in runs.values()), strict=True)
    gap = max(abs(float(a[n]) / float(b[n]) - 1) for a, b in rows for n in LOSSES if float(b[n]))
    print(f"largest relative difference of a loss: {gap:.1e}")
    for name in runs:
        print(f"{name:10s} {statistics.median(r[name] for r in rounds):8.3f} s / update")
    print(f"cached / encoded: {statistics.median(r['cached'] / r['encoded'] for r in rounds):.3f}")


if __name__ == "__main__":
    main()
