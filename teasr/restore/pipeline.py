"""`Upscaler` with the interface of a diffusers pipeline, for programs that are written for diffusers.

from teasr.restore.pipeline import TeasrPipeline
pipe = TeasrPipeline.from_pretrained("runs/demo", torch_dtype=torch.bfloat16)
picture = pipe(image, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from teasr.restore import pretrained
from teasr.restore.upscaler import Upscaler
from teasr.util.progress import ProgressLine

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Pictures = Image.Image | np.ndarray | Tensor


@dataclass
class PipelineOutput:
    """The output of `TeasrPipeline`."""

    images: list[Image.Image] | np.ndarray | Tensor


class TeasrPipeline:
    """Restore pictures through the interface of a diffusers pipeline.

    Tiling is on by default, since it costs nothing for pictures that fit into one tile. Enabling CPU offload loads the
    model again.
    """

    def __init__(self, upscaler: Upscaler, origin: dict | None = None):
        """origin: the arguments of `Upscaler.from_pretrained`, needed to load the model again for CPU offload."""
        self.upscaler, self._origin = upscaler, origin
        self._tile_px: int | None = None
        self._progress = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        **load_options,
    ) -> TeasrPipeline:
        """Load a model like `Upscaler.from_pretrained`, which receives the other arguments (weights, device, offload).

        torch_dtype: torch.float32, torch.bfloat16 or torch.float16, or a name such as `nf4`. variant: the dtype in
        which the weights must be stored, fp32, bf16 or fp16; a model has them in one dtype only. Raises ValueError for
        a dtype that the model does not support, and for another variant than the model's.
        """
        if variant is not None:
            pretrained.check_variant(pretrained_model_name_or_path, load_options.get("weights", "ema"), variant)
        origin = {"path": pretrained_model_name_or_path, "dtype": _dtype_name(torch_dtype)} | load_options
        return cls(Upscaler.from_pretrained(**origin), origin)

    def save_pretrained(self, save_directory: str | Path, variant: str | None = None) -> None:
        """Save the model like `Upscaler.save_pretrained`; variant: dtype of the weights, fp32 (default), bf16, fp16."""
        self.upscaler.save_pretrained(save_directory, variant or "fp32")

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return self.upscaler.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes."""
        backbone = self.upscaler.backbone
        return backbone.autocast or next(backbone.network.parameters()).dtype

    def to(
        self,
        *args: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> TeasrPipeline:
        """Move the model to a device, let it compute in another precision, or both: `pipe.to("cuda", torch.bfloat16)`.

        Raises ValueError if it is offloaded, if the machine has no such device, or if the precision of its weights
        cannot be changed after loading.
        """
        for given in args:
            if isinstance(given, torch.dtype):
                dtype = given
            else:
                device = given
        self.upscaler.to(device, _dtype_name(dtype))
        if self._origin:
            moved = {"device": device, "dtype": _dtype_name(dtype)}
            self._origin |= {name: value for name, value in moved.items() if value is not None}
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the blocks in host memory and move them to the GPU one by one. Raises ValueError without a GPU."""
        if self._origin is None:
            raise ValueError("CPU offload loads the model again: create the pipeline with from_pretrained")
        origin = self._origin | {"device": str(device), "offload": True}
        self.upscaler, self._origin = Upscaler.from_pretrained(**origin), origin

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def enable_vae_tiling(self, tile_px: int | None = None) -> None:
        """Use tiles for encoder, transformer and decoder, of `tile_px` px or as large as memory allows."""
        self._tile_px = tile_px

    def disable_vae_tiling(self) -> None:
        """Process the whole picture at once. If memory does not suffice, tiles are used and a message says so."""
        self._tile_px = 2**31

    def set_progress_bar_config(self, disable: bool = False, **_) -> None:
        """Show or hide the progress of a call; the other tqdm settings are ignored."""
        self._progress = not disable

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures | Sequence[Image.Image],
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[TeasrPipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        fidelity: float | None = None,
        color_fix: str = "none",
        strength: float | None = None,
    ) -> PipelineOutput | tuple:
        """Restore one picture or several.

        image: a PIL image, a list of PIL images, a numpy array [H, W, 3] or [B, H, W, 3] (uint8, uint16, or float in
        [0, 1]), or a tensor [B, 3, H, W].
        generator: for the noise, on any device; a list holds one generator per picture.
        height, width: size of the result in px (default: that of the input times the model's scale).
        fidelity, strength: 0 to 1, for models that have these dials (`Upscaler.descriptor`).
        output_type: `pil`, `np` (float in [0, 1], [B, H, W, 3]) or `pt` ([B, 3, H, W]).
        callback_on_step_end(pipe, i, t, {"latents": [1, C, h, w]}) is called after each step of each picture and may
        return other latents, in a dictionary with the same key.

        Raises ValueError for invalid arguments and for pictures that cannot be restored.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type = {output_type}: must be pil, np or pt")
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs = {callback_on_step_end_tensor_inputs}: only 'latents' is allowed"
            )
        if (height is None) != (width is None):
            raise ValueError("height and width must be given together: pass both or neither")
        pictures = _list(image)
        generators = generator if isinstance(generator, list) else [generator] * len(pictures)
        if len(generators) != len(pictures):
            raise ValueError(
                f"{len(generators)} generators for {len(pictures)} images: pass one generator, or one for each image"
            )
        size = None if width is None else (width, height)
        restored = []
        with ProgressLine("restore", len(pictures) * num_inference_steps, "steps", enabled=self._progress) as line:
            for picture, own_generator in zip(pictures, generators, strict=True):
                step = self._on_step(line, callback_on_step_end)
                noise = torch.Generator().manual_seed(torch.seed()) if own_generator is None else own_generator
                options = {
                    "size": size,
                    "fidelity": fidelity,
                    "strength": strength,
                    "color_fix": color_fix,
                    "tile_px": self._tile_px,
                    "on_step": step,
                }
                restored.append(self.upscaler(picture, num_inference_steps, noise, **options))
        result = _pack(restored, output_type)
        return PipelineOutput(result) if return_dict else (result,)

    def _on_step(self, line: ProgressLine, callback: Callable | None) -> Callable:
        def on_step(i: int, steps: int, z: Tensor) -> Tensor | None:
            line.add(1)
            if callback is None:
                return None
            t_cur = self.upscaler.sampler.times(steps)[i - 1][0]
            return (callback(self, i - 1, t_cur, {"latents": z}) or {}).get("latents")

        return on_step


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    if isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        raise ValueError(f"torch_dtype = {dtype}: use one of {', '.join(map(str, DTYPES))}, or a name such as 'nf4'")
    return DTYPES.get(dtype, dtype)


def _list(image: Pictures | Sequence[Image.Image]) -> list[Pictures]:
    """Split the input into single pictures; float arrays are converted to uint16."""
    if isinstance(image, Image.Image):
        return [image]
    if isinstance(image, np.ndarray):
        batch = image[None] if image.ndim == 3 else image
        if batch.ndim != 4:
            raise ValueError(f"expected an array [H, W, 3] or [B, H, W, 3], got {image.shape}")
        return list((batch.clip(0, 1) * 65535).round().astype(np.uint16) if batch.dtype.kind == "f" else batch)
    if isinstance(image, Tensor):
        return list(image[None] if image.ndim == 3 else image)
    pictures = list(image)
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise ValueError("expected an image or a list of PIL images; stack several arrays or tensors into one batch")
    return pictures


def _pack(restored: list[Pictures], output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pil":
        return [
            x if isinstance(x, Image.Image) else Image.fromarray((_floats(x) * 255).round().astype(np.uint8))
            for x in restored
        ]
    floats = [_floats(x) for x in restored]
    if len({x.shape for x in floats}) > 1:
        raise ValueError("images of different sizes cannot be stacked: use output_type='pil'")
    batch = np.stack(floats)
    return batch if output_type == "np" else torch.from_numpy(batch).permute(0, 3, 1, 2)


def _floats(x: Pictures) -> np.ndarray:
    """[H, W, 3] float32 in [0, 1]."""
    if isinstance(x, Tensor):
        return x.permute(1, 2, 0).float().cpu().numpy()
    x = np.asarray(x.convert("RGB")) if isinstance(x, Image.Image) else x
    return x.astype(np.float32) / np.iinfo(x.dtype).max
