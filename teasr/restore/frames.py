"""Frames: a picture enlarged to the size of the result, from which a model restores it in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from teasr.imaging import bands
from teasr.util.scratch import Scratch

MAX_SCALE = 16.0


def factor(model_scale: float, scale: float | None, size: tuple[int, int] | None) -> float:
    """Return the factor by which sides grow if no `size` is given. Raises ValueError for a wrong scale, or for both."""
    if scale is None:
        return model_scale
    if size is not None:
        raise ValueError("scale and size both determine the size of the result: give one of them")
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"scale = {scale:g}: sides must grow by a factor of 1 to {MAX_SCALE:g}")
    return scale


def size_of_result(height: int, width: int, factor: float, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the height and width of the result of a picture [height, width].

    size: the wanted (width, height), instead of the factor. Raises ValueError if sides would shrink or grow too much.
    """
    wanted = (round(height * factor), round(width * factor)) if size is None else (size[1], size[0])
    factors = (wanted[0] / height, wanted[1] / width)
    if not (min(factors) >= 1 and max(factors) <= MAX_SCALE):
        raise ValueError(
            f"{width}x{height} px cannot be restored to {wanted[1]}x{wanted[0]}: "
            f"sides must grow by a factor of 1 to {MAX_SCALE:g}"
        )
    return wanted


def enlarged(array: np.ndarray, height: int, width: int, multiple: int, scratch: Scratch) -> np.ndarray:
    """Enlarge [h, w, 3] bicubically to [height, width, 3] and repeat the edges until both are multiples of `multiple`.

    Raises OSError if scratch cannot hold it.
    """
    frame = scratch.zeros((height + -height % multiple, width + -width % multiple, 3), array.dtype)
    bands.resize_into(frame[:height, :width], array, scratch)
    for top, bottom in bands.spans(height, frame[0].size):
        frame[top:bottom, width:] = frame[top:bottom, width - 1 : width]
        scratch.release()
    frame[height:] = frame[height - 1]
    return frame


def each_of_tensor(x: Tensor, act: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply `act` to a tensor [3, H, W] or [B, 3, H, W] in [0, 1], converted to uint16 and back.

    Raises ValueError for another shape, and for integers.
    """
    batch = x[None] if x.ndim == 3 else x
    if batch.ndim != 4 or batch.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"expected a tensor [3, H, W] or [B, 3, H, W] in [0, 1], got {tuple(x.shape)} in {x.dtype}")
    pixels = (batch.detach().float().clamp(0, 1).cpu() * 65535).round().permute(0, 2, 3, 1).numpy()
    made = np.stack([act(frame) for frame in pixels.astype(np.uint16)])
    out = torch.from_numpy(made.astype(np.float32) / 65535).permute(0, 3, 1, 2).to(x)
    return out[0] if x.ndim == 3 else out
