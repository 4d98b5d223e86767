"""Configs of training, previews and tracking as plain dataclasses, so that reading them requires no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

Count = Annotated[int, "[1, inf)"]


@dataclass(frozen=True)
class TrainConfig:
    """Training config: everything that DeepSpeed needs except sharding and offload, which the file `deepspeed` sets."""

    updates: Count  # of the whole run
    batch: Count  # samples per update, over all ranks
    micro_batch: Count  # samples per forward pass on one rank
    learning_rate: Annotated[float, "(0, inf)", "such as 5e-5"]  # of AdamW, after the warm-up
    deepspeed: str = "ds_configs/zero3.json"  # config of DeepSpeed: sharding (ZeRO) and offload
    # a trained model from which the student starts: a folder, or the name of a shipped model; null: initial weights
    start_from: str | None = None
    betas: tuple[Annotated[float, "[0, 1)"], Annotated[float, "[0, 1)"]] = (0.9, 0.99)  # of AdamW
    weight_decay: Annotated[float, "[0, inf)"] = 0.0  # of AdamW
    clip_norm: Annotated[float, "(0, inf)"] = 1.0  # gradients are scaled down to at most this norm
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate; cosine: falls to 5 %
    warmup_updates: Annotated[int, "[0, inf)"] = 0  # the learning rate rises linearly over these
    dtype: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the forward pass; losses and optimiser stay in fp32
    ema: Annotated[float, "(0, 1)", "such as 0.999, or null for no moving average"] | None = 0.999  # of the weights
    save_every_updates: Count = 500  # interval of the checkpoints
    keep_checkpoints: Count = 2  # the newest; the best and the last that is known to be good stay too
    on_full_disk: Literal["stop", "continue"] = "stop"  # what to do when a checkpoint cannot be written
    # time budget: once it is used up, the current update is finished and saved, and the run ends normally
    max_hours: Annotated[float, "(0, inf)", "such as 23.5, or null for no limit"] | None = None
    max_skipped: Annotated[int, "[0, inf)"] = 10  # stop after more consecutive non-finite updates than this
    # threads per rank on a machine without GPU; null: cores / ranks
    cpu_threads: Annotated[int, "[1, 1024]", "or null for as many as there are cores"] | None = None

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

    every_updates: Annotated[int, "[0, inf)"] | None = None  # null: whenever a checkpoint is saved; 0: never
    pictures: Annotated[int, "[1, 10000]"] = 4  # in each preview
    steps: tuple[Annotated[int, "[1, 1000]"], ...] = (
        1,
        4,
    )  # sampling steps; PSNR-Y at the first value selects the best checkpoint
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

    mlflow: bool = True  # whether a run is logged to MLflow
    uri: str | None = None  # null and no MLFLOW_TRACKING_URI: the SQLite file <run_dir>/../mlflow.db
    experiment: str = "teasr"  # in MLflow
    run_name: str | None = None  # null: the name of the run folder
    # the finished model is stored in MLflow too, unless it is larger than this; 0: never
    model_mb: Annotated[float, "[0, inf)", "such as 2000, or 0 to store no model"] = 2000.0
