"""Correct the colours of a restored picture to match its source, in bands of rows to bound memory.

`wavelet`: take everything coarser than about 32 pixels from the source (StableSR's five-level decomposition).
`adain`: match the mean and standard deviation of each channel to the source (Huang and Belongie 2017).
`lab`: the same as `adain`, in CIELAB (Reinhard et al. 2001).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np

from teasr.util.scratch import MEMORY, Scratch

LEVELS = 5
REACH = 2**LEVELS - 1  # rows above and below a row that its low-pass filter reads
ROWS = 512  # processed at a time, and fewer of pictures that are wider than 32768 px
KINDS = ("none", "wavelet", "adain", "lab")


def correct(kind: str, restored: np.ndarray, source: np.ndarray, scratch: Scratch = MEMORY) -> None:
    """Correct the colours of `restored` [H, W, 3], uint8 or uint16, in place.

    `source` must have the same size and dtype. scratch: where the two lie. Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"colour correction {kind} does not exist; use one of {', '.join(KINDS)}")
    if kind == "wavelet":
        _wavelet(restored, source, scratch)
    elif kind == "adain":
        _match(restored, source, scratch, lambda x: x, lambda x: x)
    elif kind == "lab":
        to_lab, to_rgb = (partial(cv2.cvtColor, code=code) for code in (cv2.COLOR_RGB2Lab, cv2.COLOR_Lab2RGB))
        _match(restored, source, scratch, to_lab, to_rgb)


def low_pass(x: np.ndarray) -> np.ndarray:
    """Smooth [H, W, C] float32 with the kernel (1, 2, 1) / 4 dilated by 1, 2, 4, 8 and 16; edges are replicated."""
    for level in range(LEVELS):
        step = 2**level
        kernel = np.zeros(2 * step + 1, np.float32)
        kernel[[0, step, -1]] = 0.25, 0.5, 0.25
        x = cv2.sepFilter2D(x, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return x


def _spans(x: np.ndarray) -> Iterator[tuple[int, int]]:
    rows = max(1, min(ROWS, ROWS * 32768 // x.shape[1]))
    for top in range(0, len(x), rows):
        yield top, min(len(x), top + rows)


def _wavelet(restored: np.ndarray, source: np.ndarray, scratch: Scratch) -> None:
    height, kept = len(restored), restored[:0].copy()  # kept: original rows above the band
    for top, bottom in _spans(restored):
        first, last = max(0, top - REACH), min(height, bottom + REACH)
        original = np.concatenate((kept[len(kept) - (top - first) :], restored[top:last]))
        kept = original[max(0, len(original) - (last - bottom) - REACH) : len(original) - (last - bottom)].copy()
        low = low_pass(source[first:last].astype(np.float32) - original.astype(np.float32))
        inside = slice(top - first, bottom - first)
        restored[top:bottom] = _to_integers(original[inside] + low[inside], restored.dtype)
        scratch.release()


def _match(restored: np.ndarray, source: np.ndarray, scratch: Scratch, forward: Callable, inverse: Callable) -> None:
    max_value = np.float32(np.iinfo(restored.dtype).max)

    def bands(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        for top, bottom in _spans(x):
            yield slice(top, bottom), forward(x[top:bottom].astype(np.float32) / max_value)
            scratch.release()

    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = squares = np.zeros(3)
        for _, band in bands(x):
            total = total + band.sum((0, 1), dtype=np.float64)
            squares = squares + (band.astype(np.float64) ** 2).sum((0, 1))
        n = x.shape[0] * x.shape[1]
        mean = total / n
        return mean, np.sqrt(np.maximum(squares / n - mean**2, 1e-10))

    (mean, deviation), (wanted_mean, wanted) = moments(restored), moments(source)
    gain = (wanted / deviation).astype(np.float32)
    for rows, band in bands(restored):
        band = (band - mean.astype(np.float32)) * gain + wanted_mean.astype(np.float32)
        restored[rows] = _to_integers(inverse(band) * max_value, restored.dtype)


def _to_integers(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.rint(x).clip(0, np.iinfo(dtype).max).astype(dtype)
