"""Large pictures in overlapping tiles: where the tiles lie, and weights with which their results add up to one picture.

A plan counts in units, the steps in which a backbone takes pictures; with a factor the same tiles are those of latents (places for a unit)
or of pixels.
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
    """Spans of equal `size` from `starts` on, which cover 0 .. length; `margin` places at their inner ends are context only."""

    length: int
    size: int
    starts: tuple[int, ...]
    margin: int = 0

    @classmethod
    def of(cls, length: int, size: int, overlap: int, margin: int = 0) -> Axis:
        """As few spans of at most `size` as share at least `overlap` with their neighbours, and no longer than that takes: what more they shared would
        be computed twice. ValueError when the overlap leaves no room.
        """
        if length <= size:
            return cls(length, length, (0,))
        if not 2 * margin < overlap < size:
            raise ValueError(f"tiles of {size} units cannot overlap by {overlap}, of which {2 * margin} are margin")
        n = math.ceil((length - overlap) / (size - overlap))
        size = math.ceil((length + (n - 1) * overlap) / n)
        return cls(length, size, tuple(round(i * (length - size) / (n - 1)) for i in range(n)), margin)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a handful of small tensors
    def weights(self, factor: int = 1) -> list[Tensor]:
        """[size * factor] for every span: linear ramps where spans overlap; at every place the weights sum to one."""
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
    """One tile, in units, and its place in the plan."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor, factor: int = 1) -> Tensor:
        """The part of x [.., H, W] under the tile (a view); `factor`: places of x for a unit."""
        return x[
            ...,
            self.top * factor : (self.top + self.height) * factor,
            self.left * factor : (self.left + self.width) * factor,
        ]


@dataclass(frozen=True)
class Plan:
    """The tiles of a picture."""

    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, height: int, width: int, size: int, overlap: int, margin: int = 0) -> Plan:
        """All in units. ValueError when tiles are too small for their overlap."""
        return cls(Axis.of(height, size, overlap, margin), Axis.of(width, size, overlap, margin))

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def __iter__(self) -> Iterator[Tile]:
        """Row by row."""
        for i, top in enumerate(self.rows.starts):
            for j, left in enumerate(self.columns.starts):
                yield Tile(i, j, top, left, self.rows.size, self.columns.size)

    def weight(self, tile: Tile, factor: int = 1) -> Tensor:
        """[height, width] of a tile, times factor: what its result counts at every place."""
        return self.rows.weights(factor)[tile.row][:, None] * self.columns.weights(factor)[tile.column]
