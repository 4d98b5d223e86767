"""Read a shard set: its index, raw samples (through webdataset), and decoded pairs.

The format is described in layout.py.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from teasr.data.layout import DEFAULT_SCALE, INDEX, lq_field, parse_index, set_hash, special_kind
from teasr.imaging import images
from teasr.util.optional import needed_for

with needed_for("reading shards"):
    import webdataset as wds
    from webdataset import tariterators

if TYPE_CHECKING:
    from torch import Tensor

PROFILE = ("crop_px", "scale", "variants", "degradation", "layout", "photos", "seed")  # settings in a set's description


@dataclass(frozen=True)
class ShardSet:
    """One or several opened indices: shard URLs, samples and bytes per shard, and the config they were made with.

    `parts`: for each index, its location and the SHA-256 of every shard by name.
    """

    location: str
    urls: tuple[str, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    settings: dict
    parts: tuple[tuple[str, dict[str, str]], ...] = ()

    @classmethod
    def open(cls, location: str, *more: str) -> ShardSet:
        """Read the index of one or several shard sets.

        A location is a folder, any URL that webdataset opens (`pipe:cat /data/{name}`, `http://..`, `gs://..`,
        `hf://..`), or `s3://..`. Several locations form one set, in which each counts in proportion to its number of
        samples; its `settings` are those shared by all. Raises ValueError when an index is missing, unreadable or
        empty, or when the scales or the numbers of degraded variants differ.
        """
        if more:
            return cls._joined([cls.open(each) for each in (location, *more)])
        index = read_index(location, "make shards with `teasr prepare` or give the folder of a shard set")
        rows = index["shards"]
        urls = tuple(url_of(location, row["shard"]) for row in rows)
        counts, sizes = (tuple(int(row[key]) for row in rows) for key in ("nsamples", "bytes"))
        hashes = {row["shard"]: row.get("sha256", "") for row in rows}
        return cls(location, urls, counts, sizes, index.get("settings", {}), ((location, hashes),))

    @classmethod
    def _joined(cls, sets: list[ShardSet]) -> ShardSet:
        for other in sets[1:]:
            if other.scale != sets[0].scale:
                raise ValueError(
                    f"{sets[0].location} has scale {sets[0].scale} and {other.location} has scale {other.scale}: "
                    "sets that are read together need the same scale; make one again with the scale of the other"
                )
            if other.variants != sets[0].variants:
                raise ValueError(
                    f"{sets[0].location} has {sets[0].variants} degraded version(s) of each HQ and "
                    f"{other.location} has {other.variants}: "
                    "sets that are read together need the same number; make one again with variants as in the other"
                )
        shared = {k: v for k, v in sets[0].settings.items() if all(s.settings.get(k) == v for s in sets)}
        urls, counts, sizes, parts = (
            sum((getattr(s, name) for s in sets), ()) for name in ("urls", "counts", "sizes", "parts")
        )
        return cls(" + ".join(s.location for s in sets), urls, counts, sizes, shared, parts)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def scale(self) -> int:
        """Ratio of the side of HQ to that of LQ."""
        return self.settings.get("scale", DEFAULT_SCALE)

    @property
    def locations(self) -> tuple[str, ...]:
        """The locations that were opened, one for each index."""
        return tuple(location for location, _ in self.parts)

    def hashes_of(self, location: str) -> dict[str, str]:
        """SHA-256 of every shard of one of the locations, by name and in order."""
        return dict(self.parts)[location]

    def part_of(self, shard: int) -> int:
        """Number of the location that a shard belongs to."""
        ends = itertools.accumulate(len(hashes) for _, hashes in self.parts)
        return next(place for place, end in enumerate(ends) if shard < end)

    def datasets(self) -> list[dict]:
        """Describe each location for an experiment tracker: name, digest, source and profile (sizes and settings).

        The digest is the beginning of the hash that `teasr prepare` prints.
        """
        found, first = [], 0
        for location, hashes in self.parts:
            mine = slice(first, first + len(hashes))
            first = mine.stop
            profile = {"samples": sum(self.counts[mine]), "shards": len(hashes), "bytes": sum(self.sizes[mine])}
            profile |= {key: self.settings[key] for key in PROFILE if key in self.settings}
            path = Path(location)
            source = str(path.resolve()) if path.is_dir() else location
            name = path.name or location
            digest = set_hash([{"sha256": sha256} for sha256 in hashes.values()])[:12]
            found.append({"name": name, "digest": digest, "source": source, "profile": profile})
        return found

    @property
    def variants(self) -> int:
        """Number of degraded versions of every HQ."""
        return self.settings.get("variants", 1)

    def decode(self, raw: dict, variant: int = 0) -> Sample:
        """Decode a raw sample of this set. Raises ValueError when it is broken or its size is not that of the set."""
        sample = decode(raw, variant)
        hq, lq, px = sample.hq.shape[:2], sample.lq.shape[:2], self.settings.get("crop_px", sample.hq.shape[0])
        if hq != (px, px) or hq != (lq[0] * self.scale, lq[1] * self.scale):
            raise ValueError(
                f"{_name(raw)}: HQ has {hq[1]}x{hq[0]} px and LQ {lq[1]}x{lq[0]} px, but in {self.location} HQ has "
                f"{px}x{px} px, {self.scale} times the size of LQ"
            )
        return sample


def read_index(location: str, cure: str) -> dict:
    """Read the index of a set of shards at a location, as `ShardSet.open` takes it.

    Raises ValueError, ending with `cure`, when it is missing, unreadable, of another format, or lists no samples.
    """
    try:
        with _open(url_of(location, INDEX)) as stream:
            index = parse_index(stream.read())
    except FileNotFoundError:
        raise ValueError(f"{location} holds no {INDEX}: {cure}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{url_of(location, INDEX)} cannot be used ({error}): {cure}") from None
    if not any(row["nsamples"] for row in index["shards"]):
        raise ValueError(f"{location} holds no samples: {cure}")
    return index


def url_of(location: str, name: str) -> str:
    """URL of a file of the set, for webdataset. In a command, the name is quoted for the shell.

    s3:// is read through the AWS command line, as webdataset's documentation recommends.
    """
    if location.startswith("s3://"):
        return f"pipe:aws s3 cp {shlex.quote(f'{location}/{name}')} -"
    if location.startswith("pipe:"):
        name = shlex.quote(name)
    return location.replace("{name}", name) if "{name}" in location else f"{location}/{name}"


def _open(url: str):
    """Open a file, URL or command; raise ValueError for a named pipe or a device, at which reading would wait."""
    path = url.removeprefix("file:")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")
    return wds.gopen(url)


@dataclass(frozen=True)
class Sample:
    """One decoded pair, uint8 [H, W, 3]; LQ at its own size.

    `bad` holds one message for each broken sample or shard that was skipped to find this one. `latents`: the cached
    latents of HQ and LQ, if they are read (data/latents.py), and `text` the embedding [T, D] of the caption
    (data/captions.py). `perceptual`: factor on the perceptual losses of this sample.
    """

    key: str
    hq: np.ndarray
    lq: np.ndarray
    bad: tuple[str, ...] = ()
    latents: tuple[Tensor, Tensor] | None = None
    text: Tensor | None = None
    perceptual: float = 1.0

    @property
    def scale(self) -> int:
        """Ratio of the side of HQ to that of LQ."""
        return self.hq.shape[0] // self.lq.shape[0]

    @cached_property
    def lq_up(self) -> np.ndarray:
        """LQ, up-sampled bicubically to the size of HQ."""
        return images.upsample(self.lq, self.scale)

    def tensors(self, turn: int = 0) -> tuple[Tensor, Tensor]:
        """HQ and up-sampled LQ as uint8 [3, H, W], both flipped and rotated (`images.turn`)."""
        hq, lq = images.turn(self.hq, turn), images.turn(self.lq, turn)
        return images.planes(hq), images.upsample_planes(images.planes(lq), self.scale)


def read_shard(url: str) -> list[dict]:
    """All raw samples of one shard in file order, through webdataset. Raises ValueError when it cannot be read.

    Members that are not plain files, such as links, are left out, so that their samples lack a member.
    """
    try:
        with _open(url) as stream:
            raw = list(tariterators.group_by_keys(_members(stream, url)))
    except Exception as error:  # webdataset's own exceptions, tarfile's, OSError or ValueError
        raise ValueError(f"shard {url} cannot be read ({error!r}); make it again or remove it from {INDEX}") from error
    if not raw:
        raise ValueError(f"shard {url} is empty; make it again or remove it from {INDEX}")
    return raw


def _members(stream: BinaryIO, url: str) -> Iterator[dict]:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for info in tar:
            if not special_kind(info):
                yield {"fname": info.name, "data": tar.extractfile(info).read(), "__url__": url}


def decode(raw: dict, variant: int = 0) -> Sample:
    """Decode a raw sample. Raises ValueError naming the member that is missing or broken."""
    name = _name(raw)
    hq_field = next((f for f in raw if f.startswith("hq.")), "hq.png")
    hq, lq = (_decode_member(raw, field, name) for field in (hq_field, lq_field(variant)))
    if hq.shape[0] * lq.shape[1] != hq.shape[1] * lq.shape[0] or hq.shape[0] % lq.shape[0]:
        raise ValueError(
            f"{name}: HQ {hq.shape[1]}x{hq.shape[0]} px is not a whole multiple of LQ {lq.shape[1]}x{lq.shape[0]} px"
        )
    return Sample(raw["__key__"], hq, lq)


def _name(raw: dict) -> str:
    return f"{raw.get('__url__', '?')}/{raw['__key__']}"


def _decode_member(raw: dict, field: str, name: str) -> np.ndarray:
    if field not in raw:
        raise ValueError(f"{name}.{field} is missing")
    if not field.endswith(".png"):  # PNG has its own checksums; in other formats a flipped bit would be unnoticed
        try:
            wanted = json.loads(raw["json"])["crc32"][field]
        except (KeyError, ValueError, TypeError, RecursionError):
            raise ValueError(f"{name}.json is missing or broken") from None
        if zlib.crc32(raw[field]) != wanted:
            raise ValueError(f"{name}.{field} is corrupted (its crc32 differs from the recorded one)")
    return images.decode_rgb(raw[field], f"{name}.{field}")


def decode_near(raw: list[dict], place: int, url: str, decoder: Callable[[dict], Sample] = decode) -> Sample:
    """Decode sample `place` of a shard, or the next usable one after it; `Sample.bad` lists what was skipped.

    Because a broken sample is replaced, not removed, all later positions stay the same. `decoder` raises ValueError for
    a broken sample. Raises ValueError when no sample is usable.
    """
    bad: list[str] = []
    for offset in range(len(raw)):
        try:
            return replace(decoder(raw[(place + offset) % len(raw)]), bad=tuple(bad))
        except ValueError as error:
            bad.append(str(error))
    raise ValueError(f"shard {url} holds no usable sample: {bad[0]}; make it again or remove it from {INDEX}")
