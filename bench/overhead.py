"""Measure what engine, logging and loader add to an update, compared with a bare PyTorch loop of the same passes.

    python bench/overhead.py runs/demo/shards/train [--rounds 5] [--updates 20] [train.batch=8 ..]

All rows run the tiny preset in this process and alternate round by round: the bare loop (batches prepared in advance,
torch's AdamW, clipping), the same loop with the reader, then the trainer with more and more of its features. Reports
the median seconds per update, and the median ratio to the bare loop of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from teasr import run_config
from teasr.backbones.model import Model
from teasr.data.shards import ShardSet
from teasr.data.stream import PairStream, batches
from teasr.methods.base import Progress
from teasr.training.trainer import FIT_PAIRS, Trainer, first_pairs
from teasr.util.randomness import Draws

ROOT = Path(__file__).resolve().parent.parent


class Bare:
    """The update in plain PyTorch. `reader`: take batches from the trainer's reader instead of a fixed list."""

    def __init__(self, settings: run_config.RunConfig, reader: bool):
        torch.set_num_threads(settings.train.cpu_threads or 1)
        self.settings, self.train, self.update = settings, settings.train, 0
        self.backbone, self.method = settings.build_backbone(), settings.build_method()
        shards = ShardSet.open(*settings.data.locations)
        self.backbone.fit(first_pairs(shards, FIT_PAIRS))
        self.parameters = [p for p in self.backbone.net.parameters() if p.requires_grad]
        train = self.train
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        self.data = batches(PairStream(shards, settings.data, settings.seed, 0, 1, 0), train.micro_batch)
        self.held = None if reader else list(islice(self.data, 8))

    def run(self, updates: int) -> float:
        """Return the seconds per update."""
        n = self.train.micro_batch
        micros, started = self.train.batch // n, time.perf_counter()
        for _ in range(updates):
            for i in range(micros):
                batch, _ = next(self.data) if self.held is None else self.held[(self.update + i) % len(self.held)]
                draws = Draws(self.settings.seed, self.update, tuple(range(i * n, (i + 1) * n)))
                progress = Progress(self.update, self.train.updates, i, micros)
                for loss in self.method.losses({"student": Model(self.backbone)}, batch, draws, progress):
                    (loss.value / micros).backward()
                    del loss
            torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.update += 1
        return (time.perf_counter() - started) / updates


class Whole:
    """The trainer; each call of `run` lets `fit` do some more updates."""

    def __init__(self, settings: run_config.RunConfig, zero: str, ema: bool, mlflow: bool, place: Path):
        train = replace(settings.train, deepspeed=str(ROOT / f"ds_configs/{zero}.json"), save_every_updates=10**9)
        train = train if ema else replace(train, ema=None)
        preview, tracking = (
            replace(settings.preview, every_updates=0),
            replace(settings.tracking, mlflow=mlflow, uri=None),
        )
        name = f"{zero}-{ema}-{mlflow}"
        config = replace(settings, train=train, preview=preview, tracking=tracking, run_dir=str(place / name))
        self.trainer = Trainer(config)
        self.trainer.state.save = lambda score=None: None  # a checkpoint is not part of an update

    def run(self, updates: int) -> float:
        """Return the seconds per update, excluding the start and end of the loop and of MLflow."""
        trainer, first = self.trainer, self.trainer.update
        trainer.train = replace(trainer.train, updates=first + updates)
        trainer.fit()
        rows = (trainer.run_dir / "timing.csv").read_text().splitlines()
        column = rows[0].split(",").index("update_s")
        return statistics.mean(float(row.split(",")[column]) for row in rows[-updates:])


def main() -> None:
    """Time all variants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", help="folder of a training shard set")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "launch/presets/tiny_teasr.yaml",
        help="YAML config (default: launch/presets/tiny_teasr.yaml)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; figures are medians (default: 5)")
    parser.add_argument("--updates", type=int, default=20, help="updates of each row per round (default: 20)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="config overrides, such as train.batch=8")
    options = parser.parse_intermixed_args()
    place = Path(tempfile.mkdtemp())
    ramp = "method.ramps={rectify: {start: 0, length: 1, unit: updates}}"  # every row does the same work in every round
    settings = run_config.load(options.config, [f"data.shards={options.shards}", ramp, *options.settings])
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet):
        ways = {
            "bare loop": Bare(settings, reader=False),
            "+ reader": Bare(settings, reader=True),
            "trainer, ZeRO-1, no average": Whole(settings, "zero1", ema=False, mlflow=False, place=place),
            "+ moving average": Whole(settings, "zero1", ema=True, mlflow=False, place=place),
            "+ MLflow": Whole(settings, "zero1", ema=True, mlflow=True, place=place),
            "the same with ZeRO-2": Whole(settings, "zero2", ema=True, mlflow=True, place=place),
            "the same with ZeRO-3": Whole(settings, "zero3", ema=True, mlflow=True, place=place),
        }
        for way in ways.values():
            way.run(5)
        rounds = [{name: way.run(options.updates) for name, way in ways.items()} for _ in range(options.rounds)]
    print(f"{'':30s} s / update   relative to the bare loop")
    for name in ways:
        seconds = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r["bare loop"] for r in rounds)
        print(f"{name:30s} {seconds:10.4f}   {ratio:.3f}")


if __name__ == "__main__":
    main()
