"""A picture in, a restored picture out, in any number of steps and at any size.

from teasr import Upscaler
upscaler = Upscaler.from_pretrained("runs/demo")
upscaler(picture, steps=4).save("restored.png")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from teasr import checkpoint, color, images
from teasr.backbones.base import Backbone
from teasr.picture import Picture, from_pil, to_pil
from teasr.recipe import Recipe, load
from teasr.sampler import sample
from teasr.tiled import SMALLEST, Tiled

MAX_SCALE = 16.0


@dataclass(frozen=True)
class Descriptor:
    """What a program needs to know of a model to use it."""

    scale: int  # of the pairs that it was trained on; others work, with more or less effect
    pixel_multiple: int  # sides are padded to it inside
    min_tile_px: int
    tile_px: int  # what large pictures are cut into by default
    dtypes: tuple[str, ...] = ("uint8", "uint16")  # of pictures, in and out
    channels: tuple[str, ...] = ("grey", "RGB", "RGBA")


class Upscaler:
    """A trained model, ready to restore."""

    def __init__(self, backbone: Backbone, scale: int = 4, recipe: Recipe | None = None, source: Path | None = None):
        self.backbone, self.scale, self.recipe, self.source = backbone, scale, recipe, source
        self._exported = [name for name, p in backbone.net.named_parameters() if backbone.exports(name, p)]
        backbone.net.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema", device: str | None = None) -> Upscaler:
        """From a run folder (its newest checkpoint), a checkpoint folder or what `save_pretrained` wrote; `weights` is `ema` or `weights`.

        Raises ValueError naming what is missing or damaged.
        """
        folder = checkpoint.resolve(Path(path))
        recipe = load(folder / "config.yaml")
        file = folder / f"{weights}.safetensors"
        if not file.is_file():
            tensors = (f.stem for f in sorted(folder.glob("*.safetensors")))
            have = ", ".join(name for name in tensors if name not in ("fixed", "optimiser"))
            raise ValueError(f"{folder} holds no {file.name}; there is: {have}")
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {device}: no GPU is visible here; leave it out to restore on the CPU")
        backbone = recipe.build_backbone()
        backbone.load_fixed_state(load_file(folder / "fixed.safetensors"))
        first = folder / "weights.safetensors"
        backbone.load_weights((load_file(first) if first.is_file() else {}) | load_file(file))
        backbone.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        return cls(backbone, recipe=recipe, source=folder)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write what `from_pretrained` reads (weights, codec, config), whole or not at all; returns the folder.

        ValueError when the folder holds something else already.
        """
        folder = Path(folder)
        if self.recipe is None:
            raise ValueError("a model without a recipe cannot be saved: make it by from_pretrained")
        if folder.exists() and not (folder / checkpoint.MANIFEST).is_file() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files: choose a new folder")
        temporary = folder.with_name(f".tmp-{folder.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        parameters = dict(self.backbone.net.named_parameters())
        state = {name: parameters[name].detach().cpu().contiguous() for name in self._exported}
        save_file(state, temporary / "ema.safetensors")
        save_file(
            {n: x.cpu().contiguous() for n, x in self.backbone.fixed_state().items()}, temporary / "fixed.safetensors"
        )
        (temporary / "config.yaml").write_text(self.recipe.to_yaml())
        checkpoint.commit(temporary, folder)
        return folder

    @property
    def descriptor(self) -> Descriptor:
        """Scale, multiples, tiles and types."""
        unit = self.backbone.pixel_multiple
        return Descriptor(self.scale, unit, SMALLEST * unit, self.backbone.tile_px)

    def __call__(
        self,
        picture: Image.Image | np.ndarray | Tensor | Picture,
        steps: int = 1,
        seed: int = 0,
        *,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        color_fix: str = "none",
        tile_px: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Image.Image | np.ndarray | Tensor | Picture:
        """Restore a picture in `steps` steps; what comes in comes out: PIL of any mode, [H, W, 3] uint8 or uint16, or a tensor [3, H, W] or
        [B, 3, H, W] in [0, 1].

        scale: of its sides (default: the model's, 4), at least 1; or size: (width, height) in pixels. color_fix: none, wavelet, adain or lab
        (`teasr.color`). tile_px: side of the tiles of large pictures (default: the backbone's); device memory is that of one tile, host memory
        that of the picture and five times its latents. on_progress(done, all) counts tiles. ValueError for what cannot be restored, MemoryError
        when not even a small tile fits.
        """
        if isinstance(picture, Image.Image):
            given = from_pil(picture)
        elif isinstance(picture, Tensor):
            return self._tensor(
                picture,
                steps,
                seed,
                scale=scale,
                size=size,
                color_fix=color_fix,
                tile_px=tile_px,
                on_progress=on_progress,
            )
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
        restored = self._restore(frame, steps, seed, tile_px, on_progress)
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

    def _tensor(self, x: Tensor, steps: int, seed: int, **rest) -> Tensor:
        """[3, H, W] or [B, 3, H, W] in [0, 1], by way of 16 bit."""
        batch = x[None] if x.ndim == 3 else x
        if batch.ndim != 4 or batch.shape[1] != 3 or not x.is_floating_point():
            raise ValueError(
                f"expected a tensor [3, H, W] or [B, 3, H, W] in [0, 1], got {tuple(x.shape)} in {x.dtype}"
            )
        frames = (
            (batch.detach().float().clamp(0, 1).cpu() * 65535).round().permute(0, 2, 3, 1).numpy().astype(np.uint16)
        )
        made = np.stack([self(frame, steps, seed, **rest) for frame in frames])
        out = torch.from_numpy(made.astype(np.float32) / 65535).permute(0, 3, 1, 2).to(x)
        return out[0] if x.ndim == 3 else out

    @torch.no_grad()
    def _restore(self, frame: np.ndarray, steps: int, seed: int, tile_px: int | None, on_progress) -> np.ndarray:
        """A frame [H, W, 3] that was brought to its size already; the result may take its place in memory."""
        height, width = frame.shape[:2]
        m, device = self.backbone.pixel_multiple, next(self.backbone.net.parameters()).device
        if height % m or width % m:
            frame = np.pad(frame, ((0, -height % m), (0, -width % m), (0, 0)), mode="edge")
        done = 0

        def on_tile() -> None:
            nonlocal done
            done += 1
            if on_progress:
                on_progress(done, len(tiled.plan) * (steps + 2))

        tiled = Tiled(self.backbone, *frame.shape[:2], tile_px or self.backbone.tile_px, device, on_tile=on_tile)
        z_lq = tiled.encode(frame)
        z = sample(tiled, z_lq, torch.randn(z_lq.shape, generator=torch.Generator().manual_seed(seed)), steps)
        del z_lq
        tiled.decode(z, frame)
        return frame[:height, :width]
