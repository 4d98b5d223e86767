"""Resize pictures in bands, so that one of any size needs little memory (`util.scratch`).

Resizing is separable: torch resizes the rows first and then the columns, and so do these functions, to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from teasr.util.scratch import MEMORY, Scratch

BAND = 2**24  # values processed at once


def spans(length: int, values: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive bands that cover 0 .. length. `values`: numbers per row of a band.

    No band is a single row if `length` is more: torch resizes a single column with other roundings.
    """
    step, start = max(2, BAND // max(1, values)), 0
    while start < length:
        stop = length if length - start - step < 2 else start + step
        yield start, stop
        start = stop


def copy(x: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Return a copy of the picture [H, W, C]."""
    out = scratch.zeros(x.shape, x.dtype)
    for top, bottom in spans(len(x), x[0].size):
        out[top:bottom] = x[top:bottom]
        scratch.release()
    return out


def resize_into(out: np.ndarray, x: np.ndarray, scratch: Scratch = MEMORY) -> None:
    """Fill `out` [H, W, 3] with what `images.resize` makes of x [h, w, 3], uint8 or uint16."""
    _resize(out, x, scratch, antialias=True)


def resize_alpha(alpha: np.ndarray, height: int, width: int, scratch: Scratch = MEMORY) -> np.ndarray:
    """Resize [h, w] uint8 or uint16 bicubically.

    A small result is OpenCV's; a large one may differ from it by a rounding.
    """
    if scratch.in_memory((height, width), alpha.itemsize):
        return cv2.resize(alpha, (width, height), interpolation=cv2.INTER_CUBIC)
    out = scratch.zeros((height, width), alpha.dtype)
    _resize(out[..., None], alpha[..., None], scratch, antialias=False)
    return out


def _resize(out: np.ndarray, x: np.ndarray, scratch: Scratch, antialias: bool) -> None:
    import torch

    def bicubic(part: np.ndarray, height: int, width: int) -> torch.Tensor:
        part = torch.from_numpy(np.ascontiguousarray(part))[None]
        return torch.nn.functional.interpolate(part, size=(height, width), mode="bicubic", antialias=antialias)[0]

    (h, _, channels), (height, width) = x.shape, out.shape[:2]
    kind = np.uint8 if antialias and x.dtype == np.uint8 else np.float32
    wide = scratch.zeros((channels * h * width,), kind)  # strip after strip, so that each is read in one piece
    strips = [
        (slice(left, right), wide[channels * h * left : channels * h * right].reshape(channels, h, right - left))
        for left, right in spans(width, height * channels)
    ]
    for top, bottom in spans(h, width * channels):
        part = x[top:bottom].transpose(2, 0, 1).astype(kind, copy=False)
        made = bicubic(part, bottom - top, width).numpy()
        for columns, strip in strips:
            strip[:, top:bottom] = made[:, :, columns]
        scratch.release()
    for columns, strip in strips:
        made = bicubic(strip, height, strip.shape[2])
        if kind == np.float32:
            made = made.round_().clamp_(0, np.iinfo(x.dtype).max)
        out[:, columns] = made.permute(1, 2, 0).numpy()
        scratch.release()
