"""Make the latent cache of a shard set: encode its images once with the VAE, into sidecar shards (data/latents.py).

The bytes depend on the shard, the VAE, both dtypes and the library versions; another `batch` or device type may change
the last digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from teasr.data.latents import MEMBER, tensor_name, turns_of
from teasr.data.prep.sidecars import SidecarJob, make_sidecars
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


class _Latents(SidecarJob):
    """The latents of a shard set that are being written, with the VAE that makes them."""

    what, member, mark = "latents", MEMBER, "codec_sha256"
    libraries = ("diffusers", "numpy", "safetensors", "torch")

    def __init__(self, config: LatentsConfig, codec: Codec, device: torch.device):
        self.config, self.codec, self.device = config, codec, device
        settings = {"codec_sha256": codec.sha256(), "augment": config.augment}
        settings |= {"dtype": config.dtype, "compute_dtype": config.compute_dtype}
        super().__init__(config.shards, config.out, settings)
        self.settings["variants"] = self.shards.variants

    def members(self, raw: list[dict], source: Path) -> Iterator[tuple[int, str, bytes]]:
        samples = groupby(self._latents(raw, source), key=itemgetter(0))
        for i, (key, fields) in enumerate(samples):
            yield i, key, pack({name: z for _, name, z in fields}, {})

    def manifest(self) -> dict:
        return {"device": self.device.type}

    def index(self, manifests: list[dict]) -> dict:
        return {"settings": {"vae": self.config.vae}}

    def summary(self, index: dict) -> str:
        rows = index["shards"]
        return (
            f"{self.out}: latents ({self.config.dtype}) of {sum(m['nsamples'] for m in rows)} samples in {len(rows)} "
            f"shards, {sum(m['bytes'] for m in rows) / 1e6:.1f} MB, sha256 {index['set_sha256'][:12]}; to train with "
            f"them, set data.latents={self.out}"
        )

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
            for variant in range(self.shards.variants):
                try:
                    sample = self.shards.decode(record, variant)
                except ValueError as error:
                    raise self.broken(source, error) from None
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


def cache_latents(
    config: LatentsConfig, codec: Codec, device: torch.device, rank: int = 0, world: int = 1, overwrite: bool = False
) -> None:
    """Encode the shards that have no finished sidecar yet, or those in part `rank` of `world`.

    `codec` is on `device`, in `config.compute_dtype`. Raises as `make_sidecars`.
    """
    make_sidecars(_Latents(config, codec, device), rank, world, overwrite)
