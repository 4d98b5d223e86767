"""Configs of training, previews and tracking as plain dataclasses, so that reading them requires no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Training config: everything that DeepSpeed needs except sharding and offload, which the file `deepspeed` sets."""

    updates: int
    batch: int  # samples per update, over all ranks
    micro_batch: int  # samples per forward pass on one rank
    learning_rate: float
    deepspeed: str = "ds_configs/zero3.json"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_updates: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the forward pass; losses and optimiser stay in fp32
    ema: float | None = 0.999
    save_every_updates: int = 500
    keep_checkpoints: int = 2
    on_full_disk: Literal["stop", "continue"] = "stop"  # what to do when a checkpoint cannot be written
    # time budget: once it is used up, the current update is finished and saved, and the run ends normally
    max_hours: float | None = None
    max_skipped: int = 10  # stop after more consecutive non-finite updates than this
    cpu_threads: int | None = None  # threads per rank on a machine without GPU; null: cores / ranks

    def __post_init__(self):
        for name in ("updates", "batch", "micro_batch", "save_every_updates", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be >= 1")
        if self.max_hours is not None and self.max_hours <= 0:
            raise ValueError(f"train.max_hours = {self.max_hours}: must be > 0, such as 23.5, or null for no limit")
        if self.max_skipped < 0:
            raise ValueError(f"train.max_skipped = {self.max_skipped}: must be >= 0")
        if self.learning_rate <= 0:
            raise ValueError(f"train.learning_rate = {self.learning_rate}: must be > 0, such as 5e-5")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"train.ema = {self.ema}: must be a decay in (0, 1), such as 0.999, or null for no EMA")

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per update on each rank.

        Raises ValueError when `batch` is not a multiple of `micro_batch` x `world_size`.
        """
        samples_per_pass = self.micro_batch * world_size
        if self.batch % samples_per_pass:
            raise ValueError(
                f"train.batch = {self.batch} is not a multiple of {world_size} rank(s) x train.micro_batch = "
                f"{self.micro_batch}: use a batch that is a multiple of {samples_per_pass}, fewer ranks or another "
                "micro_batch"
            )
        return self.batch // samples_per_pass

    def rate(self, update: int) -> float:
        """Learning rate of an update (0-based): linear warm-up, then constant or cosine decay to 5 %."""
        import math

        warm = min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        if self.schedule == "constant":
            return self.learning_rate * warm
        return self.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * update / self.updates)))


@dataclass(frozen=True)
class PreviewConfig:
    """Previews: a few fixed images restored before the first update and at intervals during the run.

    Each preview is a comparison sheet in previews/.
    """

    every_updates: int | None = None  # null: whenever a checkpoint is saved; 0: never
    pictures: int = 4
    steps: tuple[int, ...] = (1, 4)  # sampling steps; PSNR-Y at the first value selects the best checkpoint
    shards: str | None = None  # held-out pairs; null: training pairs, and no best checkpoint is selected

    def __post_init__(self):
        if self.pictures < 1 or not self.steps or min(self.steps) < 1 or (self.every_updates or 0) < 0:
            raise ValueError(
                f"preview.pictures = {self.pictures} and every value of preview.steps = {list(self.steps)} must be "
                f">= 1 and preview.every_updates = {self.every_updates} must be >= 0 (0 for no previews)"
            )


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics are logged in addition to metrics.csv. A null `uri` means MLFLOW_TRACKING_URI if that is set."""

    mlflow: bool = True
    uri: str | None = None  # null and no MLFLOW_TRACKING_URI: the SQLite file <run_dir>/../mlflow.db
    experiment: str = "teasr"
    run_name: str | None = None  # null: the name of the run folder
