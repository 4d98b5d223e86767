"""Settings of training and tracking: plain dataclasses, so that reading a config costs no heavy import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation: everything DeepSpeed needs except sharding and offload, which `deepspeed` names."""

    updates: int
    batch: int  # samples of one update, over all ranks
    micro_batch: int  # samples of one forward on one rank
    learning_rate: float
    deepspeed: str = "ds_configs/zero3.json"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_updates: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the network's forward; losses and optimiser stay fp32
    ema: float | None = 0.999
    save_every_updates: int = 500
    keep_checkpoints: int = 2
    on_full_disk: Literal["stop", "continue"] = "stop"  # when a checkpoint cannot be written
    max_hours: float | None = None  # then the update is finished and saved, and the run ends well
    max_skipped: int = 10  # updates in a row that are not finite
    cpu_threads: int | None = None  # of each rank on a machine without GPU; none: cores / ranks

    def __post_init__(self):
        for name in ("updates", "batch", "micro_batch", "save_every_updates", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be >= 1")
        if self.max_hours is not None and self.max_hours <= 0:
            raise ValueError(f"train.max_hours = {self.max_hours}: must be > 0, such as 23.5, or null")
        if self.max_skipped < 0:
            raise ValueError(f"train.max_skipped = {self.max_skipped}: must be >= 0")
        if self.learning_rate <= 0:
            raise ValueError(f"train.learning_rate = {self.learning_rate}: must be > 0, such as 5e-5")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"train.ema = {self.ema}: a decay inside (0, 1) such as 0.999, or null for none")

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one update on each rank; ValueError when the batch does not divide."""
        each = self.micro_batch * world_size
        if self.batch % each:
            raise ValueError(
                f"train.batch = {self.batch} does not divide into {world_size} rank(s) x train.micro_batch = "
                f"{self.micro_batch}: use a batch that is a multiple of {each}, fewer ranks or another micro_batch"
            )
        return self.batch // each

    def rate(self, update: int) -> float:
        """Learning rate of an update (0-based): linear warm-up, then constant or cosine to a twentieth."""
        import math

        warm = min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        if self.schedule == "constant":
            return self.learning_rate * warm
        return self.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * update / self.updates)))


@dataclass(frozen=True)
class PreviewConfig:
    """A fixed handful of pictures restored during the run, before the first update too; one sheet a time, in previews/."""

    every_updates: int | None = None  # null: whenever a checkpoint is saved; 0: never
    pictures: int = 4
    steps: tuple[int, ...] = (1, 4)  # PSNR-Y at the first of them chooses the best checkpoint
    shards: str | None = None  # held-out pairs; null: pictures of the training set, and no best checkpoint

    def __post_init__(self):
        if self.pictures < 1 or not self.steps or min(self.steps) < 1 or (self.every_updates or 0) < 0:
            raise ValueError(
                f"preview.pictures = {self.pictures} and preview.steps = {list(self.steps)} must be >= 1, preview.every_updates = "
                f"{self.every_updates} >= 0 (0 for no previews)"
            )


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside metrics.csv. The environment variable MLFLOW_TRACKING_URI wins over a null `uri`."""

    mlflow: bool = True
    uri: str | None = None  # null: a sqlite file beside the run folders, <run_dir>/../mlflow.db
    experiment: str = "teasr"
    run_name: str | None = None  # null: the name of the run folder
