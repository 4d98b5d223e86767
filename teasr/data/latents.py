"""Cached latents of a shard set: the content of their sidecars, and how training reads them (`data.latents`).

A sidecar (sidecars.py) holds {key}.latents.safetensors for every sample of its shard: hq, lq [, lq.1 ..], each
[C, h, w], normalised by the codec's mean and standard deviation; LQ was up-sampled to the size of HQ first. `hq@1` ..
`hq@7` are the latents of the flipped and rotated images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teasr.data.layout import lq_field
from teasr.data.shards import ShardSet
from teasr.data.sidecars import Sidecars, open_sidecars
from teasr.util.tensor_file import unpack

MEMBER = "latents.safetensors"
REMAKE = "run `teasr cache-latents` again"
TURNS = {"none": 1, "flip": 2, "dihedral": 8}


def tensor_name(variant: int | None, turn: int) -> str:
    """Name of a latent in its sample: HQ if `variant` is None, else that LQ variant. `turn`: as in `images.turn`."""
    field = "hq" if variant is None else lq_field(variant).removesuffix(".png")
    return f"{field}@{turn}" if turn else field


@dataclass(frozen=True)
class LatentCache:
    """The opened cached latents of a shard set."""

    sidecars: Sidecars
    settings: dict[str, Any]

    @classmethod
    def open(cls, locations: tuple[str, ...], shards: ShardSet, augment: str) -> LatentCache:
        """Open the caches of the sets that `shards` joins, one location for each set, in the same order.

        Locations are written like those of shard sets. Raises ValueError when a cache is missing or belongs to other
        shards, when caches come from different codecs, or when one lacks the latents that `augment` needs.
        """

        def check(location: str, index: dict) -> None:
            settings = index.get("settings", {})
            if not {"codec_sha256", "vae", "augment"} <= set(settings) or str(settings["augment"]) not in TURNS:
                raise ValueError(
                    f"data.latents = {location} does not hold cached latents: {REMAKE}, or name its output"
                )
            have = settings["augment"]
            if turns_of(augment) > turns_of(have):
                raise ValueError(
                    f"data.augment = {augment}, but the latents in {location} were made with augment={have}: {REMAKE} "
                    f"with augment={augment}, or set data.augment={have}"
                )

        sidecars = open_sidecars("data.latents", locations, shards, "teasr cache-latents", check)
        first, *others = [index["settings"] for index in sidecars.indices]
        for location, other in zip(locations[1:], others, strict=True):
            if other["codec_sha256"] != first["codec_sha256"]:
                raise ValueError(
                    f"the latents in {locations[0]} and {location} come from different VAEs: {REMAKE} for one of them, "
                    "with the same vae="
                )
        return cls(sidecars, first)

    def check_codec(self, sha256: str) -> None:
        """Raise ValueError unless the latents come from the codec with this hash."""
        if self.settings["codec_sha256"] != sha256:
            raise ValueError(
                f"the latents in {self.sidecars.location} come from the VAE {self.settings['vae']}, not from this "
                f"run's: {REMAKE} with vae= set to this run's backbone.model, or remove data.latents"
            )

    def read(self, shard: int) -> dict[str, bytes]:
        """Return the packed latents of every sample of a shard, by key. Raises ValueError when it cannot be read."""
        return self.sidecars.read(shard, MEMBER)

    def pair(self, packed: bytes | None, key: str, shard: int, variant: int, turn: int) -> tuple[Tensor, Tensor]:
        """Unpack the latents (z_hq, z_lq) of one sample, [C, h, w] each, in the stored dtype.

        Raises ValueError when they are missing or damaged.
        """
        name = f"{self.sidecars.urls[shard]}/{key}.{MEMBER}"
        if packed is None:
            raise ValueError(f"{name} is missing: {REMAKE}")
        try:
            tensors, _ = unpack(packed, name)
            z_hq, z_lq = tensors[tensor_name(None, turn)], tensors[tensor_name(variant, turn)]
            if z_hq.ndim != 3 or z_hq.shape != z_lq.shape:
                raise ValueError(f"{name} has latents of shapes {tuple(z_hq.shape)} and {tuple(z_lq.shape)}")
        except KeyError as error:
            raise ValueError(f"{name} lacks {error}: {REMAKE}") from None
        except ValueError as error:
            raise ValueError(f"{error}: delete this shard of latents and {REMAKE}") from None
        return z_hq, z_lq


def turns_of(augment: str) -> int:
    """Number of flips and rotations (numbers of `images.turn`) that an augmentation draws from."""
    return TURNS[augment]
