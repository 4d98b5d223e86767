"""The infinite stream of training samples of a run, in an order that is a pure function of (seed, position).

Sample n of the run belongs to virtual stream n % streams. Every epoch draws a new permutation of the shards and of
the samples within each shard; stream v reads the shards [v::streams] of the permutation. Rank r takes the samples
n = r, r + world, .. Update k therefore trains on the same images for any number of ranks and loader workers, and
resuming at update k needs no state other than k. A broken sample or shard is replaced by a neighbour, so that the
position of all other samples stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from teasr import degradation
from teasr.data.batch import Batch, Text
from teasr.data.captions import CaptionCache
from teasr.data.config import DataConfig
from teasr.data.latents import LatentCache, turns_of
from teasr.data.shards import Sample, ShardSet, decode_near, read_shard
from teasr.util.seed import seed_of

BAD_ALLOWED = 8  # number of broken samples that is always tolerated, whatever their fraction


class Slot(NamedTuple):
    """The sample at a position of a virtual stream: number `place` of shard `shard`, in epoch `epoch`."""

    shard: int
    place: int
    position: int
    epoch: int


def slots(shards: ShardSet, seed: int, stream: int, streams: int, start: int) -> Iterator[Slot]:
    """Yield the slots of one virtual stream without end, from position `start` on."""
    position, epoch = 0, 0
    while True:
        order = np.random.default_rng(seed_of(seed, "shards", epoch)).permutation(len(shards.urls))
        for shard in order[stream::streams]:
            count = shards.counts[shard]
            if position + count > start:
                inside = np.random.default_rng(seed_of(seed, "samples", epoch, int(shard))).permutation(count)
                for place in inside[max(0, start - position) :]:
                    yield Slot(int(shard), int(place), max(start, position), epoch)
                    start += 1
            position += count
        epoch += 1


class Pair(NamedTuple):
    """One training sample. Images are uint8 [3, H, W], LQ up-sampled to the size of HQ.

    `bad` holds messages on the samples that were skipped; z_hq and z_lq are the cached latents [C, h, w], and text is
    the cached embedding [T, D] of the caption, if any. perceptual: factor on the perceptual losses.
    """

    x_hq: Tensor
    x_lq: Tensor
    key: str
    bad: tuple[str, ...]
    z_hq: Tensor | None = None
    z_lq: Tensor | None = None
    text: Tensor | None = None
    perceptual: float = 1.0


class Content(NamedTuple):
    """A shard that was read: its raw samples, and what its sidecars hold by key, packed."""

    raw: list[dict]
    latents: dict[str, bytes]
    captions: dict[str, bytes]


Held = dict[int, tuple[int, Content | ValueError]]  # the shard that each stream reads: its number, content or error


class PairStream(IterableDataset):
    """Infinite dataset of the samples of one rank, from sample `first` on."""

    def __init__(self, shards: ShardSet, config: DataConfig, seed: int, rank: int, world: int, first: int):
        """`first`: position of the first sample in this rank's sequence, = update x samples per rank and update."""
        check_streams(shards, config, world)
        self.shards, self.config, self.seed = shards, config, seed
        self.rank, self.world, self.first = rank, world, first
        self.online = online_degradation(shards, config)
        self.latents, self.captions = latent_cache(shards, config), caption_cache(shards, config)

    def __iter__(self) -> Iterator[Pair]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        places: dict[int, Iterator[Slot]] = {}
        held: Held = {}
        i = self.first + worker
        while True:
            n = self.rank + i * self.world
            stream = n % self.config.streams
            if stream not in places:
                places[stream] = slots(self.shards, self.seed, stream, self.config.streams, n // self.config.streams)
            yield self._pair(next(places[stream]), stream, n, held)
            i += workers

    def _pair(self, slot: Slot, stream: int, n: int, held: Held) -> Pair:
        """Read, degrade and augment sample `n` of the run."""
        turn = seed_of(self.seed, "augment", n) % turns_of(self.config.augment)
        sample = self._read(slot, stream, turn, held)
        if self.online is not None:
            stored = degradation.PRESETS[self.shards.settings["degradation"]]
            hq = sample.hq if stored.usm else degradation.sharpen(sample.hq, self.online)
            rng = np.random.default_rng(seed_of(self.seed, "degrade", n))
            sample = replace(sample, hq=hq, lq=degradation.degrade(hq, self.online, rng)[0])
        if self.config.crop_px is not None:
            sample = _cropped(sample, self.config.crop_px, np.random.default_rng(seed_of(self.seed, "crop", n)))
        latents = sample.latents or (None, None)
        return Pair(*sample.tensors(turn), sample.key, sample.bad, *latents, sample.text, sample.perceptual)

    def _read(self, slot: Slot, stream: int, turn: int, held: Held) -> Sample:
        """Read the sample of a slot; if its shard is unusable, a sample of the next usable shard."""
        bad: list[str] = []
        for offset in range(len(self.shards.urls)):
            shard = (slot.shard + offset) % len(self.shards.urls)
            url = self.shards.urls[shard]
            try:
                content = self._hold(shard, stream if offset == 0 else -1 - stream, held)
                raw = content.raw
                if offset == 0 and slot.place >= len(raw):
                    raise ValueError(
                        f"shard {url} holds {len(raw)} of {self.shards.counts[shard]} samples: make it again"
                    )
                variant = (slot.place + slot.epoch) % self.shards.variants
                decoder = partial(self._decode, content=content, shard=shard, variant=variant, turn=turn)
                sample = decode_near(raw, slot.place % len(raw), url, decoder)
                return replace(sample, bad=(*bad, *sample.bad))
            except ValueError as error:
                bad.append(str(error))
        raise ValueError(f"no shard of {self.shards.location} can be used: {bad[0]}")

    def _decode(self, raw: dict, content: Content, shard: int, variant: int, turn: int) -> Sample:
        sample = self.shards.decode(raw, variant)
        if self.config.perceptual is not None:
            sample = replace(sample, perceptual=self.config.perceptual[self.shards.part_of(shard)])
        if self.latents is not None:
            packed = content.latents.get(sample.key)
            sample = replace(sample, latents=self.latents.pair(packed, sample.key, shard, variant, turn))
        if self.captions is not None:
            sample = replace(sample, text=self.captions.embedding(content.captions, raw, shard))
        return sample

    def _hold(self, shard: int, place: int, held: Held) -> Content:
        """Return a shard and its sidecars, or raise the error of reading them.

        They are kept, so that each shard is read only once.
        """
        if place not in held or held[place][0] != shard:
            held.pop(place, None)  # free the old shard before reading the next: shards are large
            try:
                latents, captions = (cache.read(shard) if cache else {} for cache in (self.latents, self.captions))
                content = Content(read_shard(self.shards.urls[shard]), latents, captions)
            except ValueError as error:
                content = error
            held[place] = (shard, content)
        content = held[place][1]
        if isinstance(content, ValueError):
            raise content
        return content


def _cropped(sample: Sample, px: int, rng: np.random.Generator) -> Sample:
    """Cut a random square of `px` pixels from HQ, at a multiple of the scale, and the same part of LQ.

    Raises ValueError when the image is smaller, or `px` is not a multiple of the scale.
    """
    height, width, scale = *sample.hq.shape[:2], sample.scale
    if px > min(height, width) or px % scale:
        raise ValueError(
            f"data.crop_px = {px} does not fit: the stored images have {width}x{height} px, and it must be a "
            f"multiple of the scale {scale}"
        )
    top, left = (int(rng.integers((n - px) // scale + 1)) for n in (height, width))
    lq = sample.lq[top : top + px // scale, left : left + px // scale]
    top, left = top * scale, left * scale
    return replace(sample, hq=sample.hq[top : top + px, left : left + px], lq=lq)


def latent_cache(shards: ShardSet, config: DataConfig) -> LatentCache | None:
    """Open the cached latents of `data.latents`, or return None without. Raises ValueError when they do not fit."""
    if config.latents is None:
        return None
    locations = (config.latents,) if isinstance(config.latents, str) else config.latents
    return LatentCache.open(locations, shards, config.augment)


def caption_cache(shards: ShardSet, config: DataConfig) -> CaptionCache | None:
    """Open the embeddings of `data.captions`, or return None without. Raises ValueError when they do not fit."""
    if config.captions is None:
        return None
    locations = (config.captions,) if isinstance(config.captions, str) else config.captions
    return CaptionCache.open(locations, shards)


def online_degradation(shards: ShardSet, config: DataConfig) -> degradation.Degradation | None:
    """Return the degradation to apply in the loader, or None to use the stored LQ.

    Raises ValueError when the HQ of the set cannot be degraded.
    """
    if config.degrade == "stored":
        return None
    if shards.settings.get("lq"):
        raise ValueError(
            f"{shards.location} holds real pairs, whose LQ images must not be replaced: set data.degrade=stored"
        )
    needed = {"lq", "degradation", "peer_exact"}
    if not needed <= set(shards.settings):
        raise ValueError(
            f"{shards.location} were made with different settings "
            f"({', '.join(sorted(needed - set(shards.settings)))}), so that "
            "their HQ cannot be degraded in the same way: set data.degrade=stored, or make the sets with equal settings"
        )
    stored = shards.settings["degradation"]
    degradation.preset(stored)  # an error if this version does not know it
    return degradation.preset(config.degradation or stored, shards.settings["peer_exact"], shards.scale)


def check_scale(shards: ShardSet, scale: int, key: str) -> None:
    """Raise ValueError unless the set, named by the config key `key`, has the scale of the run."""
    if shards.scale != scale:
        raise ValueError(
            f"{key} = {shards.location} has scale {shards.scale}, but the config has scale = {scale}: set "
            f"scale={shards.scale}, or make shards with scale={scale}"
        )


def check_streams(shards: ShardSet, config: DataConfig, world: int) -> None:
    """Raise ValueError unless the streams divide evenly over ranks and workers and each has a shard."""
    readers = world * max(1, config.workers)
    if config.streams % readers:
        raise ValueError(
            f"data.streams = {config.streams} does not divide over {world} rank(s) x "
            f"{max(1, config.workers)} worker(s): "
            f"use a multiple of {readers}"
        )
    if config.streams > len(shards.urls):
        raise ValueError(
            f"{shards.location} has {len(shards.urls)} shard(s), fewer than data.streams = {config.streams}: "
            f"set data.streams={len(shards.urls)} or make smaller shards"
        )


def check_shards(shards: ShardSet, check_size, max_bad_share: float = 0.0, limit: int = 16) -> list[str]:
    """Check up to `limit` shards, spread over the set, before a run: present, usable, of a size the model accepts.

    `check_size(height_px, width_px)` must raise ValueError for an image size that the backbone does not accept. Returns
    messages on the unusable shards. Raises ValueError when their fraction exceeds `max_bad_share`, or when a size is
    not accepted.
    """
    chosen = sorted({round(i * (len(shards.urls) - 1) / max(1, limit - 1)) for i in range(limit)})
    bad: list[str] = []
    for i in chosen:
        try:
            sample = decode_near(read_shard(shards.urls[i]), 0, shards.urls[i], shards.decode)
        except ValueError as error:
            bad.append(str(error))
            continue
        try:
            check_size(*sample.hq.shape[:2])
        except ValueError as error:
            raise ValueError(f"sample {sample.key} of {shards.urls[i]}: {error}") from None
    if len(bad) > max_bad_share * len(chosen):
        raise ValueError(
            f"{bad[0]} ({len(bad)} of {len(chosen)} checked shards are bad; to train anyway, raise data.max_bad_share)"
        )
    return bad


def _samples(stream: PairStream, micro_batch: int) -> Iterator[Pair]:
    """Yield the samples of the stream in order.

    Each loader process passes on several of its samples at once, because every message between processes takes about
    as long as the sample itself.
    """
    workers = stream.config.workers
    if not workers:
        yield from stream
    size = max(1, micro_batch // workers)
    prefetch = 4 if size == 1 else 2
    loader = DataLoader(stream, size, num_workers=workers, prefetch_factor=prefetch, collate_fn=_packed)
    messages = map(_unpacked, loader)
    while True:
        for row in zip(*(next(messages) for _ in range(workers)), strict=True):  # one sample of each worker in turn
            yield from row


def _packed(pairs: list[Pair]) -> list[Pair] | Pair:
    """Stack samples along a new first dimension, unless they differ in size."""
    sizes = {tuple(None if x is None else x.shape for x in (p.x_hq, p.z_hq, p.z_lq, p.text)) for p in pairs}
    if len(sizes) > 1:
        return pairs
    columns = zip(*pairs, strict=True)
    return Pair(*(torch.stack(rows) if isinstance(rows[0], Tensor) else rows for rows in columns))


def _unpacked(message: list[Pair] | Pair) -> list[Pair]:
    if not isinstance(message, Pair):
        return message
    return [Pair(*values) for values in zip(*message, strict=True)]


def batches(
    stream: PairStream, micro_batch: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Batch, list[str]]]:
    """Yield the micro-batches of one rank without end, on its device, each with messages on the samples skipped for it.

    Raises ValueError when the fraction of broken samples so far exceeds `max_bad_share`, or when the samples of a
    micro-batch differ in size.
    """
    config, seen, broken = stream.config, 0, 0
    samples = _samples(stream, micro_batch)
    while True:
        hq, lq, keys, bad, *latents, text, perceptual = zip(*(next(samples) for _ in range(micro_batch)), strict=True)
        if any(len({None if x is None else x.shape for x in rows}) > 1 for rows in (hq, *latents)):
            raise ValueError(
                f"the samples from {keys[0]} on differ in size: all shards of a run must have the same crop_px"
            )
        names = [name for row in bad for name in row]
        seen, broken = seen + micro_batch, broken + sum(map(bool, bad))
        if broken > max(BAD_ALLOWED, config.max_bad_share * seen):
            raise ValueError(
                f"{broken} of {seen} samples are broken, more than data.max_bad_share = {config.max_bad_share} "
                f"({names[0]}): "
                "check the set with `teasr verify` and make the broken shards again, or raise this limit"
            )
        z_hq, z_lq = (None if z[0] is None else torch.stack(z) for z in latents)
        texts = None if stream.captions is None else _batched(text, stream.captions.alike)
        factors = None if config.perceptual is None else torch.tensor(perceptual, dtype=torch.float32)
        yield Batch.from_uint8(torch.stack(hq), torch.stack(lq), list(keys), device, z_hq, z_lq, texts, factors), names


def _batched(text: tuple[Tensor, ...], alike: bool) -> Text:
    """Join the embeddings [T, D] of a batch, to one tensor if they are alike in the whole set.

    It does not depend on the batch, because all ranks have to call the network equally often.
    """
    return torch.stack(text) if alike else tuple(x[None] for x in text)
