"""Cache the VAE latents of a shard set in sidecar shards, so that training does not need the VAE's encoder.

<out>/shard-000000.tar    {key}.latents.safetensors for every sample of the shard of the same name: hq, lq [, lq.1 ..],
                          each [C, h, w], normalised by the VAE's mean and standard deviation; LQ was up-sampled to
                          the size of HQ first
<out>/shard-000000.json   manifest, as in layout.py
<out>/index.json          index, as in layout.py; it is written last and marks the set as complete

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
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from teasr.backbones import prompts
from teasr.data.layout import FORMAT, INDEX, commit, commit_shard, lq_field, read_manifest, set_hash
from teasr.data.prep.engines import my_part
from teasr.data.prep.making import add_member
from teasr.data.shards import ShardSet, decode, read_shard
from teasr.imaging import images
from teasr.util.files import Hashed, atomic_file, remove_strays, sha256_of
from teasr.util.progress import ProgressLine

MEMBER = "latents.safetensors"


@dataclass(frozen=True)
class LatentsConfig:
    """Config of the latent cache: which shards are encoded, and with which VAE."""

    shards: str  # folder of the shard set
    vae: str  # local folder of a Qwen-Image VAE or of a model with one in vae/; or a model name on the hub
    out: str | None = None  # folder of the sidecar shards; default: latents/ inside `shards`
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the stored latents
    compute_dtype: Literal["bf16", "fp32"] = "fp32"  # of the VAE
    batch: int = 8  # images encoded at once

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}: must be >= 1")


class Encoder:
    """The frozen encoder of AutoencoderKLQwenImage. Raises ValueError when it cannot be loaded completely."""

    def __init__(self, config: LatentsConfig):
        from diffusers import AutoencoderKLQwenImage

        self.device, self.dtype = prompts.pick_device(config.device), prompts.DTYPES[config.compute_dtype]
        subfolder = prompts.vae_folder(config.vae, "vae")
        vae = prompts.load_part(AutoencoderKLQwenImage, "vae", config.vae, subfolder, self.dtype, "weights")
        self.config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
        self.sha256 = _hash_of(vae.state_dict())
        self.vae = vae.eval().requires_grad_(False).to(self.device)
        self.mean, self.std = (torch.tensor(self.config[k])[:, None, None] for k in ("latents_mean", "latents_std"))

    @torch.inference_mode()
    def __call__(self, pictures: list[np.ndarray]) -> Tensor:
        """Images of one size, uint8 [H, W, 3] -> normalised latents [B, C, h, w], fp32 on the CPU.

        The latents are (mode - mean) / standard deviation, with the mode of the VAE's posterior. Raises ValueError when
        the size does not fit the VAE, the GPU runs out of memory, or a latent is not finite.
        """
        h, w = pictures[0].shape[:2]
        unit = self.vae.spatial_compression_ratio
        if h % unit or w % unit:
            raise ValueError(f"HQ of {w}x{h} px: the VAE takes multiples of {unit} px; choose crop_px accordingly")
        x = torch.stack([images.to_tensor(x) for x in pictures])[:, :, None].to(self.device, self.dtype)
        try:
            z = self.vae.encode(x).latent_dist.mode()[:, :, 0].float().cpu()
        except torch.OutOfMemoryError:
            raise ValueError(f"{len(x)} images of {w}x{h} px do not fit in GPU memory: set a smaller batch") from None
        if not z.isfinite().all():
            raise ValueError("the VAE returns values that are not finite: set compute_dtype=fp32 or check its weights")
        return (z - self.mean) / self.std


def _hash_of(state: dict[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name, x in sorted(state.items()):
        sha256.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        sha256.update(x.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


class _Set:
    """A set of sidecar shards that is being written: its source shards, encoder and output folder."""

    def __init__(self, config: LatentsConfig):
        self.config, self.source = config, Path(config.shards).expanduser()
        self.variants = ShardSet.open(str(self.source)).variants
        self.rows = json.loads((self.source / INDEX).read_text())["shards"]
        self.out = Path(config.out).expanduser() if config.out else self.source / "latents"
        if (self.out / INDEX).exists() and "vae_sha256" not in (self.out / INDEX).read_text():
            raise ValueError(f"out = {self.out} holds the {INDEX} of a set without latents: choose another folder")
        self.encoder = Encoder(config)
        self.settings = {
            "vae_config": self.encoder.config, "vae_sha256": self.encoder.sha256, "variants": self.variants,
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
                    add_member(tar, f"{key}.{MEMBER}", prompts.pack(tensors, {"samples": len(raw)}))
                    line.show(done)
            if sha256_of(source) != row["sha256"]:
                raise _broken(source, f"{source} is not the shard that {INDEX} lists (its sha256 differs)")
        made_with = {name: version(name) for name in ("diffusers", "numpy", "safetensors", "torch")}
        keys = [record["__key__"] for record in raw]
        device = self.encoder.device.type
        return commit_shard(path, keys, hashed, self.identity(row), libraries=made_with, device=device)

    def finish(self, manifests: list[dict]) -> dict:
        """Write index.json, which marks the set as complete, delete leftovers of an earlier set; return the index."""
        index = {
            "format": FORMAT,
            "settings": {"vae": self.config.vae} | self.settings,
            "set_sha256": set_hash(manifests),
            "shards": manifests,
        }
        commit(self.out, index)
        return index

    def _latents(self, raw: list[dict], source: Path) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (key, name, latent [C, h, w]) of every image in order; consecutive images of one size form a batch."""
        for _, alike in groupby(_pictures(raw, self.variants, source), key=lambda picture: picture[2].shape):
            while batch := list(islice(alike, self.config.batch)):
                z = self.encoder([x for _, _, x in batch]).to(prompts.DTYPES[self.config.dtype])
                yield from ((key, name, z[i]) for i, (key, name, _) in enumerate(batch))


def _pictures(raw: list[dict], variants: int, source: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (key, name, uint8 [H, W, 3]) of HQ and of every LQ, up-sampled to the size of HQ.

    Raises ValueError naming a broken sample.
    """
    for record in raw:
        for variant in range(variants):
            try:
                sample = decode(record, variant)
            except ValueError as error:
                raise _broken(source, error) from None
            if variant == 0:
                yield sample.key, "hq", sample.hq
            yield sample.key, lq_field(variant).removesuffix(".png"), sample.lq_up


def _broken(source: Path, error: object) -> ValueError:
    return ValueError(
        f"{error}; finished sidecars are kept; check the set with data_prep/verify_shards.py, "
        f"delete {source} and its .json, "
        "make it again with the make_shards command of the set, then run this command again"
    )


def cache_latents(config: LatentsConfig, rank: int = 0, world: int = 1) -> None:
    """Encode the shards that have no finished sidecar yet, or those in part `rank` of `world`.

    The process that finds all sidecars finished writes the index. Raises ValueError naming what cannot be used, and
    OSError when the disk fails; finished sidecars are kept.
    """
    work = _Set(config)
    work.out.mkdir(parents=True, exist_ok=True)
    remove_strays(work.out)
    done = {row["shard"]: m for row in work.rows if (m := work.finished(row))}
    missing = [row for row in my_part(work.rows, rank, world) if row["shard"] not in done]
    if missing:
        (work.out / INDEX).unlink(missing_ok=True)  # it belongs to an earlier set: no reader may mix the two
    count = sum(m["nsamples"] for m in done.values())
    line = ProgressLine("latents", count + sum(row["nsamples"] for row in missing), "samples", count)
    for row in missing:
        done[row["shard"]] = work.write(row, line, count)
        count += row["nsamples"]
    line.close()
    done |= {row["shard"]: m for row in work.rows if row["shard"] not in done and (m := work.finished(row))}
    if len(done) < len(work.rows):
        print(f"part {rank} of {world} is done; {len(work.rows) - len(done)} shards of other parts are still missing")
        return
    index = work.finish([done[row["shard"]] for row in work.rows])
    rows = index["shards"]
    print(
        f"{work.out}: latents ({config.dtype}) of {sum(m['nsamples'] for m in rows)} samples in {len(rows)} shards, "
        f"{sum(m['bytes'] for m in rows) / 1e6:.1f} MB, sha256 {index['set_sha256'][:12]}"
    )


def read_latents(url: str) -> dict[str, dict[str, Tensor]]:
    """Read a sidecar -> {key: {"hq": [C, h, w], "lq": .., "lq.1": ..}}, normalised, in the stored dtype.

    `url` is any URL that webdataset opens. Raises ValueError when anything is missing or corrupted.
    """
    latents, samples = {}, set()
    try:
        for record in read_shard(url):
            key = record["__key__"]
            latents[key], story = prompts.unpack(record.get(MEMBER, b""), f"{url}/{key}.{MEMBER}")
            samples.add(story.get("samples"))
        if samples != {len(latents)}:
            raise ValueError(f"sidecar {url} holds {len(latents)} samples, but its metadata says {samples}")
    except ValueError as error:
        raise ValueError(f"{error}: delete this sidecar and run data_prep/cache_latents.py again") from error
    return latents
