"""Make the cached text embeddings of a set's captions: each different caption of a shard once (data/captions.py).

The bytes depend on the captions, the suffix, the text encoders, the dtype and the library versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from teasr.data.captions import MEMBER, TENSOR, caption_key
from teasr.data.layout import CAPTION
from teasr.data.prep.sidecars import SidecarJob, make_sidecars
from teasr.util.tensor_file import pack


@dataclass(frozen=True)
class CaptionsConfig:
    """Config of the embeddings: which shards' captions are embedded, and with which model."""

    shards: str  # folder of a shard set that was made with captions=files
    model: str  # local folder of a diffusers model, or its name on the hub
    out: str | None = None  # folder of the sidecar shards; default: captions/ inside `shards`
    suffix: str = ""  # appended to every caption, such as ", clean, high-resolution, 8k"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the text encoders and of the stored embeddings


class _Captions(SidecarJob):
    """The embeddings of a set's captions that are being written, with the function that computes them."""

    what, member, mark = "captions", MEMBER, "text_model"
    libraries = ("diffusers", "safetensors", "torch", "transformers")

    def __init__(self, config: CaptionsConfig, embed: Callable[[str], Tensor]):
        self.config, self.embed, self.sizes = config, embed, set()
        settings = {"text_model": config.model, "suffix": config.suffix, "dtype": config.dtype}
        super().__init__(config.shards, config.out, settings)
        if self.shards.settings.get("captions", "none") == "none":
            raise ValueError(
                f"shards = {config.shards} has no captions: make the set with `teasr prepare .. captions=files`, which "
                "reads photo.txt beside photo.jpg"
            )

    def members(self, raw: list[dict], source: Path) -> Iterator[tuple[int, str, bytes]]:
        seen, self.sizes = set(), set()
        for i, record in enumerate(raw):
            if CAPTION not in record:
                raise self.broken(source, f"{source}/{record['__key__']}.{CAPTION} is missing")
            if (key := caption_key(record[CAPTION])) in seen:
                continue
            seen.add(key)
            text = self.embed(record[CAPTION].decode() + self.config.suffix)
            if not text.isfinite().all():
                raise ValueError(f"the embedding of {record[CAPTION].decode()!r} is not finite: set dtype=fp32")
            self.sizes.add(tuple(text.shape))
            yield i, key, pack({TENSOR: text}, {})

    def manifest(self) -> dict:
        tokens = [n for n, _ in self.sizes]
        return {"tokens": [min(tokens), max(tokens)], "width": max(width for _, width in self.sizes)}

    def index(self, manifests: list[dict]) -> dict:
        tokens = [n for m in manifests for n in m["tokens"]]
        return {"tokens": [min(tokens), max(tokens)], "width": manifests[0]["width"]}

    def summary(self, index: dict) -> str:
        rows, (low, high) = index["shards"], index["tokens"]
        return (
            f"{self.out}: {sum(m['nsamples'] for m in rows)} embeddings ({self.config.dtype}) of the captions of "
            f"{len(self.shards)} samples in {len(rows)} shards, {low if low == high else f'{low} to {high}'} tokens of "
            f"width {index['width']}, {sum(m['bytes'] for m in rows) / 1e6:.1f} MB, sha256 {index['set_sha256'][:12]}; "
            f"to train with them, set data.captions={self.out}"
        )


def cache_captions(
    config: CaptionsConfig, embed: Callable[[str], Tensor], rank: int = 0, world: int = 1, overwrite: bool = False
) -> None:
    """Embed the captions of the shards that have no finished sidecar yet, or of those in part `rank` of `world`.

    embed: a prompt -> its embedding [T, D], without padding that a mask would have to hide. Raises as `make_sidecars`.
    """
    make_sidecars(_Captions(config, embed), rank, world, overwrite)
