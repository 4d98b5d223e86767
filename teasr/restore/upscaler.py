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
from teasr.imaging import bands, color
from teasr.imaging.picture import Picture, from_pil, read, to_pil
from teasr.methods.sampler import AnyStep, Dial, Sampler
from teasr.restore import auto_steps, frames, large, pretrained
from teasr.restore.tiled import SMALLEST, Tiled, bytes_of_unit, units_that_fit
from teasr.run_config import DEFAULT_SCALE, RunConfig
from teasr.util.scratch import MEMORY, Scratch

LATENT_COPIES = 6  # the most copies of a frame's latents at once during sampling


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


def _read(path: Path) -> Picture:
    """Read a file whose result can be a PIL image. Raises ValueError otherwise."""
    picture = read(path)
    if picture.rgb.dtype == np.uint16 and (not picture.grey or picture.alpha is not None):
        raise ValueError(
            f"{path} has colours of 16 bits, which a PIL image cannot hold: restore it with `teasr upscale`, or pass "
            "teasr.imaging.picture.read(path), of which the result is a Picture too"
        )
    return picture


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
        self.model, self.backbone, self.sampler = model, backbone, (sampler or AnyStep()).suited(model)
        self.scale, self.config = DEFAULT_SCALE if config is None else config.scale, config
        self.device = device or next(backbone.net.parameters()).device
        self.offloaded = False
        self._unit_bytes = float("inf")  # memory for one unit of a tile's area; measured when first needed
        self._exported = list(backbone.exported(model.role.name))
        backbone.net.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        weights: str = "ema",
        device: str | torch.device | None = None,
        dtype: str | None = None,
        offload: bool = False,
    ) -> Upscaler:
        """Load a model.

        path: a run folder (its newest checkpoint is loaded), a checkpoint, a folder written by `save_pretrained` or
        `teasr export`, `owner/name` on the hub, or the name of a model shipped with teasr. Default: the small shipped
        model; a note about it is then logged.
        weights: `ema` (averaged) or `weights` (last). device: cpu, cuda, cuda:1 or mps (Apple); default: the NVIDIA GPU
        if there is one, otherwise the CPU. dtype: one of the descriptor's precisions; default: as trained.
        offload: keep the blocks in host memory, for a GPU that is too small.

        Raises ValueError naming what is missing, damaged or not possible on this machine.
        """
        if path is None:
            path = assets.DEFAULT
            logging.getLogger(__name__).warning(assets.NOTE)
        model, sampler, config, place = pretrained.load(path, weights, device, dtype, offload)
        made = cls(model, sampler, config, place)
        made.offloaded = offload
        return made

    def to(self, device: str | torch.device | None = None, dtype: str | None = None) -> Upscaler:
        """Move the model to a device, or let it compute in another precision; values as in `from_pretrained`.

        Raises ValueError if that is not possible: for an offloaded model, for weights that are loaded in one precision,
        or if the machine has no such device.
        """
        if self.offloaded:
            raise ValueError("an offloaded model cannot be moved: load it without offload to choose its device")
        self.device = pretrained.move(self.backbone, device, dtype) or self.device
        self._unit_bytes = float("inf")
        return self

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
        picture: str | Path | Image.Image | np.ndarray | Tensor | Picture,
        steps: int | Literal["auto"] = 1,
        seed: int | torch.Generator = 0,
        *,
        fidelity: float | None = None,
        strength: float | None = None,
        dials: Mapping[str, float] | None = None,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        color_fix: str = "none",
        tile_px: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_step: Callable[[int, int, Tensor], Tensor | None] | None = None,
        say: Callable[[str], None] = print,
        scratch: Scratch = MEMORY,
    ) -> Image.Image | np.ndarray | Tensor | Picture:
        """Restore a picture in `steps` steps.

        picture: path of a PNG, JPEG, WebP, TIFF or BMP, PIL image of any mode, [H, W, 3] uint8 or uint16, `Picture`,
        or tensor [3, H, W] or [B, 3, H, W] in [0, 1]. The result has the same type; that of a path is a PIL image.
        steps: number of steps, or `auto` for a number that suits the picture (`teasr.restore.auto_steps`).
        fidelity: 0 to 1, blends the result of several steps with the one-step result; short for dials={"fidelity": ..}.
        strength: 0 (faithful) to 1 within one step; short for dials={"strength": ..}.
        dials: trade-offs that the model's method offers, listed in `descriptor`.
        scale: upscaling factor of the sides, at least 1 (default: the model's). size: alternatively, the (width,
        height) of the result in pixels.
        color_fix: none, wavelet, adain or lab (`teasr.imaging.color`).
        tile_px: side of the tiles of large pictures (default: the backbone's, or what fits in free memory). Device
        memory is needed for one tile, host memory for the picture and six times its latents.
        on_progress(done, all): called with the number of tiles. on_step: as in `Sampler.sample`, with latents
        [1, C, h, w] of the whole frame. say: receives a message when tiles shrink and when `auto` has chosen a number
        of steps.
        scratch: with Scratch(folder), a large picture, its latents and its result lie in temporary files there rather
        than in memory: 18 bytes for each restored pixel with the small model.

        Raises ValueError for invalid arguments and for pictures that cannot be restored, MemoryError if not even a
        small tile fits, OSError if there is no room for temporary files.
        """
        as_pil = isinstance(picture, str | Path | Image.Image)
        if isinstance(picture, str | Path):
            given = _read(Path(picture))
        elif isinstance(picture, Image.Image):
            given = from_pil(picture)
        elif isinstance(picture, Tensor):
            how = {
                "fidelity": fidelity,
                "strength": strength,
                "dials": dials,
                "scale": scale,
                "size": size,
                "color_fix": color_fix,
                "tile_px": tile_px,
            }
            how |= {"on_progress": on_progress, "on_step": on_step, "say": say, "scratch": scratch}
            return frames.each_of_tensor(picture, lambda frame: self(frame, steps, seed, **how))
        else:
            given = picture if isinstance(picture, Picture) else Picture(np.ascontiguousarray(picture))
        array = given.rgb
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"expected an RGB image [H, W, 3] in uint8 or uint16, but got {array.shape} in {array.dtype}"
            )
        if color_fix not in color.KINDS:
            raise ValueError(f"color_fix = {color_fix}: use one of {', '.join(color.KINDS)}")
        short = {"fidelity": fidelity, "strength": strength}
        dials = dict(dials or {}) | {name: value for name, value in short.items() if value is not None}
        if steps == "auto" and self.sampler.step_counts is not None:
            raise ValueError(f"steps = auto: this model supports only these step counts: {self.sampler.step_counts}")
        self.sampler.check(2 if steps == "auto" else steps, dials)
        height, width = frames.size_of_result(*array.shape[:2], frames.factor(self.scale, scale, size), size)
        scratch.require(self._bytes_of_frame(height, width, array.itemsize))
        frame = frames.enlarged(array, height, width, self.backbone.pixel_multiple, scratch)
        source = bands.copy(frame[:height, :width], scratch) if color_fix != "none" else None
        restored = self._restore(frame, steps, seed, dials, tile_px, on_progress, on_step, say, scratch)
        restored = restored[:height, :width]
        if source is not None:
            color.correct(color_fix, restored, source, scratch)
        if isinstance(picture, np.ndarray):
            return restored
        made = given.restored(restored, scratch)
        return to_pil(made) if as_pil else made

    @torch.no_grad()
    def _restore(self, frame, steps, seed, dials, tile_px, on_progress, on_step, say, scratch) -> np.ndarray:
        """Restore a frame [H, W, 3] whose sides are multiples of `pixel_multiple`; the result overwrites it."""
        m = self.backbone.pixel_multiple
        side = tile_px or self._fitting_tile(*frame.shape[:2], scratch)
        if steps == "auto":
            part = auto_steps.busiest(frame, max(SMALLEST, side // 2 // m) * m, m, scratch)
            steps, why = self._chosen_steps(part, side, say)
            say(f"{steps} step{'s' * (steps > 1)} chosen: {why}")
            dials = dials if steps > 1 else {}
        return self._frame(frame, steps, seed, dials, side, on_progress, on_step, say, scratch)

    def _chosen_steps(self, part: np.ndarray, side: int, say: Callable[[str], None]) -> tuple[int, str]:
        """Return the number of steps for a picture with this most detailed part, and the reason."""
        z_lq = Tiled(self.model, *part.shape[:2], side, self.device, say).encode(part)
        if (uncertainty := self.backbone.uncertainty(z_lq.to(self.device))) is not None:
            share = f"{uncertainty:.1f} times the visible detail is expected to be missing"
            return auto_steps.by_uncertainty(uncertainty), share
        steps, change = auto_steps.choose(lambda n: self._frame(part.copy(), n, 0, {}, side, None, None, say))
        return steps, f"twice as many would change the result by {change:.1f} levels"

    def _frame(self, frame, steps, seed, dials, tile_px, on_progress, on_step, say, scratch=MEMORY) -> np.ndarray:
        done = 0

        def on_tile() -> None:
            nonlocal done
            done += 1
            if on_progress:
                on_progress(done, len(tiled.plan) * (steps + 2))

        def look(i: int, of: int, z: Tensor) -> Tensor | None:
            return on_step(i, of, large.plain(z))

        tiled = Tiled(self.model, *frame.shape[:2], tile_px, self.device, say, on_tile, scratch)
        z_lq = tiled.encode(frame)
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        eps = large.noise((1, self.backbone.latent_channels, *z_lq.shape[-2:]), generator, scratch)
        z = self.sampler.sample(tiled, z_lq, eps, steps, dials, look if on_step else None)
        del z_lq, eps
        tiled.decode(z, frame)
        return frame

    def _bytes_of_frame(self, height: int, width: int, item_bytes: int) -> int:
        """Bytes of a frame of this size, and of its latents and what an encoder adapter takes during sampling."""
        places = height * width // self.backbone.downsample**2
        channels = LATENT_COPIES * self.backbone.latent_channels
        channels += self.backbone.encoder_channels if self.model.role.encoder else 0
        return 3 * item_bytes * height * width + 4 * channels * places

    def _fitting_tile(self, height: int, width: int, scratch: Scratch) -> int:
        """Return the side in px of tiles that fit in free memory, for a frame of this size."""
        in_memory = self.device.type in ("cpu", "mps") and scratch.folder is None
        kept = self._bytes_of_frame(height, width, 0) if in_memory else 0
        if self._unit_bytes == float("inf"):
            self._unit_bytes = bytes_of_unit(self.model, self.device)
        units = units_that_fit(self._unit_bytes, self.device, kept)
        return min(self.backbone.tile_px, units * self.backbone.pixel_multiple)
