"""Config of the training data: which shards a run reads, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how they are read."""

    shards: str | tuple[str, ...]  # one or several: folder or URL with index.json, or URL with {name} for the file name
    # shards read in parallel; a multiple of ranks x workers, at most the number of shards
    streams: Annotated[int, "[1, inf)"] = 4
    workers: Annotated[int, "[0, inf)"] = 0  # loader processes per rank; 0 reads in the training process
    # train on random crops of this size from the stored HQ; null: on the whole
    crop_px: Annotated[int, "[1, inf)", "or null for the whole image"] | None = None
    augment: Literal["none", "flip", "dihedral"] = "flip"
    degrade: Literal["stored", "online"] = "stored"  # online: degrade HQ again each time it is read
    degradation: str | None = None  # preset for online degradation; default: the one the shards were made with
    latents: str | tuple[str, ...] | None = None  # cached latents (`teasr cache-latents`), one location per `shards`
    # cached embeddings of the samples' captions (`teasr cache-captions`), one location per `shards`; null: one prompt
    captions: str | tuple[str, ...] | None = None
    # factors on the perceptual losses (LPIPS, DISTS) of the samples, one for each of `shards`; default: 1 for all
    perceptual: tuple[Annotated[float, "[0, inf)"], ...] | None = None
    max_bad_share: Annotated[float, "[0, 1]"] = 0.01  # stop when a larger fraction of the samples is broken

    @property
    def locations(self) -> tuple[str, ...]:
        """`shards` as a tuple, as `ShardSet.open` expects."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards

    def __post_init__(self):
        if not self.locations:
            raise ValueError("data.shards is an empty list: set it to the folder or URL of a shard set")
        if self.perceptual is not None and (len(self.perceptual) != len(self.locations) or min(self.perceptual) < 0):
            raise ValueError(
                f"data.perceptual = {self.perceptual}: must be one number >= 0 for each of the {len(self.locations)} "
                "location(s) of data.shards"
            )
        if self.latents is not None and self.crop_px is not None:
            raise ValueError(
                "data.crop_px cuts images, whose latents are those of the whole: remove one of the two keys"
            )
        if self.latents is not None and self.degrade == "online":
            raise ValueError(
                "data.degrade = online makes new LQ images, whose latents are not cached: set data.degrade=stored, or "
                "remove data.latents"
            )
        if self.degradation is not None:
            from teasr import degradation

            degradation.preset(self.degradation)
            if self.degrade != "online":
                raise ValueError(f"data.degradation = {self.degradation} has no effect: set data.degrade=online too")
