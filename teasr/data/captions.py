"""Cached text embeddings of a set's captions: the content of their sidecars, and how training reads them.

A sidecar (sidecars.py) holds {hash of the caption}.text.safetensors for every different caption of its shard: the
embedding [T, D] of the caption and the suffix, as the model's pipeline computes it for a single prompt. The index says
what the shortest and the longest embedding of the set have for T.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from teasr.data.layout import CAPTION
from teasr.data.shards import ShardSet
from teasr.data.sidecars import Sidecars, open_sidecars
from teasr.util.tensor_file import unpack

MEMBER = "text.safetensors"
TENSOR = "embedding"
REMAKE = "run `teasr cache-captions` again"


def caption_key(caption: bytes) -> str:
    """Key of a caption's embedding: the beginning of its SHA-256."""
    return hashlib.sha256(caption).hexdigest()[:24]


@dataclass(frozen=True)
class CaptionCache:
    """The opened cached embeddings of a set's captions. `width`: D of the embeddings [T, D].

    alike: all of them have the same T, so that a batch of them is one tensor.
    """

    sidecars: Sidecars
    width: int
    alike: bool

    @classmethod
    def open(cls, locations: tuple[str, ...], shards: ShardSet) -> CaptionCache:
        """Open the caches of the sets that `shards` joins, one location for each set, in the same order.

        Raises ValueError when a cache is missing or belongs to other shards, or when caches differ in model or suffix.
        """

        def check(location: str, index: dict) -> None:
            if not {"text_model", "suffix"} <= set(index.get("settings", {})) or not {"tokens", "width"} <= set(index):
                raise ValueError(
                    f"data.captions = {location} does not hold embeddings of captions: {REMAKE}, or name its output"
                )

        sidecars = open_sidecars("data.captions", locations, shards, "teasr cache-captions", check)
        first = sidecars.indices[0]
        for location, other in zip(locations, sidecars.indices, strict=True):
            for key in ("text_model", "suffix"):
                if other["settings"][key] != first["settings"][key]:
                    raise ValueError(
                        f"the captions in {locations[0]} have {key} = {first['settings'][key]!r}, those in {location} "
                        f"{other['settings'][key]!r}: {REMAKE} for one of them with the settings of the other"
                    )
        counts = {n for index in sidecars.indices for n in index["tokens"]}
        return cls(sidecars, int(first["width"]), len(counts) == 1)

    def read(self, shard: int) -> dict[str, bytes]:
        """Return the packed embeddings of a shard's captions, by key. Raises ValueError when it cannot be read."""
        return self.sidecars.read(shard, MEMBER)

    def embedding(self, packed: dict[str, bytes], raw: dict, shard: int) -> Tensor:
        """Return the embedding [T, D] of the caption of a raw sample, from what `read` returned for its shard.

        Raises ValueError when the sample has no caption, or when its embedding is missing or damaged.
        """
        if CAPTION not in raw:
            raise ValueError(f"{raw.get('__url__', '?')}/{raw['__key__']}.{CAPTION} is missing: make the shard again")
        key = caption_key(raw[CAPTION])
        name = f"{self.sidecars.urls[shard]}/{key}.{MEMBER}"
        if key not in packed:
            raise ValueError(f"{name} is missing: {REMAKE}")
        try:
            tensors, _ = unpack(packed[key], name)
        except ValueError as error:
            raise ValueError(f"{error}: delete this shard of captions and {REMAKE}") from None
        text = tensors.get(TENSOR)
        if text is None or text.ndim != 2 or text.shape[1] != self.width:
            raise ValueError(f"{name} does not hold an embedding of width {self.width}: {REMAKE}")
        return text
