"""Photographs to shards: a deterministic plan of crops, and one pure function that writes one shard.

The bytes of a shard depend on the photographs, the settings and the versions of the image libraries alone; it is
written to a temporary file, synced and renamed, and its manifest last. Whatever is interrupted is made again, whatever
has a manifest is kept.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from teasr import config as cfg
from teasr import degradation, images
from teasr.data.shards import FORMAT
from teasr.files import write_atomic
from teasr.randomness import seed_of


@dataclass(frozen=True)
class PrepConfig:
    """What is cut out of which photographs and how it is degraded."""

    photos: str  # folder, searched recursively
    out: str  # folder of the shard set
    degradation: str = "osediff"
    crop_px: int = 512
    layout: Literal["random", "grid"] = "random"  # grid: every whole crop side by side, for held-out sets
    crops_per_photo: int = 1  # of the random layout
    scales: tuple[float, ...] = (1.0,)  # the photo is taken at these sizes in turn; small ones show more structure
    shard_samples: int = 2048
    seed: int = 0

    def __post_init__(self):
        preset = degradation.preset(self.degradation)
        if self.crop_px < preset.scale or self.crop_px % preset.scale:
            raise ValueError(f"crop_px = {self.crop_px}: must be a positive multiple of the scale {preset.scale}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales = {self.scales}: sizes inside (0, 1], such as [1.0, 0.5]")
        for name in ("crops_per_photo", "shard_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be >= 1")

    def identity(self) -> dict:
        """The settings that decide the bytes (not where they come from or go to)."""
        return {k: v for k, v in cfg.to_dict(self).items() if k not in ("photos", "out")}


@dataclass(frozen=True)
class Photo:
    """A source picture: path below the folder, content hash, size upright."""

    name: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Plan:
    """All crops of a shard set in their final order, (photo, index of its crop, scale, left, top)."""

    config: PrepConfig
    photos: tuple[Photo, ...]
    crops: tuple[tuple[int, int, float, int, int], ...]
    skipped: tuple[tuple[str, str], ...]  # (photo, reason)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.crops) // self.config.shard_samples)

    def identity(self, shard: int) -> str:
        """Hash of everything that decides the bytes of a shard, libraries aside."""
        n = self.config.shard_samples
        rows = [(self.photos[p].sha256, *rest) for p, *rest in self.crops[shard * n : (shard + 1) * n]]
        text = json.dumps([FORMAT, self.config.identity(), shard, rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(config: PrepConfig) -> Plan:
    """Look at every photograph once and lay out the crops. ValueError when no photograph can be used."""
    folder = Path(config.photos)
    photos, skipped, seen = [], [], {}
    for path in images.find_pictures(folder):
        name = path.relative_to(folder).as_posix()
        try:
            photo = inspect_photo(path, name)
            if min(photo.width, photo.height) < config.crop_px:
                raise ValueError(f"smaller than the crop: {photo.width}x{photo.height} px")
            if photo.sha256 in seen:
                raise ValueError(f"the same bytes as {seen[photo.sha256]}")
        except ValueError as error:
            skipped.append((name, str(error)))
            continue
        seen[photo.sha256] = name
        photos.append(photo)
    if not photos:
        name, reason = skipped[0]
        raise ValueError(f"none of the {len(skipped)} pictures in {folder} can be used ({name}: {reason})")
    crops = [(i, j, *place) for i, photo in enumerate(photos) for j, place in enumerate(_places(photo, config))]
    if config.layout == "random":
        order = np.random.default_rng(seed_of(config.seed, "order")).permutation(len(crops))
        crops = [crops[i] for i in order]
    return Plan(config, tuple(photos), tuple(crops), tuple(skipped))


def inspect_photo(path: Path, name: str) -> Photo:
    """Hash and upright size, from the header alone. ValueError when it is no picture."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # orientations that turn by 90 degrees
                width, height = height, width
        return Photo(name, hashlib.sha256(path.read_bytes()).hexdigest(), width, height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read as a picture ({error})") from error


def _places(photo: Photo, config: PrepConfig) -> list[tuple[float, int, int]]:
    """(scale, left, top) of every crop; a scale at which the photo is smaller than the crop is left out."""
    n, rng = config.crop_px, np.random.default_rng(seed_of(config.seed, photo.sha256, "places"))
    sizes = [(scale, *_scaled(photo.width, photo.height, scale)) for scale in config.scales]
    sizes = [size for size in sizes if min(size[1:]) >= n] or [(1.0, photo.width, photo.height)]
    if config.layout == "grid":
        return [(f, x, y) for f, w, h in sizes for y in range(0, h - n + 1, n) for x in range(0, w - n + 1, n)]
    chosen = [sizes[j % len(sizes)] for j in range(config.crops_per_photo)]
    return [(f, int(rng.integers(w - n + 1)), int(rng.integers(h - n + 1))) for f, w, h in chosen]


def _scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    return round(width * scale), round(height * scale)


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def process_shard(plan: Plan, shard: int, on_sample: Callable[[], None] = lambda: None) -> dict:
    """Write one shard and its manifest into the output folder, or keep a finished one; returns the manifest."""
    path = Path(plan.config.out) / shard_name(shard)
    manifest_path = path.with_suffix(".json")
    kept = _finished(path, manifest_path, plan.identity(shard))
    if kept:
        return kept
    buffer, n = io.BytesIO(), plan.config.shard_samples
    keys = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for offset, crop in enumerate(plan.crops[shard * n : (shard + 1) * n]):
            keys.append(f"{shard * n + offset:09d}")
            for suffix, data in make_sample(plan, *crop).items():
                info = tarfile.TarInfo(f"{keys[-1]}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            on_sample()
    data = buffer.getvalue()
    write_atomic(path, data)
    manifest = {
        "shard": path.name,
        "nsamples": len(keys),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "first_key": keys[0],
        "last_key": keys[-1],
        "identity": plan.identity(shard),
    }
    write_atomic(manifest_path, json.dumps(manifest, indent=1).encode())
    return manifest


def _finished(path: Path, manifest_path: Path, identity: str) -> dict | None:
    try:
        manifest = json.loads(manifest_path.read_text())
        if manifest["identity"] == identity and path.stat().st_size == manifest["bytes"]:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or from an interrupted run: made again
    return None


def make_sample(plan: Plan, photo: int, index: int, scale: float, left: int, top: int) -> dict[str, bytes]:
    """Members of one sample: the HQ crop, its degraded LQ, and how they came about."""
    config, source = plan.config, plan.photos[photo]
    picture = _read_photo(Path(config.photos) / source.name, scale)
    hq = np.ascontiguousarray(picture[top : top + config.crop_px, left : left + config.crop_px])
    seed = seed_of(config.seed, source.sha256, index)
    lq, drawn = degradation.degrade(hq, degradation.preset(config.degradation), np.random.default_rng(seed))
    record = {
        "format": FORMAT,
        "source": source.name,
        "sha256": source.sha256,
        "size": [source.width, source.height],
        "scale": scale,
        "crop": [left, top, config.crop_px, config.crop_px],
        "seed": seed,
        "degradation": drawn,
    }
    return {
        "hq.png": images.png_bytes(hq),
        "lq.png": images.png_bytes(lq),
        "json": json.dumps(record, sort_keys=True).encode(),
    }


@functools.lru_cache(maxsize=16)
def _read_photo(path: Path, scale: float) -> np.ndarray:
    picture = images.read_rgb(path)
    if scale == 1:
        return picture
    size = _scaled(picture.shape[1], picture.shape[0], scale)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def finish(plan: Plan, manifests: list[dict]) -> Path:
    """Write index.json, the commit of the whole set, then drop what an earlier set left behind."""
    out = Path(plan.config.out)
    index = {
        "format": FORMAT,
        "settings": plan.config.identity(),
        "sources": [{"name": p.name, "sha256": p.sha256} for p in plan.photos],
        "skipped": [{"name": name, "reason": reason} for name, reason in plan.skipped],
        "set_sha256": hashlib.sha256("".join(m["sha256"] for m in manifests).encode()).hexdigest(),
        "shards": manifests,
    }
    write_atomic(out / "index.json", json.dumps(index, indent=1).encode())
    wanted = {m["shard"] for m in manifests}
    for stale in out.glob("shard-*.tar"):
        if stale.name not in wanted:
            stale.unlink()
            stale.with_suffix(".json").unlink(missing_ok=True)
    return out / "index.json"
