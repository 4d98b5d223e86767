"""A lookup table over times, in host memory, that replaces the modulation layers of every block.

In Qwen-Image a third of all weights (6.8 of 20.4 B) only maps a time to shifts, scales and gates: 120 Linears whose
sole input is the time embedding. On a grid of times their outputs are 110,592 numbers per block and time, so the
outputs are stored and the layers are dropped. The table is exact on the grid, and `QwenImage.snap` rounds times to it,
so that time embeddings and noise levels agree. A LoRA on a dropped layer is kept, because it needs only the time
embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.backbones.lora import base, replace_linears
from teasr.backbones.memory.swapping import HostArena

# modulation of one block, each [B, 6 D]: noise and text tokens at t_cur, condition tokens at t_tar
Rows = tuple[Tensor, Tensor, Tensor | None]


class Tabulated(nn.Module):
    """Placeholder for a modulation layer that was replaced by the table."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Raise RuntimeError: the layer must not be called, because the table holds its values."""
        raise RuntimeError("this modulation layer was replaced by the modulation table and cannot be called")


class ModulationTable:
    """Modulation values at the times k / size.

    Image tokens: -size <= k <= size, because target times may be negative. Text tokens: 0 <= k <= size.
    """

    def __init__(self, size: int, blocks: int, width: int, dtype: torch.dtype, device: torch.device):
        """Allocate an empty table for `blocks` blocks of width D = `width`, in host memory.

        `device` is the device on which the network computes.
        """
        self.size = size
        self.arena = HostArena(device)
        self.image = self.arena.empty((2 * size + 1, blocks, 6 * width), dtype)
        self.text = self.arena.empty((size + 1, blocks, 6 * width), dtype)
        # values on their way from the device: PyTorch would allocate such memory, unlocked, for each block again
        self.arriving = self.arena.empty((2 * size + 1, 6 * width), dtype)

    @property
    def times(self) -> Tensor:
        """The time grid in ascending order, [2 size + 1] fp32."""
        return torch.arange(-self.size, self.size + 1) / self.size

    @property
    def nbytes(self) -> int:
        """Host memory in bytes."""
        return self.image.nbytes + self.text.nbytes

    @torch.no_grad()
    def take(self, i: int, block: nn.Module, temb: Tensor) -> None:
        """Compute the values of block `i` from the embeddings [2 size + 1, D] of all `times`, and drop its layers."""
        temb = F.silu(temb)
        for table, layer, y in ((self.image, block.img_mod[1], temb), (self.text, block.txt_mod[1], temb[self.size :])):
            table[:, i].copy_(self.arriving[: len(y)].copy_(base(layer, y)))
        replace_linears(block.img_mod, Tabulated)
        replace_linears(block.txt_mod, Tabulated)

    def rows(self, t_cur: Tensor, t_tar: Tensor | None) -> list[Rows]:
        """Return each block's modulation at these times [B], on their device. Raises ValueError off the grid."""
        cur = self._fetch(self.image, t_cur, self.size).unbind(1)
        text = self._fetch(self.text, t_cur, 0).unbind(1)
        tar = [None] * len(cur) if t_tar is None else self._fetch(self.image, t_tar, self.size).unbind(1)
        return list(zip(cur, text, tar, strict=True))

    def _fetch(self, table: Tensor, t: Tensor, zero: int) -> Tensor:
        """Return the rows [B, blocks, 6 D] at times [B]; `zero` is the row of time 0."""
        if table.is_meta:
            return torch.empty(len(t), *table.shape[1:], dtype=table.dtype, device=t.device)
        exact = t.detach().cpu().double() * self.size
        k = exact.round()
        if (exact - k).abs().max() > 1e-3 or (k + zero).min() < 0 or k.max() > self.size:
            raise ValueError(
                f"time {t.flatten()[(exact - k).abs().argmax()].item():g} is not in the modulation table of "
                f"{self.size} steps: round times with the backbone's `snap`, or set backbone.modulation_table=null"
            )
        rows = (k.long() + zero).tolist()
        gathered = torch.stack([table[row] for row in rows]) if len(rows) > 1 else table[rows[0]][None]
        return gathered.to(t.device, non_blocking=True)
