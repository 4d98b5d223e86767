"""Blur kernels: six Gaussian families and the circular low-pass filter ("sinc") of Real-ESRGAN, and linear motion.

`draw` samples the parameters as a plain mapping, which is stored in a sample's JSON; `build` computes the kernel from
them.
Families: Wang et al. 2021, sec. 3.2 (generalised Gaussian and plateau: Liu et al. 2020); sinc: sec. 3.3.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import j1

FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
PROBABILITIES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)


def draw(stage, rng: np.random.Generator) -> dict:
    """Draw the parameters of a blur kernel from the ranges of a `Stage`.

    They are the family, and either the length and angle of a motion, or the odd size 7..21 and the family's parameters.
    """
    if stage.motion_probability and rng.random() < stage.motion_probability:
        return {"family": "motion", "length": rng.uniform(*stage.motion_px), "angle": rng.uniform(0, math.pi)}
    k = _size(rng)
    if rng.random() < stage.sinc_probability:
        return {"family": "sinc", "size": k, "cutoff": rng.uniform(math.pi / 3 if k < 13 else math.pi / 5, math.pi)}
    family = FAMILIES[rng.choice(len(FAMILIES), p=PROBABILITIES)]
    sigma_x, sigma_y = rng.uniform(*stage.blur_sigma), rng.uniform(*stage.blur_sigma)
    rotation = rng.uniform(-math.pi, math.pi)
    if not family.endswith("aniso"):
        sigma_y, rotation = sigma_x, 0.0
    beta = 1.0
    if "_" in family:
        low, high = stage.beta_generalized if family.startswith("generalized") else stage.beta_plateau
        # Kept from Real-ESRGAN on purpose: when `low` is 1, half of the plateau kernels have beta = 1 exactly.
        beta = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
    return {"family": family, "size": k, "sigma": [sigma_x, sigma_y], "rotation": rotation, "beta": beta}


def draw_final_sinc(rng: np.random.Generator) -> dict:
    """Draw the parameters of the final sinc filter of the pipeline."""
    return {"family": "sinc", "size": _size(rng), "cutoff": rng.uniform(math.pi / 3, math.pi)}


def build(drawn: dict) -> np.ndarray:
    """Build the kernel, [k, k] float64 with sum 1, from drawn parameters."""
    if drawn["family"] == "sinc":
        return sinc(drawn["cutoff"], drawn["size"])
    if drawn["family"] == "motion":
        return motion(drawn["length"], drawn["angle"])
    plateau = drawn["family"].startswith("plateau")
    return gaussian(drawn["size"], *drawn["sigma"], drawn["rotation"], drawn["beta"], plateau)


def gaussian(
    k: int, sigma_x: float, sigma_y: float, rotation: float, beta: float = 1.0, plateau: bool = False
) -> np.ndarray:
    """Generalised Gaussian exp(-q^beta / 2), or plateau 1 / (1 + q^beta); [k, k], sum 1.

    q is the squared Mahalanobis distance from the centre.
    """
    c, s = math.cos(rotation), math.sin(rotation)
    turn = np.array([[c, -s], [s, c]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    y, x = np.mgrid[:k, :k] - float(k // 2)
    q = (inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y) ** beta
    kernel = 1 / (1 + q) if plateau else np.exp(-0.5 * q)
    return kernel / kernel.sum()


def motion(length: float, angle: float) -> np.ndarray:
    """Uniform motion along a straight line of `length` pixels at `angle` radians; [k, k], odd k, sum 1.

    Points along the line are spread over the four nearest pixels with bilinear weights.
    """
    r = math.ceil(length / 2)
    kernel = np.zeros((2 * r + 1, 2 * r + 1))
    t = (np.arange(n := max(1, math.ceil(16 * length))) + 0.5) / n - 0.5
    x, y = r + t * length * math.cos(angle), r - t * length * math.sin(angle)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = (1 - np.abs(x - x0 - dx)) * (1 - np.abs(y - y0 - dy))
        np.add.at(kernel, (np.minimum(y0 + dy, 2 * r), np.minimum(x0 + dx, 2 * r)), weight)
    return kernel / kernel.sum()


def sinc(cutoff: float, k: int) -> np.ndarray:
    """Circular low-pass c J1(c r) / (2 pi r), cutoff c in radians per pixel; it causes ringing. [k, k], sum 1."""
    radius = np.hypot(*(np.mgrid[:k, :k] - float(k // 2)))
    radius[k // 2, k // 2] = 1  # any non-zero value, overwritten below
    kernel = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[k // 2, k // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _size(rng: np.random.Generator) -> int:
    return int(rng.integers(3, 11)) * 2 + 1
