"""Plan a shard set: its config, the crops of every photograph, and their distribution over shards.

A plan is a pure function of the config, of the results of inspecting the photographs, and of their captions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from teasr import degradation
from teasr.config.limits import SEED
from teasr.data.layout import DEFAULT_SCALE, FORMAT, SCALES, shard_name
from teasr.data.prep import lossless
from teasr.data.prep.caption_files import with_captions
from teasr.data.prep.sources import Photo
from teasr.util.seed import seed_of

# Minimum number of chunks in a full shard. A chunk holds crops of one photo, which is then decoded only once; many
# chunks per shard mix many photos.
CHUNKS_A_SHARD = 256


@dataclass(frozen=True)
class PrepConfig:
    """Config of a shard set: photographs, crops and degradation."""

    photos: str  # folder, searched recursively; in a paired set the HQ images
    out: str  # folder of the shard set
    lq: str | None = None  # paired set: folder of real LQ images named like those in `photos`; no degradation
    scale: int = 4  # HQ is this many times as large as LQ: 1, 2, 3 or 4; 1 trains restoration without upscaling
    degradation: str = "osediff"
    peer_exact: bool = False  # use the operators that reproduce public code
    crop_px: Annotated[int, "[1, inf)"] = 512
    layout: Literal["random", "grid"] = "random"  # grid: adjacent crops without overlap, for held-out sets
    crops_per_photo: Annotated[int, "[1, inf)"] = 1  # for the random layout
    # random places for each crop, of which the one with the most fine detail is taken; flat crops teach little
    candidates: Annotated[int, "[1, inf)"] = 1
    scales: tuple[float, ...] = (1.0,)  # resize factors of the photo, used in turn; small ones show more structure
    variants: Annotated[int, "[1, inf)"] = 1  # degraded versions of every crop, stored with one HQ
    hq_format: Literal["png", "webp-lossless", "jpeg98"] = "png"
    keep_jpeg: bool = True  # with jpeg98: crop JPEG photographs losslessly, aligned to their block grid
    # Photographs below are skipped as blurred (`Photo.sharpness`; a Gaussian blur of 2 px gives 2 to 7 grey levels).
    min_sharpness: Annotated[float, "[0, inf)"] = 4.0
    # photographs below are skipped as flat (`Photo.contrast`, in grey levels)
    min_contrast: Annotated[float, "[0, inf)"] = 4.0
    # files: each sample gets the text of the file beside its photograph (photo.txt for photo.jpg)
    captions: Literal["none", "files"] = "none"
    caption_default: str | None = None  # caption of photographs without such a file, which are an error otherwise
    shard_samples: Annotated[int, "[1, inf)"] = 2048
    seed: Annotated[int, SEED] = 0
    licences: dict[str, str] = field(default_factory=dict)  # for the data card: sub-folder (or ".") -> licence

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f"scale = {self.scale}: must be one of {', '.join(map(str, SCALES))}")
        if self.lq is None:
            degradation.preset(self.degradation, scale=self.scale)
        if self.crop_px < self.scale or self.crop_px % self.scale:
            n = math.lcm(16, self.scale)
            raise ValueError(
                f"crop_px = {self.crop_px}: must be a positive multiple of scale = {self.scale}, such as "
                f"{max(1, self.crop_px // n) * n}"
            )
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales = {self.scales}: must be resize factors in (0, 1], such as [1.0, 0.5]")
        for name in ("candidates", "crops_per_photo", "shard_samples", "variants"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be >= 1")
        if self.lq is not None and (self.scales != (1.0,) or self.variants != 1):
            raise ValueError(
                "a paired set (lq=FOLDER) has one LQ image per photo, at its own size: do not set scales and variants"
            )
        if self.candidates > 1 and self.layout == "grid":
            raise ValueError(
                f"candidates = {self.candidates}: layout = grid takes every place; set candidates=1, or layout=random"
            )
        if self.caption_default is not None and self.captions == "none":
            raise ValueError(
                f"caption_default = {self.caption_default!r} has no effect without captions: set captions=files too"
            )
        if self.keeps_jpeg:
            lossless.check()

    @property
    def preset(self) -> degradation.Degradation:
        """Config of the degradation."""
        return degradation.preset(self.degradation, self.peer_exact, self.scale)

    @property
    def keeps_jpeg(self) -> bool:
        """Whether JPEG photographs are cropped without decoding; False when the pixels change anyway."""
        return self.hq_format == "jpeg98" and self.keep_jpeg and self.crop_px % 16 == 0 and not self.preset.usm

    def identity(self) -> dict:
        """The config values that, together with its crops, determine the bytes of a shard."""
        names = ("degradation", "peer_exact", "crop_px", "variants", "hq_format", "keep_jpeg", "seed")
        newer = {} if self.scale == DEFAULT_SCALE else {"scale": self.scale}  # sets of older versions stay valid
        newer |= {} if self.candidates == 1 else {"candidates": self.candidates}
        newer |= {} if self.captions == "none" else {"captions": self.captions}
        return {name: getattr(self, name) for name in names} | {"paired": self.lq is not None} | newer


@dataclass(frozen=True)
class Crop:
    """A square of a photograph that is first resized by `scale`; `index` is the number of the crop in its photo.

    `others` are further places (left, top), if the one with the most detail is to be taken.
    """

    photo: Photo
    index: int
    scale: float
    left: int
    top: int
    others: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ShardSpec:
    """Everything needed to write one shard, on any machine that has access to the folders."""

    config: PrepConfig
    shard: int
    crops: tuple[Crop, ...]

    @property
    def path(self) -> Path:
        """Path of the shard."""
        return Path(self.config.out) / shard_name(self.shard)

    @cached_property
    def identity(self) -> str:
        """Hash of everything that determines the bytes of the shard, except library versions."""
        rows = [(c.photo.sha256, c.photo.lq_sha256, c.index, c.scale, c.left, c.top) for c in self.crops]
        rows += [c.photo.caption for c in self.crops] if self.config.captions == "files" else []
        text = json.dumps([FORMAT, self.config.identity(), self.shard, self.config.shard_samples, rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A shard set to be made: its shards, the photographs it uses, and (name, reason) of the skipped ones."""

    config: PrepConfig
    photos: tuple[Photo, ...]
    shards: tuple[ShardSpec, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def samples(self) -> int:
        """Number of samples in the set."""
        return sum(len(spec.crops) for spec in self.shards)


def make_plan(config: PrepConfig, inspected: Iterable[Photo | tuple[str, str]]) -> Plan:
    """Select photographs and place their crops.

    Raises ValueError when no photograph can be used, or when one of those used lacks its caption.
    """
    photos, skipped, seen = [], [], {}
    for row in sorted(inspected, key=lambda row: row.name if isinstance(row, Photo) else row[0]):
        reason = row[1] if isinstance(row, tuple) else _unfit(row, config, seen)
        if reason:
            skipped.append((row[0] if isinstance(row, tuple) else row.name, reason))
        else:
            seen[row.pixels] = row.name
            photos.append(row)
    if not photos:
        name, reason = skipped[0]
        raise ValueError(f"none of the {len(skipped)} images in {config.photos} can be used ({name}: {reason})")
    if config.captions == "files":
        photos = with_captions(photos, Path(config.photos), config.caption_default)
    crops, n = _arrange([_crops(photo, config) for photo in photos], config), config.shard_samples
    shards = [ShardSpec(config, i // n, tuple(crops[i : i + n])) for i in range(0, len(crops), n)]
    return Plan(config, tuple(photos), tuple(shards), tuple(skipped))


def _unfit(photo: Photo, config: PrepConfig, seen: dict[str, str]) -> str:
    """Reason for skipping a photograph, beginning with the kind of problem; empty if it is used."""
    if min(photo.width, photo.height) < config.crop_px:
        return f"too small: {photo.width}x{photo.height} px, the crop is {config.crop_px} px"
    if photo.contrast < config.min_contrast:
        return f"flat: contrast {photo.contrast}, min_contrast is {config.min_contrast}"
    if photo.sharpness < config.min_sharpness:
        return f"blurred: sharpness {photo.sharpness}, min_sharpness is {config.min_sharpness}"
    if photo.pixels in seen:
        return f"duplicate: the same image as {seen[photo.pixels]}"
    return ""


def _crops(photo: Photo, config: PrepConfig) -> list[Crop]:
    """All crops of one photo.

    Scales at which the photo is smaller than a crop are skipped; if none is left, scale 1 is used.
    """
    n, rng = config.crop_px, np.random.default_rng(seed_of(config.seed, photo.sha256, "places"))
    sizes = [(scale, *scaled(photo.width, photo.height, scale)) for scale in config.scales]
    sizes = [size for size in sizes if min(size[1:]) >= n] or [(1.0, photo.width, photo.height)]
    if config.layout == "grid":
        places = [(f, x, y) for f, w, h in sizes for y in range(0, h - n + 1, n) for x in range(0, w - n + 1, n)]
    else:
        chosen = [sizes[j % len(sizes)] for j in range(config.crops_per_photo)]
        chosen = [size for size in chosen for _ in range(config.candidates)]
        places = [(f, int(rng.integers(w - n + 1)), int(rng.integers(h - n + 1))) for f, w, h in chosen]
    step = config.scale if config.lq is not None else photo.mcu_px if config.keeps_jpeg else 0
    if step:
        places = [(f, x // step * step, y // step * step) if f == 1 else (f, x, y) for f, x, y in places]
    k = config.candidates
    others = [tuple(place[1:] for place in places[j + 1 : j + k]) for j in range(0, len(places), k)]
    return [Crop(photo, j, *places[j * k], others=rest) for j, rest in enumerate(others)]


def _arrange(of_photo: list[list[Crop]], config: PrepConfig) -> list[Crop]:
    """Crops in their final order.

    The random layout shuffles chunks of crops of one photo, which are small enough that every shard mixes many photos.
    """
    if config.layout == "grid":
        return [crop for crops in of_photo for crop in crops]
    n = max(1, config.shard_samples // CHUNKS_A_SHARD)
    chunks = [crops[i : i + n] for crops in of_photo for i in range(0, len(crops), n)]
    order = np.random.default_rng(seed_of(config.seed, "order")).permutation(len(chunks))
    return [crop for i in order for crop in chunks[i]]


def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    """Size (width, height) of a photo after resizing by `scale`."""
    return round(width * scale), round(height * scale)


def reasons(plan: Plan) -> dict[str, int]:
    """Number of skipped images by kind of problem."""
    return dict(Counter(reason.split(":")[0] for _, reason in plan.skipped).most_common())
