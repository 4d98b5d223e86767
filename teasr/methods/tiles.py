"""Pixel losses tile by tile: the same values and gradients as on the whole picture, in a fraction of the memory.

The gradient of pixel losses at a latent needs the activations of the decoder and of LPIPS, 6.4 GiB for one picture of
1024 px. Here the picture is decoded without a graph; then the losses' gradient at the picture is computed, LPIPS tile
by tile; then it goes backwards through the decoder, tile by tile. Each tile is computed with the surroundings that its
layers see, and only what belongs to the tile itself is used, so that nothing is cut off. Layers that see the whole
picture (attention in the middle of the decoder, at an eighth of the resolution) run once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teasr.backbones.model import Model
from teasr.diffusion import perceptual
from teasr.diffusion.losses import gradient_through

LPIPS_STRIDE = 16  # pixels; the coarsest features of VGG16 that LPIPS compares
LPIPS_HALO = 112  # pixels: these features see 98 pixels to each side, rounded up to the stride


@dataclass(frozen=True)
class Span:
    """One side of a tile: `start` to `end`, and with its surroundings `first` to `last`."""

    start: int
    end: int
    first: int
    last: int

    @property
    def around(self) -> slice:
        """The tile and its surroundings."""
        return slice(self.first, self.last)

    def own(self, factor: int = 1) -> slice:
        """The tile itself, in pixels of a result that begins at `first` and is `factor` times as large."""
        return slice(factor * (self.start - self.first), factor * (self.end - self.first))


def spans(length: int, side: int, halo: int) -> list[Span]:
    """Cut a length into pieces of at most `side`, each with up to `halo` around it."""
    starts = range(0, length, side)
    return [Span(i, min(i + side, length), max(0, i - halo), min(i + side + halo, length)) for i in starts]


def tiles(shape: torch.Size, side: int, halo: int) -> Iterator[tuple[Span, Span]]:
    """Yield rows and columns of each tile of an image [.., H, W]."""
    for rows in spans(shape[-2], side, halo):
        for columns in spans(shape[-1], side, halo):
            yield rows, columns


def check(model: Model, tile_px: int) -> None:
    """Raise ValueError if this model's decoder cannot run on tiles, or not on tiles of this size."""
    backbone = model.backbone
    if backbone.decoder_halo is None:
        raise ValueError(
            f"method.pixel_tile_px = {tile_px}: the decoder of {type(backbone).__name__} cannot be computed in tiles: "
            "set method.pixel_tile_px=null"
        )


@torch.no_grad()
def decode(model: Model, z: Tensor, tile_px: int) -> Tensor:
    """Decode latents [B, C, h, w] tile by tile, without a graph; the result is that of `Model.decode`."""
    backbone = model.backbone
    features, scale = backbone.decode_global(z), backbone.downsample
    x = z.new_empty(len(z), 3, scale * z.shape[-2], scale * z.shape[-1])
    for rows, columns in tiles(z.shape, tile_px // scale, backbone.decoder_halo):
        tile = backbone.decode_local(features[..., rows.around, columns.around])
        place = (slice(scale * span.start, scale * span.end) for span in (rows, columns))
        x[..., *place] = tile[..., rows.own(scale), columns.own(scale)]
    return x


def decoder_gradient(model: Model, z: Tensor, gradient: Tensor, tile_px: int) -> Tensor:
    """Return the gradient at latents z [B, C, h, w] of a loss whose gradient at their picture [B, 3, H, W] is given."""
    backbone = model.backbone
    scale = backbone.downsample
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        features = backbone.decode_global(leaf)
        below = torch.zeros_like(features, dtype=torch.promote_types(features.dtype, torch.float32))
        for rows, columns in tiles(z.shape, tile_px // scale, backbone.decoder_halo):
            part = features.detach()[..., rows.around, columns.around].requires_grad_()
            own = backbone.decode_local(part)[..., rows.own(scale), columns.own(scale)]
            place = (slice(scale * span.start, scale * span.end) for span in (rows, columns))
            below[..., rows.around, columns.around] += torch.autograd.grad(own, part, gradient[..., *place])[0]
        return torch.autograd.grad(features, leaf, below.to(features.dtype))[0]


def lpips(metric: nn.Module, x: Tensor, y: Tensor, tile_px: int) -> tuple[Tensor, Tensor]:
    """Return the mean LPIPS (on VGG16) of images [B, 3, H, W], and its gradient at x."""
    sizes = [tuple(side >> k for side in x.shape[-2:]) for k in range(5)]
    total, gradient = x.new_zeros(()), torch.zeros_like(x)
    for rows, columns in tiles(x.shape, tile_px, LPIPS_HALO):
        around = (..., rows.around, columns.around)

        def own_part(part: Tensor, rows=rows, columns=columns, around=around) -> Tensor:
            value = part.new_zeros(())
            for k, distance in enumerate(perceptual.lpips_maps(metric, part, y[around])):
                own = (_coarser(span, k, n) for span, n in zip((rows, columns), sizes[k], strict=True))
                value = value + distance[..., *own].sum() / (sizes[k][0] * sizes[k][1])
            return value / len(x)

        value, below = gradient_through(own_part, x[around])
        total += value
        gradient[around] += below
    return total, gradient


def _coarser(span: Span, k: int, whole: int) -> slice:
    """The tile itself in features of 2^k times the pixel size, whose whole length is `whole`."""
    first = span.first >> k
    return slice((span.start >> k) - first, min(span.end >> k, whole) - first)
