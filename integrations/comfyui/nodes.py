"""`TeasrLoad` loads a model, `TeasrUpscale` restores a batch of images with it in any number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

try:
    from teasr import Upscaler, assets
    from teasr.imaging import color
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the TEASR nodes need the package {error.name} in ComfyUI's Python: run `python -m pip install PATH`, where "
        "PATH is the folder of the teasr repository",
        name=error.name,
    ) from None

DTYPES = ("as trained", "fp32", "bf16", "fp16", "fp8", "nf4")
OWN_SCALE = 0.0  # stands for the scale of the model
WORKING_BYTES = 2**30  # room for a tile's activations that other models make; tiles shrink to what is free
OWN_STRENGTH = -1.0  # stands for the strength of the model


class TeasrLoad:
    """Load a model of teasr."""

    RETURN_TYPES, RETURN_NAMES = ("TEASR_MODEL",), ("model",)
    FUNCTION, CATEGORY = "load", "image/upscaling"
    DESCRIPTION = "Loads a model of teasr: the small one that comes with it, one of yours, or one from the hub."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Return the inputs and their widgets."""
        names = list(dict.fromkeys((assets.DEFAULT.name, *_own_models())))
        return {
            "required": {
                "model": (names, {"tooltip": "small, which comes with teasr, or a folder in ComfyUI/models/teasr"}),
                "dtype": (list(DTYPES), {"tooltip": "precision of the weights; fp8 and nf4 are for large models"}),
                "offload": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "keep the weights of a large model in host memory"},
                ),
            },
            "optional": {
                "path": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "in place of model: path of a run or an export, or owner/name (hub)",
                    },
                ),
            },
        }

    def load(self, model: str, dtype: str, offload: bool, path: str = "") -> tuple[Upscaler]:
        """Return the model. Raises ValueError naming what is missing, damaged or not possible on this machine."""
        found = path.strip() or _own_models().get(model, model)
        return (Upscaler.from_pretrained(found, dtype=None if dtype == DTYPES[0] else dtype, offload=offload),)


class TeasrUpscale:
    """Restore and enlarge a batch of images."""

    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    FUNCTION, CATEGORY = "upscale", "image/upscaling"
    DESCRIPTION = "Restores images and enlarges them. One step is fastest and most faithful; more steps add detail."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Return the inputs and their widgets."""
        return {
            "required": {
                "model": ("TEASR_MODEL",),
                "image": ("IMAGE",),
                "steps": ("INT", {"default": 1, "min": 1, "max": 30, "tooltip": "more steps: more detail, more time"}),
                "fidelity": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.05,
                     "tooltip": "with 2 steps or more: 0 is their result, 1 the result of one step"},
                ),
                "scale": (
                    "FLOAT",
                    {"default": OWN_SCALE, "min": 0.0, "max": 16.0, "step": 0.25, "tooltip": "0: that of the model"},
                ),
                "tile_px": (
                    "INT",
                    {"default": 0, "min": 0, "max": 8192, "step": 64,
                     "tooltip": "side of the tiles of large images, in px of the result; 0: what fits in memory"},
                ),
                "color_fix": (list(color.KINDS), {"tooltip": "restores the colours of the source"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
            },
            "optional": {  # comes last, so that workflows made without it keep their values
                "strength": (
                    "FLOAT",
                    {"default": OWN_STRENGTH, "min": OWN_STRENGTH, "max": 1.0, "step": 0.05,
                     "tooltip": "of one step: from 0, faithful, to 1, detailed; below 0: what the model was made for"},
                ),
            },
        }  # fmt: skip

    def upscale(
        self,
        model: Upscaler,
        image: Tensor,
        steps: int,
        fidelity: float,
        scale: float,
        tile_px: int,
        color_fix: str,
        seed: int,
        strength: float = OWN_STRENGTH,
    ) -> tuple[Tensor]:
        """image [B, H, W, C] in [0, 1] -> ([B, s H, s W, 3],); every image of a batch gets the same noise.

        Raises ValueError for settings that the model does not have.
        """
        import comfy.model_management as management

        options = {"scale": scale or None, "tile_px": tile_px or None, "color_fix": color_fix}
        if steps > 1 and fidelity > 0:
            options["fidelity"] = fidelity
        if strength >= 0:
            options["strength"] = strength
        with _loaded(model):
            restored = [
                model(one, steps, seed, on_progress=_reporter(i, len(image)), **options)
                for i, one in enumerate(image[..., :3].movedim(-1, 1))
            ]
        return (torch.stack(restored).movedim(1, -1).to(management.intermediate_device()),)


@contextmanager
def _loaded(model: Upscaler) -> Iterator[None]:
    """Move the model to ComfyUI's device, after other models have made room there, and away again at the end.

    A model with `offload` stays where it is: only one of its blocks is on the device at a time.
    """
    import comfy.model_management as management

    if model.offloaded:
        yield
        return
    device, weights = management.get_torch_device(), model.backbone.network.parameters()
    management.free_memory(sum(p.numel() * p.element_size() for p in weights) + WORKING_BYTES, device)
    try:
        model.to(device)
        yield
    finally:
        model.to(management.unet_offload_device())
        management.soft_empty_cache()


def _reporter(index: int, count: int) -> Callable[[int, int], None]:
    """Return on_progress of one image of a batch: it moves ComfyUI's progress bar and obeys its cancel button."""
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(count)

    def on_progress(done: int, of: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(index + done / of, count)

    return on_progress


def _own_models() -> dict[str, Path]:
    """Return the folders in ComfyUI/models/teasr, and in those that extra_model_paths.yaml names `teasr`, by name."""
    import folder_paths

    folder_paths.add_model_folder_path("teasr", str(Path(folder_paths.models_dir, "teasr")))
    places = [Path(place) for place in folder_paths.get_folder_paths("teasr")]
    return {
        folder.name: folder
        for place in reversed(places)  # the first place that has a name wins
        if place.is_dir()
        for folder in sorted(place.iterdir())
        if folder.is_dir()
    }
