"""Degradation operators that reproduce public code (BasicSR), for parity with models trained with it.

The interface is the same as in fast.py (float32 [H, W, 3] in 0..255). BasicSR's operators differ as follows:
- The first resize samples at steps of the exact factor but floors the output size, so that LQ is shifted against HQ by
  up to several pixels.
- "area" is adaptive average pooling.
- JPEG is a float approximation with transposed quantisation tables, nearest-neighbour chroma, zero padding, a float
  quality and no rounding of pixels.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import scipy.fft

# Luma and chroma tables of the JPEG standard, Annex K; transposed, as in BasicSR.
LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
], np.float32).T  # fmt: skip
CHROMA = np.full((8, 8), 99, np.float32)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]  # symmetric
YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], np.float32)


def blur(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate with `kernel` [k, k], with reflected borders; float32 out."""
    return cv2.filter2D(x, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT_101)


def resize(x: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize to `size` (width, height) like `F.interpolate(size=...)`."""
    return _resample(x, size, (x.shape[1] / size[0], x.shape[0] / size[1]), mode)


def resize_by(x: np.ndarray, factor: float, mode: str) -> np.ndarray:
    """Resize like `F.interpolate(scale_factor=...)`: floored output size, sampling steps of 1 / factor."""
    size = (math.floor(x.shape[1] * factor), math.floor(x.shape[0] * factor))
    return _resample(x, size, (1 / factor, 1 / factor), mode)


def resize_relative(x: np.ndarray, size: tuple[int, int], factor: float, mode: str) -> np.ndarray:
    """Resize to `factor` times `size` (width, height), floored."""
    return resize(x, (int(size[0] * factor), int(size[1] * factor)), mode)


def _resample(x: np.ndarray, size: tuple[int, int], step: tuple[float, float], mode: str) -> np.ndarray:
    columns, rows = (_weights(n, m, s, mode) for n, m, s in zip(x.shape[1::-1], size, step, strict=True))
    return np.einsum("ay,yxc,bx->abc", rows, x, columns, optimize=True).astype(np.float32, copy=False)


def _weights(n: int, m: int, step: float, mode: str) -> np.ndarray:
    """Interpolation matrix [m, n]: the weight of each of n inputs in each of m outputs."""
    weights, out = np.zeros((m, n)), np.arange(m)
    if mode == "area":
        for i in out:
            low, high = i * n // m, -(-(i + 1) * n // m)
            weights[i, low:high] = 1 / (high - low)
        return weights.astype(np.float32)
    centre = (out + 0.5) * step - 0.5
    if mode == "bilinear":
        centre = np.maximum(centre, 0)
    first = np.floor(centre)
    for tap in (0, 1) if mode == "bilinear" else (-1, 0, 1, 2):
        distance = np.abs(centre - first - tap)
        weight = 1 - distance if mode == "bilinear" else _cubic(distance)
        np.add.at(weights, (out, np.clip(first + tap, 0, n - 1).astype(int)), weight)
    return weights.astype(np.float32)


def _cubic(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    return np.where(d <= 1, near, a * (((d - 5) * d + 8) * d - 4))


def gaussian_noise(x: np.ndarray, sigma: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of standard deviation `sigma` (grey levels), one value per pixel if `gray`; clip to 0..255."""
    noise = rng.standard_normal((*x.shape[:2], 1 if gray else 3), dtype=np.float32)
    return (x + noise * np.float32(sigma)).clip(0, 255)


def poisson_noise(x: np.ndarray, scale: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Add `scale` times the Poisson noise of the rounded image (of its luma if `gray`); clip to 0..255."""
    base = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] if gray else x
    levels = base.round().clip(0, 255)
    count = 2 ** math.ceil(math.log2(len(np.unique(levels))))
    noise = rng.poisson(levels / 255 * count) * (255 / count) - levels
    return (x + scale * noise).clip(0, 255).astype(np.float32)


def jpeg(x: np.ndarray, quality: float) -> np.ndarray:
    """Encode and decode like DiffJPEG, in float32 with a float quality; float32 out, not rounded."""
    height, width = x.shape[:2]
    padded = np.pad(np.clip(x, 0, 255).astype(np.float32), ((0, -height % 16), (0, -width % 16), (0, 0)))
    factor = np.float32((5000 / quality if quality < 50 else 200 - quality * 2) / 100)
    y, *chroma = np.moveaxis(padded @ YCC.T, 2, 0)
    chroma = [(c + 128).reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2).mean((1, 3)) for c in chroma]
    y = _quantise(y, LUMA * factor)
    chroma = [_quantise(c, CHROMA * factor).repeat(2, 0).repeat(2, 1) - 128 for c in chroma]
    rgb = np.stack([y, *chroma], axis=2) @ RGB.T
    return rgb[:height, :width].clip(0, 255)


def _quantise(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Apply the blockwise DCT, round to multiples of `table`, and invert it; the plane is in 0..255."""
    h, w = plane.shape
    blocks = (plane - 128).reshape(h // 8, 8, w // 8, 8).swapaxes(1, 2)
    coefficients = np.round(scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho") / table) * table
    return scipy.fft.idctn(coefficients, axes=(2, 3), norm="ortho").swapaxes(1, 2).reshape(h, w) + 128
