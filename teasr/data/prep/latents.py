"""Make the latent cache of a shard set: encode its images once with the VAE, into sidecar shards (data/latents.py).

The bytes depend on the shard, the VAE, both dtypes and the library versions; another `batch` or device type may change
the last digits.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from teasr.data.latents import MEMBER, tensor_name, turns_of
from teasr.data.layout import FORMAT, INDEX, commit, commit_shard, read_manifest, set_hash
from teasr.data.prep.engines import my_part
from teasr.data.prep.folder import claimed
from teasr.data.prep.making import add_member
from teasr.data.shards import ShardSet, read_shard
from teasr.util.files import Hashed, atomic_file, remove_strays, sha256_of
from teasr.util.progress import ProgressLine
from teasr.util.tensor_file import pack

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Codec(Protocol):
    """The frozen VAE of a backbone, as the latent cache uses it."""

    downsample: int  # image pixels per latent pixel, along each side

    def encode(self, x: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to normalised latents [B, C, h, w]."""

    def sha256(self) -> str:
        """Hash of the weights and the normalisation."""


@dataclass(frozen=True)
class LatentsConfig:
    """Config of the latent cache: which shards are encoded, and with which VAE."""

    shards: str  # folder of the shard set
    vae: str  # local folder of a diffusers VAE or of a model with one in vae/; or a model name on the hub
    out: str | None = None  # folder of the sidecar shards; default: latents/ inside `shards`
    augment: Literal["none", "flip", "dihedral"] = "flip"  # data.augment of the trainings: 1, 2 or 8 latents per image
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the stored latents
    compute_dtype: Literal["bf16", "fp32"] = "fp32"  # of the VAE
    batch: Annotated[int, "[1, inf)"] = 8  # images encoded at once

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}: must be >= 1")


class _Set:
    """A set of sidecar shards that is being written: its source shards, codec and output folder."""

    def __init__(self, config: LatentsConfig, codec: Codec, device: torch.device):
        self.config, self.codec, self.device = config, codec, device
        self.source = Path(config.shards).expanduser()
        self.shards = ShardSet.open(str(self.source))
        self.variants = self.shards.variants
        index = json.loads((self.source / INDEX).read_text())
        self.rows, self.origin = index["shards"], {"shards_sha256": set_hash(index["shards"])}
        self.out = Path(config.out).expanduser() if config.out else self.source / "latents"
        if (self.out / INDEX).exists() and "codec_sha256" not in (self.out / INDEX).read_text():
            raise ValueError(f"out = {self.out} holds the {INDEX} of a set without latents: choose another folder")
        self.settings = {
            "codec_sha256": codec.sha256(), "variants": self.variants, "augment": config.augment,
            "dtype": config.dtype, "compute_dtype": config.compute_dtype,
        }  # fmt: skip

    def finished(self, row: dict) -> dict | None:
        """Return the manifest of a shard's sidecar if the sidecar is finished and up to date, else None."""
        return read_manifest(self.out / row["shard"], self.identity(row))

    def identity(self, row: dict) -> str:
        """Hash of everything that determines the bytes of a shard's sidecar, except library versions."""
        text = json.dumps([FORMAT, MEMBER, row["sha256"], self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, row: dict, line: ProgressLine, before: int) -> dict:
        """Write one sidecar and its manifest, and return the manifest.

        `before` is the number of samples done so far. Raises ValueError naming what is broken.
        """
        path, source = self.out / row["shard"], self.source / row["shard"]
        try:
            raw = read_shard(str(source))
        except ValueError as error:
            raise _broken(source, error) from None
        with atomic_file(path) as file:
            hashed = Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                samples = groupby(self._latents(raw, source), key=itemgetter(0))
                for done, (key, fields) in enumerate(samples, before + 1):
                    tensors = {name: z for _, name, z in fields}
                    add_member(tar, f"{key}.{MEMBER}", pack(tensors, {}))
                    line.show(done)
            if sha256_of(source) != row["sha256"]:
                raise _broken(source, f"{source} is not the shard that {INDEX} lists (its sha256 differs)")
        more = {
            "source_sha256": row["sha256"],
            "libraries": {name: version(name) for name in ("diffusers", "numpy", "safetensors", "torch")},
            "device": self.device.type,
        }
        return commit_shard(path, [record["__key__"] for record in raw], hashed, self.identity(row), **more)

    def finish(self, manifests: list[dict]) -> dict:
        """Write index.json, which marks the set as complete, delete leftovers of an earlier set; return the index."""
        index = {
            "format": FORMAT,
            "settings": {"vae": self.config.vae} | self.settings | self.origin,
            "set_sha256": set_hash(manifests),
            "shards": manifests,
        }
        commit(self.out, index)
        return index

    def _latents(self, raw: list[dict], source: Path) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (key, name, latent [C, h, w]) of every image in order; consecutive images of one size form a batch."""
        for _, alike in groupby(self._images(raw, source), key=lambda image: image[2].shape):
            while batch := list(islice(alike, self.config.batch)):
                z = self._encode(torch.stack([x for _, _, x in batch])).to(DTYPES[self.config.dtype])
                yield from ((key, name, z[i]) for i, (key, name, _) in enumerate(batch))

    def _images(self, raw: list[dict], source: Path) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (key, name, uint8 [3, H, W]) of HQ and of every LQ, up-sampled to the size of HQ, in every turn.

        Raises ValueError naming a broken sample.
        """
        for record in raw:
            for variant in range(self.variants):
                try:
                    sample = self.shards.decode(record, variant)
                except ValueError as error:
                    raise _broken(source, error) from None
                for turn in range(turns_of(self.config.augment)):
                    hq, lq = sample.tensors(turn)
                    if variant == 0:
                        yield sample.key, tensor_name(None, turn), hq
                    yield sample.key, tensor_name(variant, turn), lq

    @torch.inference_mode()
    def _encode(self, x: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] -> normalised latents [B, C, h, w], fp32 on the CPU.

        Raises ValueError when the size does not fit the VAE, the GPU runs out of memory, or a latent is not finite.
        """
        (h, w), unit = x.shape[2:], self.codec.downsample
        if h % unit or w % unit:
            raise ValueError(
                f"HQ of {w}x{h} px: the VAE takes multiples of {unit} px; make the shards with such a crop_px"
            )
        try:
            z = self.codec.encode(x.to(self.device).float() / 127.5 - 1).float().cpu()
        except torch.OutOfMemoryError:
            raise ValueError(f"{len(x)} images of {w}x{h} px do not fit into the GPU: set a smaller batch") from None
        if not z.isfinite().all():
            raise ValueError("the VAE's output is not finite: set compute_dtype=fp32, or check the VAE's weights")
        return z


def _broken(source: Path, error: object) -> ValueError:
    return ValueError(
        f"{error}; finished shards of latents are kept: check the shard set with `teasr verify`, "
        f"delete {source} and its .json, make it again with the command that made the set, then run this command again"
    )


def cache_latents(
    config: LatentsConfig, codec: Codec, device: torch.device, rank: int = 0, world: int = 1, overwrite: bool = False
) -> None:
    """Encode the shards that have no finished sidecar yet, or those in part `rank` of `world`.

    `codec` is on `device`, in `config.compute_dtype`. The process that finds all sidecars finished writes the index.
    Raises ValueError naming what cannot be used, also when another process makes this part, or when the folder holds
    other latents or other files and `overwrite` is not given; and OSError when the disk fails. Finished sidecars are
    kept.
    """
    work = _Set(config, codec, device)
    with claimed(work.out, work.settings | work.origin, "caching latents", rank, world, overwrite):
        _make(work, rank, world)


def _make(work: _Set, rank: int, world: int) -> None:
    """Write the missing sidecars of this part, and the index if none is missing then."""
    remove_strays(work.out)
    done = {row["shard"]: m for row in work.rows if (m := work.finished(row))}
    missing = [row for row in my_part(work.rows, rank, world) if row["shard"] not in done]
    if missing:
        (work.out / INDEX).unlink(missing_ok=True)  # it belongs to an earlier set: no reader may mix the two
    count = sum(m["nsamples"] for m in done.values())
    with ProgressLine("latents", count + sum(row["nsamples"] for row in missing), "samples", count) as line:
        for row in missing:
            done[row["shard"]] = work.write(row, line, count)
            count += row["nsamples"]
    done |= {row["shard"]: m for row in work.rows if row["shard"] not in done and (m := work.finished(row))}
    if len(done) < len(work.rows):
        print(
            f"part {rank} of {world} is finished; {len(work.rows) - len(done)} shards of other parts are still missing"
        )
        return
    index = work.finish([done[row["shard"]] for row in work.rows])
    rows, dtype = index["shards"], work.config.dtype
    print(
        f"{work.out}: latents ({dtype}) of {sum(m['nsamples'] for m in rows)} samples in {len(rows)} shards, "
        f"{sum(m['bytes'] for m in rows) / 1e6:.1f} MB, sha256 {index['set_sha256'][:12]}; to train with them, set "
        f"data.latents={work.out}"
    )
