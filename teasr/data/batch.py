"""What the loader hands to a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch: pictures [B, 3, H, W] in [-1, 1], LQ already brought to the size of HQ; keys name the samples."""

    x_hq: Tensor
    x_lq: Tensor
    keys: list[str]

    @classmethod
    def from_uint8(cls, x_hq: Tensor, x_lq: Tensor, keys: list[str], device: torch.device) -> Batch:
        """From uint8 pictures, moved to the device first: a quarter of the bytes of float32."""
        return cls(*(x.to(device).float() / 127.5 - 1 for x in (x_hq, x_lq)), keys)
