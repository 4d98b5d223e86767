"""Held-out LQ/HQ pairs for evaluation.

They come from a shard set, from two folders, or from one folder of originals, which are reduced bicubically to make LQ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from teasr.config import strict_yaml
from teasr.data.layout import DEFAULT_SCALE
from teasr.data.shards import Sample, ShardSet, read_shard
from teasr.imaging import finding, images


@dataclass(frozen=True)
class Dataset:
    """A known test set. `hq` and `lq` are folders; `lq` may be `bicubic`. `count`: number of images required."""

    hq: str
    lq: str
    scale: Annotated[int, "[1, 4]"]
    count: Annotated[int, "[1, inf)"]
    get: str  # where it can be downloaded


def read_datasets(path: Path) -> dict[str, Dataset]:
    """Read a YAML file of known test sets by name. Raises ValueError that names the file and the key."""
    data = strict_yaml.read_yaml(path)
    with strict_yaml.named(path):
        return strict_yaml.convert(dict[str, Dataset], data, "")


@dataclass(frozen=True)
class Pairs:
    """A named set of pairs. Iterating yields (key, load), where `load()` returns the decoded pair.

    `identity` changes when the set changes. scale: ratio of the side of HQ to that of LQ.
    """

    name: str
    count: int
    scale: int
    identity: dict
    entries: Callable[[], Iterator[tuple[str, Callable[[], Sample]]]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Sample]]]:
        return self.entries()


def from_shards(location: str, name: str | None = None) -> Pairs:
    """Pairs of a shard set, in file order.

    Raises ValueError when the set cannot be opened. Loading a broken sample also raises ValueError instead of skipping
    it, because scores must cover the whole set.
    """
    shards = ShardSet.open(location)

    def entries() -> Iterator[tuple[str, Callable[[], Sample]]]:
        for url in shards.urls:
            for raw in read_shard(url):
                yield raw["__key__"], partial(shards.decode, raw)

    sizes = list(zip(shards.counts, shards.sizes, strict=True))
    return Pairs(
        name or Path(location).name, len(shards), shards.scale, {"settings": shards.settings, "shards": sizes}, entries
    )


def from_folders(
    hq: Path, lq: Path | None, scale: int = DEFAULT_SCALE, name: str | None = None, count: int | None = None
) -> Pairs:
    """Pairs of the images in `hq` and those of the same name (without suffix) in `lq`.

    If `lq` is None, LQ is the bicubic reduction of HQ by Pillow, which widens the kernel as MATLAB does; originals are
    first cropped to a multiple of `scale`. `count` is the expected number of images. Raises ValueError naming an
    unpaired image, or when the count is wrong.
    """
    originals = _by_stem(hq)
    if count is not None and len(originals) != count:
        raise ValueError(
            f"{hq} contains {len(originals)} images, but {name or 'the set'} has {count}: get the complete set"
        )
    small = None
    if lq is not None:
        small = _by_stem(lq)
        unpaired = sorted(originals.keys() ^ small.keys())
        if unpaired:
            lacking, there = (lq, hq) if unpaired[0] in originals else (hq, lq)
            raise ValueError(
                f"{lacking} has no image {unpaired[0]}, but {there} has one: both folders must contain the "
                "same names (without suffix)"
            )

    def entries() -> Iterator[tuple[str, Callable[[], Sample]]]:
        for key, path in originals.items():
            yield key, partial(_load, key, path, small[key] if small else None, scale)

    files = [*originals.values(), *(small or {}).values()]
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    identity = {"files": len(files), "listing": hashlib.sha256(listing.encode()).hexdigest()[:16]}
    identity |= {"scale": scale, "lq": "given" if lq else "bicubic"}
    return Pairs(name or hq.name, len(originals), scale, identity, entries)


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of images")
    names, problems = finding.walk_pictures(folder)
    lost = [problem for problem in problems if not problem[1].startswith(finding.HARMLESS)]
    if lost:
        raise ValueError(f"{folder / lost[0][0]} cannot be used ({lost[0][1]}): repair or remove it")
    found: dict[str, Path] = {}
    for name in names:
        stem = Path(name).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(
                f"{folder} contains {found[stem].name} and {Path(name).name}: keep one file of each name "
                "(without suffix)"
            )
        found[stem] = folder / name
    if not found:
        raise ValueError(f"{folder} contains no images ({', '.join(images.SUFFIXES)})")
    return found


def _load(key: str, hq: Path, lq: Path | None, scale: int) -> Sample:
    original = images.read_rgb(hq)
    if lq is not None:
        small = images.read_rgb(lq)
        if original.shape[:2] != (small.shape[0] * scale, small.shape[1] * scale):
            raise ValueError(
                f"the sides of {hq} must be {scale} times those of {lq}: {_size(original)} and {_size(small)}"
            )
        return Sample(key, original, small)
    height, width = (n // scale for n in original.shape[:2])
    original = np.ascontiguousarray(original[: height * scale, : width * scale])
    return Sample(key, original, np.asarray(Image.fromarray(original).resize((width, height), Image.BICUBIC)))


def _size(x: np.ndarray) -> str:
    return f"{x.shape[1]}x{x.shape[0]} px"
