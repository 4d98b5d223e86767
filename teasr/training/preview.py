"""Previews: a few fixed images restored at intervals during a run, as a comparison sheet with scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from teasr.backbones.model import Model
from teasr.config.settings import PreviewConfig
from teasr.data.shards import Sample, ShardSet, decode_near, read_shard
from teasr.data.stream import check_scale
from teasr.imaging import images
from teasr.imaging.exact_metrics import psnr, ssim
from teasr.methods.sampler import Sampler, restore
from teasr.util.seed import seed_of

SCORES = {"psnr_y": psnr, "ssim_y": ssim}


class Preview:
    """The preview images and how they are restored.

    Every rank restores all of them, because a network partitioned by ZeRO-3 needs all ranks for each forward pass.
    """

    def __init__(self, config: PreviewConfig, training: ShardSet, seed: int):
        """Read the images, spread evenly over the shards.

        Raises ValueError when none can be read, or when their sizes differ or their scale is not that of the training.
        """
        shards = ShardSet.open(config.shards) if config.shards else training
        check_scale(shards, training.scale, "preview.shards")
        self.config, self.seed, self.scale = config, seed, shards.scale
        self.datasets = shards.datasets() if config.shards else []
        self.samples = _spread(shards, config.pictures)
        if len({sample.hq.shape for sample in self.samples}) > 1:
            raise ValueError(
                f"previews need images of one size, but {shards.location} has several: make the shards with crop_px "
                "(`teasr prepare`), or choose other preview.shards"
            )
        # the metric that selects the best checkpoint (higher is better)
        self.score = f"preview/psnr_y_{config.steps[0]}" if config.shards else None

    @classmethod
    def of(cls, config: PreviewConfig, save_every: int, training: ShardSet, seed: int) -> Preview | None:
        """Build the preview of a run, or return None if previews are disabled.

        Raises ValueError when neither the preview interval nor the checkpoint interval is a multiple of the other.
        """
        every = config.every_updates
        if every == 0:
            return None
        if every and max(save_every, every) % min(save_every, every):
            raise ValueError(
                f"preview.every_updates = {every} and train.save_every_updates = {save_every}: one must be a multiple "
                "of the other, so that checkpoints have preview scores"
            )
        return cls(config, training, seed)

    def due(self, update: int, saves: bool) -> bool:
        """Whether to make a preview after this update. `saves`: whether a checkpoint is saved after it."""
        every = self.config.every_updates
        return saves if every is None else update % every == 0

    def make(self, model: Model, sampler: Sampler, device: torch.device) -> tuple[bytes, dict[str, float]]:
        """Restore the images; return a comparison sheet as PNG and the mean scores by metric and number of steps.

        The sheet has one row per image: LQ | restored with each number of steps, and the dials that previews show | HQ.
        """
        rows, sums, columns = [], {}, _columns(self.config.steps, sampler)
        for sample in self.samples:
            x_lq = images.to_tensor(sample.lq_up)[None].to(device)
            row = [sample.lq_up]
            for column in columns:
                seed = seed_of(self.seed, "preview", sample.key)
                restored = images.to_uint8(restore(model, sampler, x_lq, column.steps, seed, column.dials)[0])
                row.append(restored)
                for name, metric in SCORES.items():
                    sums.setdefault(f"preview/{name}_{column.name}", []).append(metric(restored, sample.hq))
            rows.append([*row, sample.hq])
        titles = ["LQ" if self.scale == 1 else "LQ (bicubic)", *(column.title for column in columns), "HQ"]
        sheet = images.png_bytes(images.comparison(rows, titles))
        return sheet, {name: float(np.mean(values)) for name, values in sums.items()}


@dataclass(frozen=True)
class _Column:
    """One way of restoring in the sheet; name: end of the names of its scores."""

    title: str
    name: str
    steps: int
    dials: dict[str, float]


def _columns(step_counts: Sequence[int], sampler: Sampler) -> list[_Column]:
    found = []
    for steps in step_counts:
        title = f"{steps} step{'s' * (steps > 1)}"
        found.append(_Column(title, str(steps), steps, {}))
        for dial in sampler.dials:
            for value in dial.previewed if steps == 1 or not dial.one_step else ():
                found.append(_Column(f"{dial.name} {value:g}", f"{steps}_at_{value:g}", steps, {dial.name: value}))
    return found


def _spread(shards: ShardSet, pictures: int) -> list[Sample]:
    """Pick `pictures` samples, evenly spaced over the set. Unreadable samples are replaced by the next readable one."""
    pictures, problem = min(pictures, len(shards)), None
    positions = [round(i * (len(shards) - 1) / max(1, pictures - 1)) for i in range(pictures)]
    samples, first = [], 0
    for url, count in zip(shards.urls, shards.counts, strict=True):
        inside = [position - first for position in positions if first <= position < first + count]
        first += count
        try:
            raw = read_shard(url) if inside else []
            samples += [decode_near(raw, min(position, len(raw) - 1), url, shards.decode) for position in inside]
        except ValueError as error:
            problem = error
    if not samples:
        raise problem
    return samples
