"""A picture in, a restored picture out, in any number of steps.

from teasr.upscale import Upscaler
upscaler = Upscaler.from_pretrained("runs/demo")
upscaler(picture, steps=4).save("restored.png")
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from teasr import checkpoint, images
from teasr.backbones.base import Backbone
from teasr.recipe import Recipe, load
from teasr.sampler import restore


class Upscaler:
    """A trained model, ready to restore."""

    def __init__(self, backbone: Backbone, scale: int = 4, recipe: Recipe | None = None, source: Path | None = None):
        self.backbone, self.scale, self.recipe, self.source = backbone, scale, recipe, source
        backbone.net.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema", device: str | None = None) -> Upscaler:
        """From a run folder (its newest checkpoint) or a checkpoint folder; `weights` is `ema` or `weights`.

        Raises ValueError naming what is missing or damaged.
        """
        folder = checkpoint.resolve(Path(path))
        recipe = load(folder / "config.yaml")
        file = folder / f"{weights}.safetensors"
        if not file.is_file():
            have = ", ".join(
                f.stem for f in sorted(folder.glob("*.safetensors")) if f.stem not in ("fixed", "optimiser")
            )
            raise ValueError(f"{folder} holds no {file.name}; there is: {have}")
        backbone = recipe.build_backbone()
        backbone.load_fixed_state(load_file(folder / "fixed.safetensors"))
        backbone.load_weights(load_file(folder / "weights.safetensors") | load_file(file))
        backbone.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        return cls(backbone, recipe=recipe, source=folder)

    @torch.no_grad()
    def __call__(self, picture: Image.Image | np.ndarray, steps: int = 1, seed: int = 0) -> Image.Image | np.ndarray:
        """Restore an RGB picture (PIL or uint8 [H, W, 3]) at `scale` times its size in `steps` steps; the same type out."""
        array = np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else picture
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise ValueError(f"expected an RGB picture [H, W, 3] in uint8, got {array.shape} in {array.dtype}")
        device = next(self.backbone.net.parameters()).device
        x = images.to_tensor(images.upsample(array, self.scale))[None].to(device)
        restored = images.to_uint8(restore(self.backbone, x, steps, seed)[0])
        return Image.fromarray(restored) if isinstance(picture, Image.Image) else restored
