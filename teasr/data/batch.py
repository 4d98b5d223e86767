"""The micro-batch that the data loader passes to a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Text = Tensor | tuple[Tensor, ...]


@dataclass
class Batch:
    """One micro-batch: images [B, 3, H, W] in [-1, 1].

    LQ is already up-sampled to the size of HQ. `keys` are the keys of the samples. z_hq and z_lq are their latents
    [B, C, h, w] if these were cached (`data.latents`); `methods.base.latents` encodes the images otherwise. `text`: the
    embeddings of their captions (`data.captions`), [B, T, D], or B times [1, T, D] where T may differ.
    `perceptual`: factors on the perceptual losses of the samples [B] (`data.perceptual`).
    """

    x_hq: Tensor
    x_lq: Tensor
    keys: list[str]
    z_hq: Tensor | None = None
    z_lq: Tensor | None = None
    text: Text | None = None
    perceptual: Tensor | None = None

    def rows(self, part: slice) -> Batch:
        """Return some of the samples."""
        more = (None if x is None else x[part] for x in (self.z_hq, self.z_lq, self.text, self.perceptual))
        return Batch(self.x_hq[part], self.x_lq[part], self.keys[part], *more)

    @classmethod
    def from_uint8(
        cls,
        x_hq: Tensor,
        x_lq: Tensor,
        keys: list[str],
        device: torch.device,
        z_hq: Tensor | None = None,
        z_lq: Tensor | None = None,
        text: Text | None = None,
        perceptual: Tensor | None = None,
    ) -> Batch:
        """Build a batch from uint8 images, cached latents of any dtype, and embeddings, which keep theirs.

        They are moved to the device before conversion, which transfers a quarter of the bytes of float32.
        """
        x_hq, x_lq = (x.to(device).float() / 127.5 - 1 for x in (x_hq, x_lq))
        z_hq, z_lq = (None if z is None else z.to(device).float() for z in (z_hq, z_lq))
        text = tuple(x.to(device) for x in text) if isinstance(text, tuple) else text
        text = text.to(device) if isinstance(text, Tensor) else text
        return cls(x_hq, x_lq, keys, z_hq, z_lq, text, None if perceptual is None else perceptual.to(device))
