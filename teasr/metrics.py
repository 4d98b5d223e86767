"""Picture quality: PSNR and SSIM on luma, in the protocol of the published Real-ISR tables (OSEDiff's).

Both take [H, W, 3] uint8 RGB, convert to BT.601 luma of limited range (ycbcr) and crop no border. They equal pyiqa's
`psnr` and `ssim` with test_y_channel=True, color_space='ycbcr' (whose small constant in PSNR is kept).
"""

from __future__ import annotations

import cv2
import numpy as np

LUMA = np.array([65.481, 128.553, 24.966]) / 255  # of 8-bit RGB, + 16: BT.601 limited range
PSNR_EPS = 1e-8  # pyiqa adds it to the mean squared error of [0, 1] luma


def luma(x: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 RGB -> Y of YCbCr in 16..235, float64 [H, W]."""
    return x.astype(np.float64) @ LUMA + 16


def psnr_y(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio on luma in dB. ValueError when the sizes differ."""
    _same_size(a, b)
    mse = np.mean(((luma(a) - luma(b)) / 255) ** 2)
    return float(10 * np.log10(1 / (mse + PSNR_EPS)))


def ssim_y(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) on luma rounded to integers, Gaussian window 11 with sigma 1.5, valid region."""
    _same_size(a, b)
    if min(a.shape[:2]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11x11 px, got {a.shape[1]}x{a.shape[0]}")
    x, y = luma(a).round(), luma(b).round()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    kernel = cv2.getGaussianKernel(11, 1.5)

    def blur(z: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(z, cv2.CV_64F, kernel, kernel)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    contrast = np.maximum((2 * cov + c2) / (vx + vy + c2), 0)  # pyiqa clips negative structure
    return float(np.mean((2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast))


def _same_size(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"pictures of different size cannot be compared: {a.shape} and {b.shape}")


METRICS = {"psnr_y": psnr_y, "ssim_y": ssim_y}  # higher is better for both
