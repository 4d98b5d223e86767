"""`Upscaler`: restore pictures of any size with a trained model.

from teasr import Upscaler
upscaler = Upscaler.from_pretrained()  # the small model shipped with teasr; or pass a folder
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
from teasr.run_config import DEFAULT_SCALE, RunConfig

MAX_SCALE = 16.0
LATENT_COPIES = 6  # the most copies of a frame's latents in host memory during sampling


@dataclass(frozen=True)
class Descriptor:
    """What a program needs to know about a model to use it."""

    scale: int  # of the training pairs; other factors work too, with varying effect
    pixel_multiple: int  # sides are padded to a multiple of it internally
    min_tile_px: int
    tile_px: int  # side of the tiles of large pictures, if memory permits
    precisions: tuple[str, ...]  # values of `dtype` in from_pretrained
    step_counts: tuple[int, ...] | None  # None: any number of steps
    dials: tuple[Dial, ...]  # trade-offs that can be set at each call
    dtypes: tuple[str, ...] = ("uint8", "uint16")  # of input and output pictures
    channels: tuple[str, ...] = ("grey", "RGB", "RGBA")


class Upscaler:
    """A trained model that restores pictures."""

    def __init__(
        self,
        model: Model,
        sampler: Sampler | None = None,
        config: RunConfig | None = None,
        device: torch.device | None = None,
    ):
        """sampler: the sampler of the model's method (default: `AnyStep`, for any number of steps).

        config: the config of the model's run, which names its scale (default without a config: 4).

        device: where the model computes (default: where its weights are). Raises ValueError for an unconditional prior,
        which cannot restore.
        """
        backbone = model.backbone
        if not backbone.restores:
            raise ValueError(
                "this model is an unconditional prior, which cannot restore: use it as backbone.base of a training"
            )
        self.model, self.backbone, self.sampler = model, backbone, sampler or AnyStep()
        self.scale, self.config = DEFAULT_SCALE if config is None else config.scale, config
        self.device = device or next(backbone.net.parameters()).device
        self._unit_bytes = float("inf")  # memory for one unit of a tile's area; measured when first needed
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
        """Load a model.

        path: a run folder (its newest checkpoint is loaded), a checkpoint, a folder written by `save_pretrained` or
        launch/export.py, `owner/name` on the hub, or the name of a model shipped with teasr. Default: the small shipped
        model; a note about it is then logged.
        weights: `ema` (averaged) or `weights` (last). dtype: one of the descriptor's precisions; default: as trained.
        offload: keep the blocks in host memory, for a GPU that is too small.

        Raises ValueError naming what is missing, damaged or not possible on this machine.
        """
        if path is None:
            path = assets.DEFAULT
            logging.getLogger(__name__).warning(assets.NOTE)
        model, sampler, config, place = pretrained.load(path, weights, device, dtype, offload)
        return cls(model, sampler, config, place)

    def save_pretrained(self, folder: str | Path, dtype: str = "fp32") -> Path:
        """Write the weights, codec and config for `from_pretrained`, atomically, and return the folder.

        dtype: the dtype to which the weights are rounded. Raises ValueError if the folder already holds other files, or
        if the model has no config.
        """
        if self.config is None:
            raise ValueError("a model without the config of its run cannot be saved: load it with from_pretrained")
        pretrained.save(self.backbone, self._exported, self.config, Path(folder), dtype)
        return Path(folder)

    @property
    def descriptor(self) -> Descriptor:
        """Scale, size multiples, tile sizes, precisions, step counts and dials of the model."""
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
        """Restore a picture in `steps` steps.

        picture: PIL image of any mode, [H, W, 3] uint8 or uint16, `Picture`, or tensor [3, H, W] or [B, 3, H, W] in
        [0, 1]. The result has the same type.
        steps: number of steps, or `auto` for the smallest number that doubling would hardly change
        (`teasr.restore.auto_steps`).
        fidelity: 0 to 1, blends the result of several steps with the one-step result; short for dials={"fidelity": ..}.
        dials: trade-offs that the model's method offers, listed in `descriptor`.
        scale: upscaling factor of the sides, at least 1 (default: the model's). size: alternatively, the (width,
        height) of the result in pixels.
        color_fix: none, wavelet, adain or lab (`teasr.imaging.color`).
        tile_px: side of the tiles of large pictures (default: the backbone's, or what fits in free memory). Device
        memory is needed for one tile, host memory for the picture and six times its latents.
        on_progress(done, all): called with the number of tiles. on_step: as in `Sampler.sample`, with latents
        [1, C, h, w] of the whole frame in host memory. say: receives a message when tiles shrink and when `auto` has
        chosen a number of steps.

        Raises ValueError for invalid arguments and for pictures that cannot be restored, MemoryError if not even a
        small tile fits.
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
                f"expected an RGB image [H, W, 3] in uint8 or uint16, but got {array.shape} in {array.dtype}"
            )
        if color_fix not in color.KINDS:
            raise ValueError(f"color_fix = {color_fix}: use one of {', '.join(color.KINDS)}")
        frame = images.resize(array, *self._size(array, scale, size))
        source = frame.copy() if color_fix != "none" else None
        dials = dict(dials or {}) | ({} if fidelity is None else {"fidelity": fidelity})
        if steps == "auto" and self.sampler.step_counts is not None:
            raise ValueError(f"steps = auto: this model supports only these step counts: {self.sampler.step_counts}")
        self.sampler.check(2 if steps == "auto" else steps, dials)
        restored = self._restore(frame, steps, seed, dials, tile_px, on_progress, on_step, say)
        if source is not None:
            color.correct(color_fix, restored, source)
        if isinstance(picture, np.ndarray):
            return restored
        made = given.restored(restored)
        return to_pil(made) if isinstance(picture, Image.Image) else made

    def _size(self, array: np.ndarray, scale: float | None, size: tuple[int, int] | None) -> tuple[int, int]:
        """Return the height and width of the result.

        Raises ValueError if scale and size are both given, or if sides would shrink or grow too much.
        """
        height, width = array.shape[:2]
        if size is not None:
            if scale is not None:
                raise ValueError("scale and size both determine the size of the result: give one of them")
            wanted = (size[1], size[0])
        else:
            factor = self.scale if scale is None else scale
            wanted = (round(height * factor), round(width * factor))
        factors = (wanted[0] / height, wanted[1] / width)
        if not (min(factors) >= 1 and max(factors) <= MAX_SCALE):
            raise ValueError(
                f"{width}x{height} px cannot be restored to {wanted[1]}x{wanted[0]}: "
                f"sides must grow by a factor of 1 to {MAX_SCALE:g}"
            )
        return wanted

    @staticmethod
    def _tensor(x: Tensor, act: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """Apply `act` to a tensor [3, H, W] or [B, 3, H, W] in [0, 1], converted to uint16 and back."""
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
        """Restore a frame [H, W, 3] that already has the size of the result; the frame may be overwritten."""
        height, width = frame.shape[:2]
        m = self.backbone.pixel_multiple
        if height % m or width % m:
            frame = np.pad(frame, ((0, -height % m), (0, -width % m), (0, 0)), mode="edge")
        side = tile_px or self._fitting_tile(frame.shape[:2])
        if steps == "auto":
            part = auto_steps.busiest(frame, max(SMALLEST, side // 2 // m) * m, m)
            steps, change = auto_steps.choose(lambda n: self._frame(part.copy(), n, 0, {}, side, None, None, say))
            say(f"{steps} step{'s' * (steps > 1)} chosen: twice as many would change the result by {change:.1f} levels")
            dials = dials if steps > 1 else {}
        return self._frame(frame, steps, seed, dials, side, on_progress, on_step, say)[:height, :width]

    def _frame(self, frame, steps, seed, dials, tile_px, on_progress, on_step, say) -> np.ndarray:
        """Restore a frame whose sides are multiples of `pixel_multiple`; the result overwrites it."""
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
        """Return the side in px of tiles that fit in free memory, for a frame of this size."""
        kept = 0
        if self.device.type == "cpu":
            places = size[0] * size[1] // self.backbone.downsample**2
            kept = LATENT_COPIES * 4 * self.backbone.latent_channels * places
        if self._unit_bytes == float("inf"):
            self._unit_bytes = bytes_of_unit(self.model, self.device)
        units = units_that_fit(self._unit_bytes, self.device, kept)
        return min(self.backbone.tile_px, units * self.backbone.pixel_multiple)
