"""Exact and efficient PSNR, SSIM, Frechet distance, seam, detail and patch measures.

Protocols are in evaluation/metrics.py.

Pictures are [H, W, 3] uint8 RGB. With `on_luma`, PSNR and SSIM are computed on BT.601 luma of limited range (ycbcr), as
in the published Real-ISR tables, otherwise on RGB. The results equal pyiqa's `psnr` and `ssim` with test_y_channel=True
and color_space='ycbcr', or with test_y_channel=False.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

LUMA = np.array([65.481, 128.553, 24.966]) / 255  # weights for 8-bit RGB; 16 is added: BT.601 limited range
PSNR_EPS = 1e-8  # pyiqa adds this to the mean squared error of pictures in [0, 1]
WINDOW = cv2.getGaussianKernel(11, 1.5)
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
SEAM_PERIODS = (4, 8, 16)  # px: the blocks of JPEG, of latents and of token grids
DETAIL_PX, REGION_PX, SHARE = 2.5, 4.0, 0.3  # detail is finer than this blur; blur of its energy; share of a region
FAINT = 9.0  # energy of detail of 3 grey levels (root mean square), which is hardly visible
PATCH_PX, DIRECTIONS, PATCHES = 7, 32, 2**16  # of the patch distance: side, projections, patches used at most


def luma(x: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 RGB -> Y of YCbCr in 16..235, float64 [H, W]."""
    return x.astype(np.float64) @ LUMA + 16


def psnr(a: np.ndarray, b: np.ndarray, on_luma: bool = True, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB; `border` px are cropped on every side.

    Raises ValueError if the sizes differ or if the border leaves nothing of the picture.
    """
    a, b = _inside(a, b, border)
    a, b = (luma(a), luma(b)) if on_luma else (a.astype(np.float64), b.astype(np.float64))
    return float(10 * np.log10(1 / (np.mean(((a - b) / 255) ** 2) + PSNR_EPS)))


def ssim(a: np.ndarray, b: np.ndarray, on_luma: bool = True, border: int = 0) -> float:
    """Structural similarity (Wang et al. 2004); `border` px are cropped on every side.

    The Gaussian window is 11x11 with sigma 1.5, applied to the valid region only. Luma is rounded to integers; for RGB
    the mean over the channels is returned. Raises ValueError if the sizes differ or are smaller than the window.
    """
    a, b = _inside(a, b, border)
    if min(a.shape[:2]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 px, got {a.shape[1]}x{a.shape[0]}")
    x, y = (luma(a).round(), luma(b).round()) if on_luma else (a.astype(np.float64), b.astype(np.float64))

    def blur(z: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(z, cv2.CV_64F, WINDOW, WINDOW)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    contrast = np.maximum((2 * cov + C2) / (vx + vy + C2), 0)  # pyiqa clips negative structure values
    return float(np.mean((2 * mx * my + C1) / (mx * mx + my * my + C1) * contrast))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to features [n, D] and [m, D].

    For Inception features this is FID (Heusel et al. 2017). tr sqrt(S1 S2) is computed as the nuclear norm of
    Xc Yc^T / sqrt((n - 1)(m - 1)), where Xc and Yc are the centred features, so that no D x D matrix square root is
    needed. If n and m are both greater than D, a smaller D x D matrix with the same nuclear norm is decomposed instead.
    Raises ValueError for fewer than 2 samples, or if the feature lengths differ.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"the Frechet distance needs two sets of at least 2 features of equal length, got {a.shape} and {b.shape}"
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    gap = a.mean(0) - b.mean(0)
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b))
    trace = (x * x).sum() + (y * y).sum()
    if min(len(a), len(b)) > a.shape[1]:  # more samples than features: factors [D, D] of the covariances
        x, y = (np.linalg.qr(z, mode="r") for z in (x, y))
    return float(gap @ gap + trace - 2 * np.linalg.norm(x @ y.T, "nuc"))


def seam_ratio(x: np.ndarray, periods: tuple[int, ...] = SEAM_PERIODS) -> float:
    """How much stronger luma changes across the seams of a grid of blocks than elsewhere: 1 without visible blocks.

    For a period p in px, this is the mean of |y[i] - y[i - 1]| where p divides i over its mean elsewhere, both along
    rows and columns. Returns the largest ratio of the periods. Raises ValueError if the picture is not larger than the
    shortest period on both sides.
    """
    y = luma(x)
    if min(y.shape) <= min(periods):
        raise ValueError(f"the seam ratio needs more than {min(periods)} px on both sides, got {_size(x)}")
    steps = [np.abs(np.diff(y, axis=axis)).sum(1 - axis) for axis in (0, 1)]
    return max(_seam(steps, y.shape, p) for p in periods if min(y.shape) > p)


def _seam(steps: list[np.ndarray], shape: tuple[int, int], period: int) -> float:
    """The ratio of one period; steps: for each axis, the sums of absolute differences at each position."""
    sums, counts = np.zeros(2), np.zeros(2)
    for step, across in zip(steps, shape[::-1], strict=True):
        on = np.arange(1, len(step) + 1) % period == 0
        sums += step[on].sum(), step[~on].sum()
        counts += on.sum() * across, (~on).sum() * across
    seams, elsewhere = sums / counts + 1e-9  # a picture of one colour has the ratio 1
    return float(seams / elsewhere)


def detail_ratio(made: np.ndarray, hq: np.ndarray) -> float:
    """Energy of detail relative to `hq` in flat areas, over the same in busy areas.

    It is 1 when detail is where it belongs, and larger when a picture has noise or invented texture in flat areas or
    lacks detail in busy ones. Detail is luma without its blur by 2.5 px; its energy is the square, blurred by 4 px.
    Flat and busy are the 30 % of the pixels where `hq` has the least and the most energy. FAINT is added to all
    energies, so that what is hardly visible does not decide. Raises ValueError if the sizes differ.
    """
    made, hq = _inside(made, hq, 0)
    ours, theirs = _detail_energy(made), _detail_energy(hq)
    areas = theirs <= np.quantile(theirs, SHARE), theirs >= np.quantile(theirs, 1 - SHARE)
    flat, busy = ((ours[area].mean() + FAINT) / (theirs[area].mean() + FAINT) for area in areas)
    return float(flat / busy)


def energy_ratio(made: np.ndarray, hq: np.ndarray) -> float:
    """Energy of detail (as in `detail_ratio`) relative to that of `hq`: below 1 for blur, above 1 for noise.

    Raises ValueError if the sizes differ.
    """
    ours, theirs = (_detail_energy(x).mean() + FAINT for x in _inside(made, hq, 0))
    return float(ours / theirs)


def patch_distance(made: np.ndarray, hq: np.ndarray) -> float:
    """Sliced Wasserstein distance between the detail patches of two pictures, relative to the detail of `hq`.

    7x7 patches of the detail (as in `detail_ratio`) are projected on 32 fixed random directions of unit length; the
    sorted projections of both pictures are compared, whatever their places. It is 0 when both have the same textures,
    and near 1 when `made` has no detail. Of large pictures, patches on a grid are used, 65,536 at most. Raises
    ValueError if the sizes differ or are smaller than a patch.
    """
    made, hq = _inside(made, hq, 0)
    if min(hq.shape[:2]) < PATCH_PX:
        raise ValueError(f"the patch distance needs at least {PATCH_PX} px on both sides, got {_size(hq)}")
    filters = np.random.default_rng(0).normal(size=(DIRECTIONS, PATCH_PX, PATCH_PX)).astype(np.float32)
    filters /= np.linalg.norm(filters, axis=(1, 2), keepdims=True)
    a, b = (_detail(x).astype(np.float32) for x in (made, hq))
    used = slice(PATCH_PX // 2, -(PATCH_PX // 2), math.ceil(math.sqrt(b.size / PATCHES)))
    gap = scale = 0.0
    for kernel in filters:
        p, q = (np.sort(cv2.filter2D(z, cv2.CV_32F, kernel)[used, used], axis=None) for z in (a, b))
        gap, scale = gap + float(np.square(p - q).mean()), scale + float(np.square(q).mean())
    return float(np.sqrt(gap / (scale + DIRECTIONS * FAINT)))


def _detail_energy(x: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(np.square(_detail(x)), (0, 0), REGION_PX)


def _detail(x: np.ndarray) -> np.ndarray:
    y = luma(x)
    return y - cv2.GaussianBlur(y, (0, 0), DETAIL_PX)


def _size(x: np.ndarray) -> str:
    return f"{x.shape[1]}x{x.shape[0]}"


def _inside(a: np.ndarray, b: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape:
        raise ValueError(f"images of different sizes cannot be compared: {a.shape} and {b.shape}")
    if border == 0:
        return a, b
    if min(a.shape[:2]) <= 2 * border:
        raise ValueError(f"a border of {border} px leaves nothing of an image of {a.shape[1]}x{a.shape[0]} px")
    return a[border:-border, border:-border], b[border:-border, border:-border]
