"""Degradation operators optimised for one CPU core. Images are float32 [H, W, 3] in 0..255 unless stated otherwise.

The degradations have the same distribution as in public pipelines, with three deviations: resizing takes explicit
sizes and uses a true box filter for "area"; JPEG is libjpeg (integer quality, 4:2:0); and noise is looked up in
quantile tables (65,536 equally likely values of a normal variable, 2,048 of a Poisson variable) that are indexed with
random bits. bench/degradation.py measures the cost of each operator.
"""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
import scipy.fft
from scipy.special import ndtri, pdtr

cv2.setNumThreads(1)  # callers parallelise over images

MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
ERROR = 1e-4  # fraction of a kernel's weight that a blur may drop: an error of at most 0.026 grey levels
DENSE_MS = {1: 0.1, 3: 0.3, 5: 0.6, 7: 1.1, 9: 1.8, 11: 2.6}  # measured: cv2.filter2D at 512 px, by kernel size
SEPARABLE_MS = 0.15, 0.054  # cv2.sepFilter2D: cost per term, and per tap of its two passes
FFT_MS = 4.1  # for any kernel size
POISSON_BITS = 11


def blur(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate with `kernel` [k, k], with reflected borders; uint8 or float32 in, float32 out.

    Uses the cheapest of three equivalent methods: a sum of separable terms, direct filtering, or FFT. Outer rings and
    separable terms with a weight below `ERROR` are dropped.
    """
    kernel = _trim(np.asarray(kernel, np.float64))
    k = len(kernel)
    columns, rows = _separable_terms(kernel)
    separable_ms = len(rows) * (SEPARABLE_MS[0] + SEPARABLE_MS[1] * k)
    if separable_ms <= min(FFT_MS, DENSE_MS.get(k, FFT_MS)):
        total = _separable(x, rows[0], columns[0])
        for row, column in zip(rows[1:], columns[1:], strict=True):
            total += _separable(x, row, column)
        return total
    if DENSE_MS.get(k, FFT_MS) < FFT_MS:
        kernel = kernel.astype(np.float32)
        return cv2.filter2D(x.astype(np.float32, copy=False), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    return _blur_fft(x, kernel)


def _trim(kernel: np.ndarray) -> np.ndarray:
    """Drop outer rings of negligible weight and normalise the rest to sum 1."""
    while len(kernel) > 1 and np.abs(kernel).sum() - np.abs(kernel[1:-1, 1:-1]).sum() < ERROR / 2:
        kernel = kernel[1:-1, 1:-1]
    return kernel / kernel.sum()


def _separable_terms(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows, each [n, k], whose outer products sum to the kernel; n is as small as `ERROR` allows."""
    u, s, v = np.linalg.svd(kernel)
    partial = np.cumsum(u.T[:, :, None] * s[:, None, None] * v[:, None, :], axis=0)
    n = int(np.argmax(np.abs(kernel - partial).sum((1, 2)) < ERROR / 2)) + 1
    return (u[:, :n] * s[:n]).T, v[:n]


def _separable(x: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return cv2.sepFilter2D(x, cv2.CV_32F, row, column, borderType=cv2.BORDER_REFLECT_101)


def _blur_fft(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    r, (height, width) = len(kernel) // 2, x.shape[:2]
    size = tuple(scipy.fft.next_fast_len(n + 2 * r, real=True) for n in (height, width))
    border = r, size[0] - height - r, r, size[1] - width - r, cv2.BORDER_REFLECT_101
    transfer = scipy.fft.rfft2(kernel[::-1, ::-1].astype(np.float32), s=size)
    planes = []
    for plane in cv2.split(x.astype(np.float32, copy=False)):  # plane by plane: one plane fits into the cache
        spectrum = scipy.fft.rfft2(cv2.copyMakeBorder(plane, *border), overwrite_x=True)
        spectrum *= transfer
        blurred = scipy.fft.irfft2(spectrum, s=size, overwrite_x=True)
        planes.append(blurred[2 * r : 2 * r + height, 2 * r : 2 * r + width])
    return cv2.merge(planes)


def resize(x: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize to `size` (width, height); `mode`: "area" (box filter), or "bilinear" or "bicubic" (not antialiased)."""
    return x if x.shape[1::-1] == size else cv2.resize(x, size, interpolation=MODES[mode])


def resize_by(x: np.ndarray, factor: float, mode: str) -> np.ndarray:
    """Resize by `factor` to the rounded size. Image borders stay aligned, so that LQ is not shifted against HQ."""
    height, width = x.shape[:2]
    return resize(x, (max(1, round(width * factor)), max(1, round(height * factor))), mode)


def resize_relative(x: np.ndarray, size: tuple[int, int], factor: float, mode: str) -> np.ndarray:
    """Resize to `factor` times `size` (width, height), rounded."""
    return resize(x, tuple(max(1, round(n * factor)) for n in size), mode)


def gaussian_noise(x: np.ndarray, sigma: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of standard deviation `sigma` (grey levels), one value per pixel if `gray`; clip to 0..255."""
    noise = cv2.LUT(_random_uint16((*x.shape[:2], 1 if gray else 3), rng), _normal_quantiles())
    return _add(x, noise, sigma)


def poisson_noise(x: np.ndarray, scale: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Add `scale` times the Poisson noise of the rounded image (of its luma if `gray`); clip to 0..255.

    As in public code, the photon count at full white is the number of distinct levels, rounded up to a power of two.
    """
    levels = to_uint8(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) if gray else x)
    counts = (cv2.calcHist([levels], [c], None, [256], [0, 256]) for c in range(1 if gray else 3))
    distinct = np.count_nonzero(sum(counts))
    table = _poisson_quantiles(2 ** math.ceil(math.log2(distinct)))
    index = levels.astype(np.int32) << POISSON_BITS
    index |= _random_uint16(levels.shape, rng) >> (16 - POISSON_BITS)
    return _add(x, np.take(table, index), scale)


def _add(x: np.ndarray, noise: np.ndarray, weight: float) -> np.ndarray:
    """x + weight * noise, clipped to 0..255; a single plane of noise is used for all three channels."""
    if noise.shape != x.shape:
        noise = cv2.merge([noise] * 3)
    total = cv2.scaleAdd(noise, weight, x)
    return np.clip(total, 0, 255, out=total)


def _random_uint16(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    n = math.prod(shape)
    words = rng.integers(0, 2**64, -(-n // 4), dtype=np.uint64).astype("<u8", copy=False)
    return words.view("<u2")[:n].reshape(shape)


@functools.cache
def _normal_quantiles() -> np.ndarray:
    return ndtri((np.arange(65536) + 0.5) / 65536).astype(np.float32)


@functools.cache
def _poisson_quantiles(count: int) -> np.ndarray:
    """Flat [256 * 2048]: (Poisson(level / 255 * count) / count - level / 255) * 255 at equally spaced probabilities."""
    rates = np.arange(256) / 255 * count
    # The table ends twelve standard deviations above the largest rate, beyond the highest of the 2,048 quantiles.
    below = pdtr(np.arange(math.ceil(count + 12 * math.sqrt(count)) + 1)[None], rates[:, None])
    probabilities = (np.arange(2**POISSON_BITS) + 0.5) / 2**POISSON_BITS
    events = np.stack([np.searchsorted(row, probabilities) for row in below])
    return ((events - rates[:, None]) * (255 / count)).astype(np.float32).ravel()


def jpeg(x: np.ndarray, quality: float) -> np.ndarray:
    """Encode and decode with libjpeg at the nearest integer quality, 4:2:0; float32 or uint8 in, uint8 out."""
    ok, coded = cv2.imencode(
        ".jpg", cv2.cvtColor(to_uint8(x), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, round(quality)]
    )
    assert ok, "libjpeg failed to encode the image"
    return cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Round and clip to uint8."""
    return x if x.dtype == np.uint8 else cv2.convertScaleAbs(np.clip(x, 0, 255))


def sharpen(x: np.ndarray, weight: float = 0.5, side: int = 51, threshold: float = 10.0) -> np.ndarray:
    """Sharpen the ground truth by unsharp masking, uint8 in and out.

    Where the detail exceeds `threshold` grey levels, `weight` (half) of it is added. As in Real-ESRGAN's USMSharp, the
    Gaussian has 51 taps (sigma 8), and the mask is softened with the same Gaussian.
    """
    taps = cv2.getGaussianKernel(side, 0)
    detail = x - _separable(x, taps, taps)
    mask = _separable((np.abs(detail) > threshold).astype(np.float32), taps, taps)
    detail *= np.float32(weight)
    detail += x
    np.clip(detail, 0, 255, out=detail)
    detail -= x
    detail *= mask
    detail += x
    return to_uint8(detail)
