"""Training pairs from webdataset shards, in an order that is a pure function of (seed, position).

A data set is a folder (or URL) with `index.json` and tar shards of `{key}.hq.png {key}.lq.png {key}.json`. Sample n of
the run belongs to virtual stream n % streams; stream v reads the shards [v::streams] of a fresh permutation every epoch,
its samples in a fresh order too. Rank r takes n = r, r + world, ..: whatever the number of ranks and loader workers,
update k trains on the same pictures, and resuming at update k needs no other state than k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import tariterators

from teasr import images
from teasr.methods.base import Batch
from teasr.randomness import seed_of

FORMAT = 1


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how they are read."""

    shards: str  # folder or URL that holds index.json
    streams: int = 4  # shards read side by side; a multiple of ranks x workers, at most the number of shards
    workers: int = 0  # loader processes of each rank; 0 reads in the training process
    augment: Literal["none", "flip", "dihedral"] = "flip"

    def __post_init__(self):
        if self.streams < 1 or self.workers < 0:
            raise ValueError(f"data.streams = {self.streams} must be >= 1 and data.workers = {self.workers} >= 0")


@dataclass(frozen=True)
class ShardSet:
    """An opened index: shard URLs, the samples each holds, and the settings they were made with."""

    location: str
    urls: tuple[str, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    settings: dict

    @classmethod
    def open(cls, location: str) -> ShardSet:
        """Read `index.json` in a folder or below a URL. ValueError when it is missing, unreadable or empty."""
        cure = "make shards with data_prep/make_shards.py or name the folder that holds them"
        try:
            with wds.gopen(f"{location}/index.json") as stream:
                index = json.load(stream)
            shards = index["shards"]
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}, this version reads {FORMAT}")
            rows = [(f"{location}/{s['shard']}", int(s["nsamples"]), int(s["bytes"])) for s in shards]
        except FileNotFoundError:
            raise ValueError(f"{location} holds no index.json: {cure}") from None
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{location}/index.json cannot be used ({error!r}): {cure}") from None
        if not sum(count for _, count, _ in rows):
            raise ValueError(f"{location} holds no samples: {cure}")
        return cls(location, *(tuple(column) for column in zip(*rows, strict=True)), settings=index.get("settings", {}))

    def __len__(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Sample:
    """One decoded pair, uint8 [H, W, 3]; LQ at its own size. `bad` names members that had to be skipped to get here."""

    key: str
    hq: np.ndarray
    lq: np.ndarray
    bad: tuple[str, ...] = ()

    @property
    def scale(self) -> int:
        """How many times larger HQ is."""
        return self.hq.shape[0] // self.lq.shape[0]

    @property
    def lq_up(self) -> np.ndarray:
        """LQ brought to the size of HQ by bicubic up-sampling."""
        return images.upsample(self.lq, self.scale)


def read_shard(url: str) -> list[dict]:
    """All raw samples of one shard in file order, through webdataset. ValueError names a shard that cannot be read."""
    try:
        stream = tariterators.tar_file_expander(tariterators.url_opener([{"url": url}]))
        return list(tariterators.group_by_keys(stream))
    except Exception as error:  # webdataset raises its own, tarfile's, OSError and ValueError alike
        raise ValueError(
            f"shard {url} cannot be read ({error!r}); make it again or remove it from index.json"
        ) from error


def decode(raw: dict) -> Sample:
    """A raw sample -> pictures. ValueError names the member that is missing or broken."""
    name = f"{raw.get('__url__', '?')}/{raw['__key__']}"
    members = {}
    for part in ("hq", "lq"):
        field = next((f for f in raw if f.split(".")[0] == part), None)
        if field is None:
            raise ValueError(f"{name}.{part}.png is missing")
        members[part] = images.read_rgb(raw[field], f"{name}.{field}")
    hq, lq = members["hq"], members["lq"]
    if hq.shape[0] * lq.shape[1] != hq.shape[1] * lq.shape[0] or hq.shape[0] % lq.shape[0]:
        raise ValueError(
            f"{name}: HQ {hq.shape[1]}x{hq.shape[0]} px is no whole multiple of LQ {lq.shape[1]}x{lq.shape[0]} px"
        )
    return Sample(raw["__key__"], hq, lq)


def decode_near(raw: list[dict], place: int, url: str) -> Sample:
    """Sample `place` of a shard, or the next usable one after it, naming what was passed over.

    Standing in for a broken sample keeps every later position where it was. ValueError when none is usable.
    """
    bad: list[str] = []
    for offset in range(len(raw)):
        try:
            sample = decode(raw[(place + offset) % len(raw)])
            return Sample(sample.key, sample.hq, sample.lq, tuple(bad))
        except ValueError as error:
            bad.append(str(error))
    first = f": {bad[0]}" if bad else ""
    raise ValueError(f"shard {url} holds no usable sample{first}; make it again or remove it from index.json")


def slots(shards: ShardSet, seed: int, stream: int, streams: int, start: int) -> Iterator[tuple[int, int, int]]:
    """Endless (shard, place, position in the stream) of one virtual stream from its position `start`."""
    position, epoch = 0, 0
    while True:
        order = np.random.default_rng(seed_of(seed, "shards", epoch)).permutation(len(shards.urls))
        for shard in order[stream::streams]:
            count = shards.counts[shard]
            if position + count > start:
                inside = np.random.default_rng(seed_of(seed, "samples", epoch, int(shard))).permutation(count)
                for place in inside[max(0, start - position) :]:
                    yield int(shard), int(place), max(start, position)
                    start += 1
            position += count
        epoch += 1


class PairStream(IterableDataset):
    """The endless samples of one rank from update `start` on: (x_hq, x_lq, key, bad), LQ up-sampled to HQ size."""

    def __init__(self, shards: ShardSet, config: DataConfig, seed: int, rank: int, world: int, first: int):
        """`first`: position of this rank's first sample in its own sequence, = update x samples of a rank."""
        check_streams(shards, config, world)
        self.shards, self.config, self.seed = shards, config, seed
        self.rank, self.world, self.first = rank, world, first

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, str, tuple[str, ...]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        places: dict[int, Iterator[tuple[int, int, int]]] = {}
        held: dict[int, tuple[int, list[dict]]] = {}
        i = self.first + worker
        while True:
            n = self.rank + i * self.world
            stream = n % self.config.streams
            if stream not in places:
                places[stream] = slots(self.shards, self.seed, stream, self.config.streams, n // self.config.streams)
            shard, place, _ = next(places[stream])
            if stream not in held or held[stream][0] != shard:
                held[stream] = (shard, read_shard(self.shards.urls[shard]))
            sample = decode_near(held[stream][1], place, self.shards.urls[shard])
            yield (*self._tensors(sample, n), sample.key, sample.bad)
            i += workers

    def _tensors(self, sample: Sample, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        hq, lq = sample.hq, sample.lq_up
        turn = seed_of(self.seed, "augment", n)
        if self.config.augment != "none" and turn & 1:
            hq, lq = hq[:, ::-1], lq[:, ::-1]
        if self.config.augment == "dihedral":
            hq, lq = np.rot90(hq, turn >> 1 & 3), np.rot90(lq, turn >> 1 & 3)
        return images.to_tensor(hq), images.to_tensor(lq)


def check_streams(shards: ShardSet, config: DataConfig, world: int) -> None:
    """ValueError unless the streams divide over ranks and workers and there are shards enough for them."""
    readers = world * max(1, config.workers)
    if config.streams % readers:
        raise ValueError(
            f"data.streams = {config.streams} does not divide over {world} rank(s) x {max(1, config.workers)} worker(s): "
            f"use a multiple of {readers}"
        )
    if config.streams > len(shards.urls):
        raise ValueError(
            f"{shards.location} has {len(shards.urls)} shard(s), fewer than data.streams = {config.streams}: "
            f"set data.streams={len(shards.urls)} or make smaller shards"
        )


def check_shards(shards: ShardSet, check_size, limit: int = 16) -> None:
    """Read up to `limit` shards spread over the set before anything long: present, usable, of a size the model takes.

    `check_size(height_px, width_px)` raises ValueError for a picture that the backbone cannot take.
    """
    chosen = sorted({round(i * (len(shards.urls) - 1) / max(1, limit - 1)) for i in range(limit)})
    for i in chosen:
        sample = decode_near(read_shard(shards.urls[i]), 0, shards.urls[i])
        try:
            check_size(*sample.hq.shape[:2])
        except ValueError as error:
            raise ValueError(f"sample {sample.key} of {shards.urls[i]}: {error}") from None


def batches(stream: PairStream, micro_batch: int) -> Iterator[tuple[Batch, list[str]]]:
    """Endless micro-batches of one rank, and the names of broken members passed over while making each."""
    workers = stream.config.workers
    loader = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    samples = iter(loader)
    while True:
        hq, lq, keys, bad = zip(*(next(samples) for _ in range(micro_batch)), strict=True)
        if len({x.shape for x in hq}) > 1:
            raise ValueError(
                f"samples {keys[0]} .. have different sizes: a batch needs one crop size in the whole shard set"
            )
        yield Batch(torch.stack(hq), torch.stack(lq), list(keys)), [name for names in bad for name in names]
