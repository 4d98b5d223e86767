"""The micro-batch that the data loader passes to a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch: images [B, 3, H, W] in [-1, 1].

    LQ is already up-sampled to the size of HQ. `keys` are the keys of the samples.
    """

    x_hq: Tensor
    x_lq: Tensor
    keys: list[str]

    @classmethod
    def from_uint8(cls, x_hq: Tensor, x_lq: Tensor, keys: list[str], device: torch.device) -> Batch:
        """Build a batch from uint8 images.

        They are moved to the device before conversion, which transfers a quarter of the bytes of float32.
        """
        return cls(*(x.to(device).float() / 127.5 - 1 for x in (x_hq, x_lq)), keys)
