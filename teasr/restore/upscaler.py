"""A picture in, a restored picture out, in any number of steps and at any size.

from teasr import Upscaler
upscaler = Upscaler.from_pretrained()  # the small model that comes along, or a folder
upscaler(picture, steps=4).save("restored.png")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from teasr import assets
from teasr.backbones.model import Model
from teasr.imaging import color, images
from teasr.imaging.picture import Picture, from_pil, to_pil
from teasr.methods.sampler import AnyStep, Dial, Sampler
from teasr.restore import auto_steps, pretrained
from teasr.restore.tiled import SMALLEST, Tiled, bytes_of_unit, units_that_fit
from teasr.run_config import RunConfig

MAX_SCALE = 16.0
LATENT_COPIES = 6  # of a frame's latents in host memory while it is sampled, at most


@dataclass(frozen=True)
class Descriptor:
    """What a program needs to know of a model to use it."""

    scale: int  # of the pairs that it was trained on; others work, with more or less effect
    pixel_multiple: int  # sides are padded to it inside
    min_tile_px: int
    tile_px: int  # what large pictures are cut into, memory permitting
    precisions: tuple[str, ...]  # for `dtype` of from_pretrained
    step_counts: tuple[int, ...] | None  # None: any number of steps
    dials: tuple[Dial, ...]  # trades that may be chosen at each call
    dtypes: tuple[str, ...] = ("uint8", "uint16")  # of pictures, in and out
    channels: tuple[str, ...] = ("grey", "RGB", "RGBA")


class Upscaler:
    """A trained model, ready to restore."""

    def __init__(
        self,
        model: Model,
        sampler: Sampler | None = None,
        scale: int = 4,
        config: RunConfig | None = None,
        device: torch.device | None = None,
    ):
        """sampler: how its method restores (default: in any number of steps). device: where the model computes, if not where its weights are."""
        backbone = model.backbone
        if not backbone.restores:
            raise ValueError(
                "this is an unconditional prior: training starts from it (backbone.base), it restores nothing"
            )
        self.model, self.backbone, self.sampler = model, backbone, sampler or AnyStep()
        self.scale, self.config = scale, config
        self.device = device or next(backbone.net.parameters()).device
        self._unit_bytes = float("inf")  # of a tile's area; counted when first needed
        self._exported = list(backbone.exported(model.role.name))
        backbone.net.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        weights: str = "ema",
        device: str | None = None,
        dtype: str | None = None,
        offload: bool = False,
    ) -> Upscaler:
        """From a run folder (its newest checkpoint), a checkpoint, what `save_pretrained` or launch/export.py wrote, `owner/name` on the
        hub, or the name of a shipped model; none: the small one, of which the log says what it is.

        weights: `ema` (averaged) or `weights` (last). dtype: one of the descriptor's precisions; default: as trained. offload: for a GPU that is
        too small, blocks stay in host memory. Raises ValueError naming what is missing, damaged or impossible here.
        """
        if path is None:
            path = assets.DEFAULT
            logging.getLogger(__name__).warning(assets.NOTE)
        model, sampler, config, place = pretrained.load(path, weights, device, dtype, offload)
        return cls(model, sampler, config=config, device=place)

    def save_pretrained(self, folder: str | Path, dtype: str = "fp32") -> Path:
        """Write what `from_pretrained` reads (weights, codec, config), whole or not at all; returns the folder. dtype: weights rounded to it.

        ValueError when the folder holds something else already.
        """
        if self.config is None:
            raise ValueError("a model without its run's configuration cannot be saved: make it by from_pretrained")
        pretrained.save(self.backbone, self._exported, self.config, Path(folder), dtype)
        return Path(folder)

    @property
    def descriptor(self) -> Descriptor:
        """Scale, multiples, tiles and types."""
        unit = self.backbone.pixel_multiple
        sizes = (self.scale, unit, SMALLEST * unit, self.backbone.tile_px)
        return Descriptor(*sizes, self.backbone.dtypes, self.sampler.step_counts, self.sampler.dials)

    def __call__(
        self,
        picture: Image.Image | np.ndarray | Tensor | Picture,
        steps: int | Literal["auto"] = 1,
        seed: int | torch.Generator = 0,
        *,
        fidelity: float | None = None,
        dials: Mapping[str, float] | None = None,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        color_fix: str = "none",
        tile_px: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_step: Callable[[int, int, Tensor], Tensor | None] | None = None,
        say: Callable[[str], None] = print,
    ) -> Image.Image | np.ndarray | Tensor | Picture:
        """Restore a picture in `steps` steps; what comes in comes out: PIL of any mode, [H, W, 3] uint8 or uint16, or a tensor [3, H, W] or
        [B, 3, H, W] in [0, 1].

        steps: `auto` takes as few as give what twice as many would (`teasr.restore.auto_steps`). fidelity: 0 to 1, blends the result of several
        steps with the one-step result; short for dials={"fidelity": ..}. dials: trades that the model's method offers, as `descriptor` lists them. scale: of the sides (default: the model's, 4), at least 1; or size: (width, height) in pixels.
        color_fix: none, wavelet, adain or lab (`teasr.imaging.color`). tile_px: side of the tiles of large pictures (default: the backbone's, or
        what fits in free memory); device memory is that of one tile, host memory that of the picture and six times its latents.
        on_progress(done, all) counts tiles; on_step as in `Sampler.sample`, with latents [1, C, h, w] of the whole frame in host memory; `say` is
        told when tiles shrink and what `auto` chose. ValueError for what cannot be restored, MemoryError when not even a small tile fits.
        """
        if isinstance(picture, Image.Image):
            given = from_pil(picture)
        elif isinstance(picture, Tensor):
            how = {
                "fidelity": fidelity,
                "dials": dials,
                "scale": scale,
                "size": size,
                "color_fix": color_fix,
                "tile_px": tile_px,
            }
            how |= {"on_progress": on_progress, "on_step": on_step, "say": say}
            return self._tensor(picture, lambda frame: self(frame, steps, seed, **how))
        else:
            given = picture if isinstance(picture, Picture) else Picture(np.ascontiguousarray(picture))
        array = given.rgb
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"expected an RGB picture [H, W, 3] in uint8 or uint16, got {array.shape} in {array.dtype}"
            )
        if color_fix not in color.KINDS:
            raise ValueError(f"color_fix = {color_fix}: {', '.join(color.KINDS)}")
        frame = images.resize(array, *self._size(array, scale, size))
        source = frame.copy() if color_fix != "none" else None
        dials = dict(dials or {}) | ({} if fidelity is None else {"fidelity": fidelity})
        if steps == "auto" and self.sampler.step_counts is not None:
            raise ValueError(f"steps = auto: this model's method restores in {self.sampler.step_counts} step(s) alone")
        self.sampler.check(2 if steps == "auto" else steps, dials)
        restored = self._restore(frame, steps, seed, dials, tile_px, on_progress, on_step, say)
        if source is not None:
            color.correct(color_fix, restored, source)
        if isinstance(picture, np.ndarray):
            return restored
        made = given.restored(restored)
        return to_pil(made) if isinstance(picture, Image.Image) else made

    def _size(self, array: np.ndarray, scale: float | None, size: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = array.shape[:2]
        if size is not None:
            if scale is not None:
                raise ValueError("scale and size are two ways to say the same: give one")
            wanted = (size[1], size[0])
        else:
            factor = self.scale if scale is None else scale
            wanted = (round(height * factor), round(width * factor))
        factors = (wanted[0] / height, wanted[1] / width)
        if not (min(factors) >= 1 and max(factors) <= MAX_SCALE):
            raise ValueError(
                f"{width}x{height} px cannot be restored to {wanted[1]}x{wanted[0]}: sides may grow 1 to {MAX_SCALE:g} times"
            )
        return wanted

    @staticmethod
    def _tensor(x: Tensor, act: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """[3, H, W] or [B, 3, H, W] in [0, 1], by way of 16 bit."""
        batch = x[None] if x.ndim == 3 else x
        if batch.ndim != 4 or batch.shape[1] != 3 or not x.is_floating_point():
            raise ValueError(
                f"expected a tensor [3, H, W] or [B, 3, H, W] in [0, 1], got {tuple(x.shape)} in {x.dtype}"
            )
        frames = (batch.detach().float().clamp(0, 1).cpu() * 65535).round().permute(0, 2, 3, 1).numpy()
        made = np.stack([act(frame) for frame in frames.astype(np.uint16)])
        out = torch.from_numpy(made.astype(np.float32) / 65535).permute(0, 3, 1, 2).to(x)
        return out[0] if x.ndim == 3 else out

    @torch.no_grad()
    def _restore(self, frame, steps, seed, dials, tile_px, on_progress, on_step, say) -> np.ndarray:
        """A frame [H, W, 3] that was brought to its size already; the result may take its place in memory."""
        height, width = frame.shape[:2]
        m = self.backbone.pixel_multiple
        if height % m or width % m:
            frame = np.pad(frame, ((0, -height % m), (0, -width % m), (0, 0)), mode="edge")
        side = tile_px or self._fitting_tile(frame.shape[:2])
        if steps == "auto":
            part = auto_steps.busiest(frame, max(SMALLEST, side // 2 // m) * m, m)
            steps, change = auto_steps.choose(lambda n: self._frame(part.copy(), n, 0, {}, side, None, None, say))
            say(f"{steps} step{'s' * (steps > 1)} chosen: twice as many would change {change:.1f} levels")
            dials = dials if steps > 1 else {}
        return self._frame(frame, steps, seed, dials, side, on_progress, on_step, say)[:height, :width]

    def _frame(self, frame, steps, seed, dials, tile_px, on_progress, on_step, say) -> np.ndarray:
        """A frame whose sides are multiples of `pixel_multiple`; the result takes its place in memory."""
        done = 0

        def on_tile() -> None:
            nonlocal done
            done += 1
            if on_progress:
                on_progress(done, len(tiled.plan) * (steps + 2))

        tiled = Tiled(self.model, *frame.shape[:2], tile_px, self.device, say, on_tile)
        z_lq = tiled.encode(frame)
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        eps = torch.randn(z_lq.shape, generator=generator, device=generator.device).cpu()
        z = self.sampler.sample(tiled, z_lq, eps, steps, dials, on_step)
        del z_lq, eps
        tiled.decode(z, frame)
        return frame

    def _fitting_tile(self, size: tuple[int, int]) -> int:
        """Side in px for a frame of this size."""
        kept = 0
        if self.device.type == "cpu":
            places = size[0] * size[1] // self.backbone.downsample**2
            kept = LATENT_COPIES * 4 * self.backbone.latent_channels * places
        if self._unit_bytes == float("inf"):
            self._unit_bytes = bytes_of_unit(self.model, self.device)
        units = units_that_fit(self._unit_bytes, self.device, kept)
        return min(self.backbone.tile_px, units * self.backbone.pixel_multiple)
