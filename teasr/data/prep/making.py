"""Write one shard (a tar and its manifest) from its spec, and the index that completes the set.

The bytes of a shard depend only on the photographs, the config and the versions of the image libraries. A shard is
written to a temporary file, synced and renamed; its manifest is written last. An interrupted shard is therefore made
again, a shard with a manifest is kept, and two workers on the same shard write the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from teasr import degradation
from teasr.config import strict_yaml as cfg
from teasr.data.layout import CAPTION, FORMAT, commit, commit_shard, lq_field, read_manifest, sample_key, set_hash
from teasr.data.prep import lossless
from teasr.data.prep.card import card
from teasr.data.prep.plan import Crop, Plan, PrepConfig, ShardSpec, scaled
from teasr.data.prep.sources import detail
from teasr.imaging import images
from teasr.util.files import Hashed, atomic_file, write_atomic
from teasr.util.seed import seed_of

HQ_SUFFIX = {"png": "png", "webp-lossless": "webp", "jpeg98": "jpg"}


def process_shard(spec: ShardSpec, on_sample: Callable[[int], None] = lambda samples: None) -> dict:
    """Write one shard and its manifest, or keep the shard if it is finished; return the manifest.

    `on_sample(n)` is called each time n more samples are done. Raises OSError when the disk fails, and ValueError when
    a photograph has changed since it was inspected; neither leaves a partially written file.
    """
    manifest = read_manifest(spec.path, spec.identity)
    if manifest is None:
        with atomic_file(spec.path) as file:
            hashed = Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for key, crop in zip(_keys(spec), spec.crops, strict=True):
                    for name, data in make_sample(spec.config, crop).items():
                        add_member(tar, f"{key}.{name}", data)
                    on_sample(1)
        manifest = commit_shard(spec.path, _keys(spec), hashed, spec.identity, libraries=libraries())
    else:
        on_sample(len(spec.crops))
    return manifest


def _keys(spec: ShardSpec) -> list[str]:
    first = spec.shard * spec.config.shard_samples
    return [sample_key(first + i) for i in range(len(spec.crops))]


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member without time or owner, so that the bytes depend only on name and data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def libraries() -> dict[str, str]:
    """Versions of the libraries that determine the bytes of images and the random draws."""
    names = ("numpy", "opencv-python-headless", "pillow", "scipy")
    return {name: version(name) for name in names}


def make_sample(config: PrepConfig, crop: Crop) -> dict[str, bytes]:
    """Members of one sample: HQ, its LQ variants, its caption if asked for, and a JSON record of how they were made."""
    photo, n = crop.photo, config.crop_px
    path = Path(config.photos) / photo.name
    picture = _read_photo(path, photo.sha256, crop.scale)
    if crop.others:
        crop = _most_detailed(picture, crop, n)
    plain = np.ascontiguousarray(picture[crop.top : crop.top + n, crop.left : crop.left + n])
    hq = degradation.sharpen(plain, config.preset) if config.lq is None else plain
    members, kept = {}, config.keeps_jpeg and photo.mcu_px > 0 and crop.scale == 1
    if kept:
        members["hq.jpg"] = lossless.crop(path, crop.left, crop.top, n)
    else:
        members[f"hq.{HQ_SUFFIX[config.hq_format]}"] = _encode(hq, config.hq_format)
    record = {
        "format": FORMAT,
        "source": photo.name,
        "sha256": photo.sha256,
        "size": [photo.width, photo.height],
        "scale": crop.scale,
        "crop": [crop.left, crop.top, n, n],
        "jpeg_kept": kept,
    }
    if config.lq is not None:
        s = config.scale
        lq = _read_photo(Path(config.lq) / photo.lq, photo.lq_sha256, 1.0)
        members["lq.png"] = images.png_bytes(
            lq[crop.top // s : (crop.top + n) // s, crop.left // s : (crop.left + n) // s]
        )
        record |= {"lq_source": photo.lq, "lq_sha256": photo.lq_sha256}
    else:
        record["degradation"] = []
        for variant in range(config.variants):
            seed = seed_of(config.seed, photo.sha256, crop.index, variant)
            lq, drawn = degradation.degrade(hq, config.preset, np.random.default_rng(seed))
            members[lq_field(variant)] = images.png_bytes(lq)
            record["degradation"].append({"seed": seed} | drawn)
    if config.captions == "files":
        members[CAPTION] = photo.caption.encode()
    record["crc32"] = {name: zlib.crc32(data) for name, data in members.items()}
    return members | {"json": json.dumps(record, sort_keys=True).encode()}


def _most_detailed(picture: np.ndarray, crop: Crop, n: int) -> Crop:
    """Return the crop at the place with the most fine detail, the first one if several have as much."""
    places = [(crop.left, crop.top), *crop.others]
    left, top = max(places, key=lambda place: detail(picture[place[1] : place[1] + n, place[0] : place[0] + n]))
    return replace(crop, left=left, top=top, others=())


def _encode(hq: np.ndarray, hq_format: str) -> bytes:
    if hq_format == "png":
        return images.png_bytes(hq)
    return images.webp_bytes(hq) if hq_format == "webp-lossless" else images.jpeg_bytes(hq, 98)


@functools.lru_cache(maxsize=4)
def _read_photo(path: Path, sha256: str, scale: float) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} can no longer be read ({error.strerror}) since it was inspected; run the same command again"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} has changed since it was inspected; run the same command again")
    picture = images.read_rgb(data, str(path))
    if scale == 1:
        return picture
    size = scaled(picture.shape[1], picture.shape[0], scale)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def settings_of(config: PrepConfig) -> dict:
    """The settings of a set, without those that say where things are on this machine."""
    return {k: v for k, v in cfg.to_dict(config).items() if k not in ("photos", "out", "licences")}


def finish(plan: Plan, manifests: list[dict]) -> dict:
    """Write the data card and index.json, which marks the set as complete, and return the index.

    Shards left over from an earlier set are deleted.
    """
    out = Path(plan.config.out)
    index = {
        "format": FORMAT,
        "settings": settings_of(plan.config),
        "sources": [{"name": p.name, "sha256": p.sha256} for p in plan.photos],
        "skipped": [{"name": name, "reason": reason} for name, reason in plan.skipped],
        "libraries": [dict(rows) for rows in sorted({tuple(sorted(m["libraries"].items())) for m in manifests})],
        "set_sha256": set_hash(manifests),
        "shards": manifests,
    }
    write_atomic(out / "README.md", card(index["settings"], plan.config.licences, index).encode())
    commit(out, index)
    return index
