"""Run a model tile by tile: device memory is needed for one tile, while the frame and its latents stay in host memory.
Given a scratch folder, large ones lie in temporary files there, and host memory is needed for one row of tiles.

Encoder, transformer and decoder use the same tiles, which are planned once. The velocities of all tiles are blended in
every sampling step, and the noise is drawn for the whole frame, so that neighbouring tiles produce consistent content.
If memory runs out, the tiles are made smaller and a message says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from teasr.backbones.model import NOTHING, Condition, Model
from teasr.restore import large
from teasr.restore.tiling import Plan, Tile
from teasr.util.meter import Meter, free_memory
from teasr.util.scratch import MEMORY, Scratch

OVERLAP = 1 / 8  # with each neighbouring tile, as a fraction of a tile's side
MARGIN = 1 / 32  # context at a tile's inner edges that is discarded, as a fraction of its side
SMALLEST = 8  # side of the smallest tile, in units
PROBE = 16  # side of the tile on which memory is measured, in units
USABLE = 0.8  # fraction of free memory that tiles may use
T = TypeVar("T")


class Tiled:
    """A model applied tile by tile: the methods that a sampler needs, and `encode` and `decode` for whole
    frames [H, W, 3].
    """

    def __init__(
        self,
        model: Model,
        height_px: int,
        width_px: int,
        tile_px: int,
        device: torch.device,
        say: Callable[[str], None] = print,
        on_tile: Callable[[], None] = lambda: None,
        scratch: Scratch = MEMORY,
    ):
        """Sides must be multiples of `model.pixel_multiple`. `on_tile` is called after each tile of each stage."""
        self.model, self.device, self.say, self.on_tile, self.scratch = model, device, say, on_tile, scratch
        self.unit = model.pixel_multiple
        self.places = self.unit // model.backbone.downsample  # latent pixels per unit, along a side
        self.height, self.width = height_px // self.unit, width_px // self.unit
        self._plan(max(SMALLEST, tile_px // self.unit))

    def _plan(self, size: int) -> None:
        self.size = size
        self.plan = Plan.of(self.height, self.width, size, max(3, int(size * OVERLAP)), int(size * MARGIN))

    def snap(self, t: Tensor) -> Tensor:
        """See `Model.snap`."""
        return self.model.snap(t)

    def encode(self, frame: np.ndarray) -> Tensor:
        """Encode a frame [H, W, 3] uint8 or uint16 as `Model.encode_lq` does, to [1, C, h, w] in host memory."""

        def of_tile(tile: Tile) -> Tensor:
            pixels = torch.from_numpy(self._pixels(frame, tile)).to(self.device).float()
            return self.model.encode_lq((pixels / (np.iinfo(frame.dtype).max / 2) - 1).permute(2, 0, 1)[None])

        return self._tile_by_tile(of_tile)

    def time_at(self, u: Tensor) -> Tensor:
        """See `Model.time_at`."""
        return self.model.time_at(u)

    def start_from(self, z_lq: Tensor, t: Tensor) -> Tensor:
        """See `Model.start_from`; takes and returns latents in host memory."""
        return self.model.start_from(z_lq, t)

    def adapt(self, z_lq: Tensor, t: Tensor) -> Tensor:
        """See `Model.adapt`; takes and returns latents in host memory."""
        return self._tile_by_tile(lambda tile: self.model.adapt(self._part(z_lq, tile), t.to(self.device)))

    def jump_from_coarse(self, z_lq: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """See `Model.jump_from_coarse`; takes and returns latents in host memory."""

        def of_tile(tile: Tile) -> Tensor:
            return self.model.jump_from_coarse(self._part(z_lq, tile), self._part(eps, tile), t.to(self.device))

        return self._tile_by_tile(of_tile)

    def velocity(self, z_t: Tensor, t_cur: Tensor, condition: Condition = NOTHING) -> Tensor:
        """See `Model.velocity`; takes and returns latents in host memory."""
        t = t_cur.to(self.device)
        r = None if condition.t_tar is None else condition.t_tar.to(self.device)

        def of_tile(tile: Tile) -> Tensor:
            z_lq = None if condition.z_lq is None else self._part(condition.z_lq, tile)
            return self.model.velocity(self._part(z_t, tile), t, replace(condition, z_lq=z_lq, t_tar=r))

        return self._tile_by_tile(of_tile)

    def _part(self, z: Tensor, tile: Tile) -> Tensor:
        """Copy the latents of a tile to the device."""
        return tile.of(z, self.places).to(self.device).contiguous()

    def _tile_by_tile(self, of_tile: Callable[[Tile], Tensor]) -> Tensor:
        """Compute the latents of the whole frame from those of its tiles, blended in their overlaps."""

        def all_tiles() -> Tensor:
            whole = None
            for tile in self.plan:
                z = of_tile(tile)
                whole = self._latents(z.shape[1]) if whole is None else whole
                self._add(large.plain(whole), tile, z, self.places)
                self._after(tile)
            return whole

        return self._with_room(all_tiles)

    def decode(self, z: Tensor, out: np.ndarray) -> None:
        """Decode latents in host memory into `out` [H, W, 3] uint8 or uint16, one row of tiles at a time."""

        def all_tiles() -> None:
            tops = [*self.plan.rows.starts, self.height]
            band = torch.zeros(3, self.plan.rows.size * self.unit, self.width * self.unit)
            for tile in self.plan:
                x = self.model.decode(self._part(z, tile))[0]
                inside = slice(tile.left * self.unit, (tile.left + tile.width) * self.unit)
                band[:, :, inside] += x.float().cpu() * self.plan.weight(tile, self.unit)
                if self.plan.ends_row(tile):  # rows above the next tiles are now complete
                    done = (tops[tile.row + 1] - tile.top) * self.unit
                    start = tile.top * self.unit
                    out[start : start + done] = self._to_integers(band[:, :done], out.dtype)
                    band = torch.cat((band[:, done:], torch.zeros_like(band[:, :done])), dim=1)
                self._after(tile)

        self._with_room(all_tiles)

    def _latents(self, channels: int) -> Tensor:
        return large.zeros((1, channels, self.height * self.places, self.width * self.places), self.scratch)

    def _after(self, tile: Tile) -> None:
        if self.plan.ends_row(tile):
            self.scratch.release()
        self.on_tile()

    def _pixels(self, frame: np.ndarray, tile: Tile) -> np.ndarray:
        rows = slice(tile.top * self.unit, (tile.top + tile.height) * self.unit)
        columns = slice(tile.left * self.unit, (tile.left + tile.width) * self.unit)
        return np.ascontiguousarray(frame[rows, columns])

    def _add(self, whole: Tensor, tile: Tile, part: Tensor, factor: int) -> None:
        tile.of(whole, factor).add_(part.float().cpu() * self.plan.weight(tile, factor))

    def _with_room(self, act: Callable[[], T]) -> T:
        """Call `act`, and repeat it with smaller tiles while memory does not suffice.

        Raises MemoryError if the tiles cannot be made smaller.
        """
        while True:
            try:
                return act()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                problem = " ".join(str(error).split())[:120]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.size // 2 < SMALLEST:
                raise MemoryError(
                    f"not even a tile of {self.size * self.unit} px fits in memory ({problem}): close other programs, "
                    "or use a smaller dtype or model"
                )
            self._plan(min(self.size, max(self.height, self.width)) // 2)
            self.say(f"out of memory: continuing with tiles of {self.size * self.unit} px")

    @staticmethod
    def _to_integers(x: Tensor, dtype: np.dtype) -> np.ndarray:
        max_value = np.iinfo(dtype).max
        x = ((x.clamp(-1, 1) + 1) * (max_value / 2)).round()
        return x.permute(1, 2, 0).to(torch.int32 if max_value > 255 else torch.uint8).numpy().astype(dtype, copy=False)


@torch.no_grad()
def bytes_of_unit(model: Model, device: torch.device) -> float:
    """Measure the device memory in bytes for one unit of a tile's area.

    It is measured on a square tile with a side of PROBE units. Memory is linear in the area, since attention is fused.
    Returns infinity if not even that tile fits.
    """
    side = PROBE * model.pixel_multiple
    try:
        with Meter(device.type) as meter:
            t, r = (model.snap(torch.full((1,), time, device=device)) for time in (1.0, 0.0))
            z = model.encode(torch.zeros(1, 3, side, side, device=device), t if model.role.encoder else None)
            dual = model.role.branches == "dual"
            model.decode(z - model.velocity(z, t, Condition(z, r) if dual else NOTHING))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return float("inf")
    return meter.peak / PROBE**2


def units_that_fit(unit_bytes: float, device: torch.device, kept_bytes: int) -> int:
    """Return the side, in units, of the largest tile that fits in free memory, at least SMALLEST.

    unit_bytes: memory for one unit of a tile's area. kept_bytes: free memory reserved for other purposes.
    """
    room = max(0, free_memory(device) - kept_bytes) * USABLE
    return max(SMALLEST, int((room / unit_bytes) ** 0.5))


def _out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; PyTorch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("not enough memory", "can't allocate memory", "out of memory"))
