"""Split large pictures into overlapping tiles: positions of the tiles, and weights to blend their results.

A plan is in units of the backbone's `pixel_multiple`. A `factor` converts it to latent pixels or to pixels: the number
of them per unit, along a side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Spans of equal `size`, beginning at `starts`, that cover the range 0 .. length.

    The outermost `margin` positions at the inner ends of the spans are context only: their weight is zero.
    """

    length: int
    size: int
    starts: tuple[int, ...]
    margin: int = 0

    @classmethod
    def of(cls, length: int, size: int, overlap: int, margin: int = 0) -> Axis:
        """Plan the fewest spans of at most `size` that overlap their neighbours by at least `overlap`.

        The spans are made as short as this allows, since a larger overlap would be computed twice for no benefit.
        Raises ValueError if the overlap is not larger than two margins or not smaller than `size`.
        """
        if length <= size:
            return cls(length, length, (0,))
        if not 2 * margin < overlap < size:
            raise ValueError(
                f"tiles of {size} units cannot overlap by {overlap}: the overlap must be larger than two margins "
                f"({2 * margin}) and smaller than a tile"
            )
        n = math.ceil((length - overlap) / (size - overlap))
        size = math.ceil((length + (n - 1) * overlap) / n)
        return cls(length, size, tuple(round(i * (length - size) / (n - 1)) for i in range(n)), margin)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a handful of small tensors
    def weights(self, factor: int = 1) -> list[Tensor]:
        """Return the weights [size * factor] of every span, with linear ramps in overlaps; they sum to one."""
        starts, size, margin = [s * factor for s in self.starts], self.size * factor, self.margin * factor
        hats = torch.zeros(len(starts), self.length * factor, dtype=torch.float64)
        inside = torch.arange(size, dtype=torch.float64) + 0.5
        for i, start in enumerate(starts):
            hat = torch.ones(size, dtype=torch.float64)
            if i > 0:
                ramp = starts[i - 1] + size - start - 2 * margin
                hat = torch.minimum(hat, (inside - margin) / ramp)
            if i < len(starts) - 1:
                ramp = start + size - starts[i + 1] - 2 * margin
                hat = torch.minimum(hat, (size - inside - margin) / ramp)
            hats[i, start : start + size] = hat.clamp(min=0)
        shares = (hats / hats.sum(0)).float()
        return [share[s : s + size] for s, share in zip(starts, shares, strict=True)]


@dataclass(frozen=True)
class Tile:
    """One tile: its row and column in the plan, and its position and size in units."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor, factor: int = 1) -> Tensor:
        """Return the part of x [.., H, W] that the tile covers, as a view; `factor`: pixels of x per unit."""
        return x[
            ...,
            self.top * factor : (self.top + self.height) * factor,
            self.left * factor : (self.left + self.width) * factor,
        ]


@dataclass(frozen=True)
class Plan:
    """The tiles of a picture. Iterating yields them row by row."""

    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, height: int, width: int, size: int, overlap: int, margin: int = 0) -> Plan:
        """Plan the tiles; all arguments are in units. Raises ValueError if tiles are too small for their overlap."""
        return cls(Axis.of(height, size, overlap, margin), Axis.of(width, size, overlap, margin))

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def __iter__(self) -> Iterator[Tile]:
        """Yield the tiles row by row."""
        for i, top in enumerate(self.rows.starts):
            for j, left in enumerate(self.columns.starts):
                yield Tile(i, j, top, left, self.rows.size, self.columns.size)

    def ends_row(self, tile: Tile) -> bool:
        """Whether the tile is the last of its row."""
        return tile.column == len(self.columns.starts) - 1

    def weight(self, tile: Tile, factor: int = 1) -> Tensor:
        """Return the blending weights of a tile, [height * factor, width * factor]."""
        return self.rows.weights(factor)[tile.row][:, None] * self.columns.weights(factor)[tile.column]
