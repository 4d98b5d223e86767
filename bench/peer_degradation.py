"""Real-ESRGAN's degradation as public PyTorch code runs it: slow and literal, including its defects and costs.

It reproduces the behaviour of BasicSR's operators (degradations.py, diffjpeg.py, img_process_util.py) in the order of
Real-ESRGAN's `feed_data`, as OSEDiff and StableSR use it. It shares no code with `teasr.degradation`: the tests compare
the two, and bench/degradation.py times them. Images are float [B, 3, H, W] in [0, 1]. `rng` draws the parameters, and
`noise` (a torch.Generator) draws the pixel noise.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

HEAVY = {
    "resize_prob": [0.2, 0.7, 0.1], "resize_range": [0.15, 1.5], "gaussian_noise_prob": 0.5, "noise_range": [1, 30],
    "poisson_scale_range": [0.05, 3], "gray_noise_prob": 0.4, "jpeg_range": [30, 95], "second_blur_prob": 0.8,
    "resize_prob2": [0.3, 0.4, 0.3], "resize_range2": [0.3, 1.2], "noise_range2": [1, 25],
    "poisson_scale_range2": [0.05, 2.5],
    "jpeg_range2": [30, 95], "blur_sigma": [0.2, 3], "betag_range": [0.5, 4], "betap_range": [1, 2],
    "blur_sigma2": [0.2, 1.5], "betag_range2": [0.5, 4], "betap_range2": [1, 2],
    "sinc_prob": 0.1, "final_sinc_prob": 0.8,
}  # fmt: skip
OPTIONS = {  # Real-ESRGAN x4plus (OSEDiff uses the same); StableSR, 512 px with text
    "osediff": HEAVY,
    "stablesr": HEAVY | {
        "resize_range": [0.3, 1.5], "noise_range": [1, 15], "poisson_scale_range": [0.05, 2], "jpeg_range": [60, 95],
        "second_blur_prob": 0.5, "resize_range2": [0.6, 1.2], "noise_range2": [1, 12],
        "poisson_scale_range2": [0.05, 1],
        "jpeg_range2": [60, 100], "blur_sigma": [0.2, 1.5], "betag_range": [0.5, 2], "betap_range": [1, 1.5],
        "blur_sigma2": [0.2, 1], "betag_range2": [0.5, 2], "betap_range2": [1, 1.5],
    },
}  # fmt: skip
FAMILIES = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
FAMILY_PROB = [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
SCALE = 4

# kernels


def _exponent(k: int, sigma_x: float, sigma_y: float, theta: float, isotropic: bool) -> np.ndarray:
    """Return g^T Sigma^-1 g on the grid [k, k]."""
    if isotropic:
        covariance = np.array([[sigma_x**2, 0], [0, sigma_x**2]])
    else:
        rotation = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
        covariance = rotation @ np.array([[sigma_x**2, 0], [0, sigma_y**2]]) @ rotation.T
    xx, yy = np.meshgrid(np.arange(-(k // 2), k // 2 + 1.0), np.arange(-(k // 2), k // 2 + 1.0))
    points = np.stack([xx.ravel(), yy.ravel()], axis=1)
    return np.sum((points @ np.linalg.inv(covariance)) * points, axis=1).reshape(k, k)


def gaussian(k: int, sigma_x: float, sigma_y: float, theta: float, isotropic: bool) -> np.ndarray:
    """Bivariate Gaussian kernel [k, k], sum 1."""
    kernel = np.exp(-0.5 * _exponent(k, sigma_x, sigma_y, theta, isotropic))
    return kernel / kernel.sum()


def generalized(k: int, sigma_x: float, sigma_y: float, theta: float, beta: float, isotropic: bool) -> np.ndarray:
    """Generalised Gaussian kernel [k, k], sum 1."""
    kernel = np.exp(-0.5 * np.power(_exponent(k, sigma_x, sigma_y, theta, isotropic), beta))
    return kernel / kernel.sum()


def plateau(k: int, sigma_x: float, sigma_y: float, theta: float, beta: float, isotropic: bool) -> np.ndarray:
    """Plateau-shaped kernel [k, k], sum 1."""
    kernel = np.reciprocal(np.power(_exponent(k, sigma_x, sigma_y, theta, isotropic), beta) + 1)
    return kernel / kernel.sum()


def sinc(cutoff: float, k: int, pad_to: int = 0) -> np.ndarray:
    """Circular low-pass kernel [k, k] (zero-padded to `pad_to`), sum 1."""

    def value(y: float, x: float) -> float:
        distance = math.hypot(x - (k - 1) / 2, y - (k - 1) / 2)
        return (
            cutoff**2 / (4 * np.pi)
            if distance == 0
            else cutoff * special.j1(cutoff * distance) / (2 * np.pi * distance)
        )

    kernel = np.array([[value(y, x) for x in range(k)] for y in range(k)])
    kernel /= kernel.sum()
    return pad(kernel, pad_to) if pad_to > k else kernel


def pad(kernel: np.ndarray, to: int = 21) -> np.ndarray:
    """Pad a kernel with zeros to [to, to]."""
    return np.pad(kernel, (to - len(kernel)) // 2)


def random_kernel(options: dict, stage: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a blur kernel of a stage ("" or "2"), padded to 21."""
    k = int(rng.choice([7, 9, 11, 13, 15, 17, 19, 21]))
    if rng.uniform() < options["sinc_prob"]:
        return sinc(rng.uniform(np.pi / 3 if k < 13 else np.pi / 5, np.pi), k, pad_to=21)
    family = rng.choice(FAMILIES, p=FAMILY_PROB)
    isotropic = not family.endswith("aniso")
    sigma_x = rng.uniform(*options[f"blur_sigma{stage}"])
    sigma_y, theta = (
        (sigma_x, 0.0) if isotropic else (rng.uniform(*options[f"blur_sigma{stage}"]), rng.uniform(-np.pi, np.pi))
    )
    if family in ("iso", "aniso"):
        return pad(gaussian(k, sigma_x, sigma_y, theta, isotropic))
    low, high = options[f"beta{'g' if family.startswith('generalized') else 'p'}_range{stage}"]
    beta = rng.uniform(low, 1) if rng.uniform() < 0.5 else rng.uniform(1, high)
    make = generalized if family.startswith("generalized") else plateau
    return pad(make(k, sigma_x, sigma_y, theta, beta, isotropic))


# operators


def filter2d(x: Tensor, kernel: np.ndarray | Tensor) -> Tensor:
    """Dense correlation with one kernel [k, k], or with one per image [B, k, k], and reflection padding."""
    kernel = torch.as_tensor(kernel, dtype=x.dtype).reshape(-1, 1, *kernel.shape[-2:])
    b, c, k = x.shape[0], x.shape[1], kernel.shape[-1]
    x = F.pad(x, (k // 2,) * 4, mode="reflect")
    if len(kernel) == 1:
        return F.conv2d(x.reshape(b * c, 1, *x.shape[-2:]), kernel).reshape(
            b, c, x.shape[2] - k + 1, x.shape[3] - k + 1
        )
    out = F.conv2d(x.reshape(1, b * c, *x.shape[-2:]), kernel.repeat_interleave(c, 0), groups=b * c)
    return out.reshape(b, c, *out.shape[-2:])


def resize_factor(x: Tensor, factor: float, mode: str) -> Tensor:
    """`F.interpolate` with a scale factor."""
    return F.interpolate(x, scale_factor=factor, mode=mode)


def resize_to(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """`F.interpolate` to a size (height, width)."""
    return F.interpolate(x, size=size, mode=mode)


def _gray(x: Tensor) -> Tensor:
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def gaussian_noise(x: Tensor, sigma: float, gray: bool, noise: torch.Generator) -> Tensor:
    """Add noise of `sigma` grey levels; colour noise is drawn even when it is not used."""
    one = torch.randn(x.shape[2:], generator=noise) * sigma / 255
    colour = torch.randn(x.shape, generator=noise) * sigma / 255
    return torch.clamp(x + (one.reshape(1, 1, *x.shape[2:]) if gray else colour), 0, 1)


def poisson_noise(x: Tensor, scale: float, gray: bool, noise: torch.Generator) -> Tensor:
    """Add the Poisson noise of the image, or of its luma, multiplied by `scale`."""

    def of(base: Tensor) -> Tensor:
        base = torch.clamp((base * 255.0).round(), 0, 255) / 255.0
        counts = [2 ** np.ceil(np.log2(len(torch.unique(row)))) for row in base]
        vals = base.new_tensor(counts).view(-1, 1, 1, 1)
        return torch.poisson(base * vals, generator=noise) / vals - base

    drawn = of(_gray(x)).expand(-1, 3, -1, -1) if gray else of(x)
    return torch.clamp(x + drawn * scale, 0, 1)


_LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
_CHROMA = np.full((8, 8), 99)
_CHROMA[:4, :4] = np.array([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
_BASIS = np.array(
    [[math.cos((2 * n + 1) * u * math.pi / 16) for u in range(8)] for n in range(8)]
)  # [position, frequency]
_NORM = np.array([1 / math.sqrt(2)] + [1.0] * 7)
_DCT = torch.tensor(np.einsum("xu,yv->xyuv", _BASIS, _BASIS), dtype=torch.float32)
_WEIGHT = torch.tensor(np.outer(_NORM, _NORM) / 4, dtype=torch.float32)


def jpeg(x: Tensor, quality: float) -> Tensor:
    """DiffJPEG: transposed tables, zero padding to a multiple of 16, and no rounding except of the coefficients.

    Chroma is downsampled by the mean and upsampled by nearest neighbour.
    """
    height, width = x.shape[2:]
    factor = (5000 / quality if quality < 50 else 200 - quality * 2) / 100
    x = F.pad(x, (0, (16 - width % 16) % 16, 0, (16 - height % 16) % 16)) * 255
    r, g, b = x[:, 0], x[:, 1], x[:, 2]
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb = -0.168736 * r - 0.331264 * g + 0.5 * b + 128
    cr = 0.5 * r - 0.418688 * g - 0.081312 * b + 128
    halves = [F.avg_pool2d(c[:, None], 2)[:, 0] for c in (cb, cr)]
    y = _through_blocks(y, torch.tensor(_LUMA.T, dtype=torch.float32) * factor)
    cb, cr = (_through_blocks(c, torch.tensor(_CHROMA.T, dtype=torch.float32) * factor) for c in halves)
    cb, cr = (c.repeat_interleave(2, 1).repeat_interleave(2, 2) - 128 for c in (cb, cr))
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], dim=1)
    return torch.clamp(rgb, 0, 255)[:, :, :height, :width] / 255


def _through_blocks(plane: Tensor, table: Tensor) -> Tensor:
    batch, height, width = plane.shape
    blocks = plane.view(batch, height // 8, 8, width // 8, 8).permute(0, 1, 3, 2, 4) - 128
    coefficients = _WEIGHT * torch.tensordot(blocks, _DCT, dims=2)
    coefficients = torch.round(coefficients / table) * table
    back = torch.tensordot(coefficients * _WEIGHT, _DCT.permute(2, 3, 0, 1), dims=2) + 128
    return back.permute(0, 1, 3, 2, 4).reshape(batch, height, width)


class Usm:
    """Unsharp masking of the ground truth: radius 51, sigma by OpenCV's rule (8), weight 0.5, threshold 10."""

    def __init__(self):
        taps = cv2.getGaussianKernel(51, 0)
        self.kernel = np.dot(taps, taps.T)

    def __call__(self, x: Tensor) -> Tensor:
        residual = x - filter2d(x, self.kernel)
        mask = filter2d((torch.abs(residual) * 255 > 10).float(), self.kernel)
        return mask * torch.clamp(x + 0.5 * residual, 0, 1) + (1 - mask) * x


# the pipeline


def draw(options: dict, rng: np.random.Generator) -> dict:
    """Draw everything random except the pixel noise."""

    def stage(suffix: str) -> dict:
        direction = rng.choice(["up", "down", "keep"], p=options[f"resize_prob{suffix}"])
        low, high = options[f"resize_range{suffix}"]
        gaussian = rng.uniform() < options["gaussian_noise_prob"]
        level = options[f"{'noise_range' if gaussian else 'poisson_scale_range'}{suffix}"]
        return {
            "kernel": random_kernel(options, suffix, rng),
            "blur": not suffix or rng.uniform() < options["second_blur_prob"],
            "scale": rng.uniform(1, high) if direction == "up" else rng.uniform(low, 1) if direction == "down" else 1,
            "mode": str(rng.choice(["area", "bilinear", "bicubic"])),
            "gaussian": gaussian,
            "level": rng.uniform(*level),
            "gray": rng.uniform() < options["gray_noise_prob"],
            "quality": rng.uniform(*options[f"jpeg_range{suffix}"]),
        }

    final = np.zeros((21, 21))
    final[10, 10] = 1
    if rng.uniform() < options["final_sinc_prob"]:
        k = int(rng.choice([7, 9, 11, 13, 15, 17, 19, 21]))
        final = sinc(rng.uniform(np.pi / 3, np.pi), k, pad_to=21)
    mode = str(rng.choice(["area", "bilinear", "bicubic"]))
    return {
        "first": stage(""),
        "second": stage("2"),
        "sinc": final,
        "final_mode": mode,
        "resize_first": rng.uniform() < 0.5,
    }


def apply(x: Tensor, params: dict, noise: torch.Generator | None) -> Tensor:
    """Degrade one image [1, 3, H, W] to LQ [1, 3, H / 4, W / 4]; without a generator, no pixel noise is added."""
    height, width = x.shape[2:]
    first, second = params["first"], params["second"]

    def add_noise(x: Tensor, stage: dict) -> Tensor:
        if noise is None:
            return x
        return (gaussian_noise if stage["gaussian"] else poisson_noise)(x, stage["level"], stage["gray"], noise)

    out = filter2d(x, first["kernel"][None])
    out = resize_factor(out, first["scale"], first["mode"])
    out = jpeg(torch.clamp(add_noise(out, first), 0, 1), first["quality"])
    if second["blur"]:
        out = filter2d(out, second["kernel"][None])
    size = (int(height / SCALE * second["scale"]), int(width / SCALE * second["scale"]))
    out = add_noise(resize_to(out, size, second["mode"]), second)
    size = (height // SCALE, width // SCALE)
    if params["resize_first"]:
        out = filter2d(resize_to(out, size, params["final_mode"]), params["sinc"][None])
        out = jpeg(torch.clamp(out, 0, 1), second["quality"])
    else:
        out = jpeg(torch.clamp(out, 0, 1), second["quality"])
        out = filter2d(resize_to(out, size, params["final_mode"]), params["sinc"][None])
    return torch.clamp((out * 255.0).round(), 0, 255) / 255.0


def degrade(x: Tensor, options: dict, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
    """Draw the parameters and degrade one image [1, 3, H, W] to LQ [1, 3, H / 4, W / 4]."""
    return apply(x, draw(options, rng), noise)
