"""Real-world degradation of photographs: the second-order pipeline of Real-ESRGAN (Wang et al. 2021, sec. 3).

`degrade(hq, settings, rng)` is a pure function: the same picture, settings and numpy Generator give the same bytes.
Numbers of the presets are those of the public training recipes named beside them. Deviation: resizes get explicit
sizes (a scale factor would shift LQ against HQ by up to several pixels) and JPEG is libjpeg, at integer quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.special import j1

cv2.setNumThreads(1)  # callers parallelise over pictures

KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
KERNEL_PROBABILITIES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
RESIZE_MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@dataclass(frozen=True)
class Stage:
    """One round of blur, resize, noise and JPEG. Ranges are uniform; sigmas of noise and qualities in 8-bit units."""

    blur_probability: float
    blur_sigma: tuple[float, float]
    beta_generalized: tuple[float, float]
    beta_plateau: tuple[float, float]
    resize_probability: tuple[float, float, float]  # up, down, keep
    resize_range: tuple[float, float]
    noise_sigma: tuple[float, float]
    poisson_scale: tuple[float, float]
    jpeg_quality: tuple[float, float]
    gaussian_probability: float = 0.5
    gray_probability: float = 0.4
    sinc_probability: float = 0.1


@dataclass(frozen=True)
class Degradation:
    """All settings of one pipeline; no stages means plain antialiased bicubic down-sampling."""

    name: str
    scale: int = 4
    stages: tuple[Stage, ...] = ()
    final_sinc_probability: float = 0.8


def _preset(name: str, **of_stage: tuple) -> Degradation:
    """Settings from columns: for each field of `Stage` one value a stage."""
    rows = zip(*of_stage.values(), strict=True)
    return Degradation(name, stages=tuple(Stage(**dict(zip(of_stage, row, strict=True))) for row in rows))


PRESETS = {
    # Real-ESRGAN x4plus options file, used unchanged by SeeSR and OSEDiff (OSEDiff without sharpening the ground truth).
    "osediff": _preset(
        "osediff",
        blur_probability=(1.0, 0.8),
        blur_sigma=((0.2, 3.0), (0.2, 1.5)),
        beta_generalized=((0.5, 4.0), (0.5, 4.0)),
        beta_plateau=((1.0, 2.0), (1.0, 2.0)),
        resize_probability=((0.2, 0.7, 0.1), (0.3, 0.4, 0.3)),
        resize_range=((0.15, 1.5), (0.3, 1.2)),
        noise_sigma=((1.0, 30.0), (1.0, 25.0)),
        poisson_scale=((0.05, 3.0), (0.05, 2.5)),
        jpeg_quality=((30.0, 95.0), (30.0, 95.0)),
    ),
    # StableSR's 512 px text options file: the same pipeline, lighter.
    "stablesr": _preset(
        "stablesr",
        blur_probability=(1.0, 0.5),
        blur_sigma=((0.2, 1.5), (0.2, 1.0)),
        beta_generalized=((0.5, 2.0), (0.5, 2.0)),
        beta_plateau=((1.0, 1.5), (1.0, 1.5)),
        resize_probability=((0.2, 0.7, 0.1), (0.3, 0.4, 0.3)),
        resize_range=((0.3, 1.5), (0.6, 1.2)),
        noise_sigma=((1.0, 15.0), (1.0, 12.0)),
        poisson_scale=((0.05, 2.0), (0.05, 1.0)),
        jpeg_quality=((60.0, 95.0), (60.0, 100.0)),
    ),
    "none": Degradation("none"),
}


def preset(name: str) -> Degradation:
    """Settings by name; ValueError names the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"degradation preset {name!r} does not exist; use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def degrade(hq: np.ndarray, settings: Degradation, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """HQ [H, W, 3] uint8 RGB -> (LQ [H / scale, W / scale, 3] uint8, every drawn parameter).

    Raises ValueError when the picture is not RGB uint8 or its sides are not multiples of the scale.
    """
    if hq.dtype != np.uint8 or hq.ndim != 3 or hq.shape[2] != 3:
        raise ValueError(
            f"degrade needs a picture [H, W, 3] in uint8, got {hq.shape} in {hq.dtype}: convert it to RGB first"
        )
    height, width = hq.shape[:2]
    if height % settings.scale or width % settings.scale:
        raise ValueError(f"a picture of {width}x{height} px cannot be reduced x{settings.scale} exactly: crop it first")
    size = (width // settings.scale, height // settings.scale)
    if not settings.stages:
        from PIL import Image

        return np.asarray(Image.fromarray(hq).resize(size, Image.Resampling.BICUBIC)), {"preset": settings.name}
    x = hq.astype(np.float32) / 255
    drawn: dict = {"preset": settings.name}
    for i, stage in enumerate(settings.stages):
        last = i == len(settings.stages) - 1
        x, drawn[f"stage{i + 1}"] = _stage(x, stage, rng, (width, height) if i == 0 else size, skip_jpeg=last)
    x, drawn["final"] = _finish(x, settings, rng, size)
    return (x * 255).round().clip(0, 255).astype(np.uint8), drawn


def _stage(x: np.ndarray, stage: Stage, rng: np.random.Generator, reference: tuple[int, int], skip_jpeg: bool):
    """Blur, resize relative to the `reference` (width, height), noise, and JPEG unless it comes later."""
    drawn: dict = {}
    if rng.random() < stage.blur_probability:
        kernel, drawn["kernel"] = draw_kernel(stage, rng)
        x = cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    direction = rng.choice(3, p=stage.resize_probability)
    low, high = stage.resize_range
    scale = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[direction]
    mode = str(rng.choice(list(RESIZE_MODES)))
    x = _resize(x, (max(1, round(reference[0] * scale)), max(1, round(reference[1] * scale))), mode)
    drawn |= {"resize": scale, "mode": mode}
    x, drawn["noise"] = _noise(x, stage, rng)
    if not skip_jpeg:
        drawn["jpeg"] = round(rng.uniform(*stage.jpeg_quality))
        x = _jpeg(x, drawn["jpeg"])
    return x, drawn


def _finish(x: np.ndarray, settings: Degradation, rng: np.random.Generator, size: tuple[int, int]):
    """Bring to LQ size with an optional sinc filter, and JPEG, in random order."""
    mode = str(rng.choice(list(RESIZE_MODES)))
    quality = round(rng.uniform(*settings.stages[-1].jpeg_quality))
    drawn: dict = {"mode": mode, "jpeg": quality, "jpeg_first": bool(rng.random() < 0.5)}
    kernel = None
    if rng.random() < settings.final_sinc_probability:
        k = int(rng.integers(3, 11)) * 2 + 1
        cutoff = rng.uniform(math.pi / 3, math.pi)
        kernel, drawn["sinc"] = sinc_kernel(cutoff, k), [k, cutoff]

    def resize(x: np.ndarray) -> np.ndarray:
        x = _resize(x, size, mode)
        return x if kernel is None else cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REFLECT_101)

    return (resize(_jpeg(x, quality)) if drawn["jpeg_first"] else _jpeg(resize(x), quality)), drawn


def draw_kernel(stage: Stage, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A blur kernel [k, k] that sums to 1, k odd in 7..21, of one of the six families or a sinc; and what was drawn."""
    k = int(rng.integers(3, 11)) * 2 + 1
    if rng.random() < stage.sinc_probability:
        cutoff = rng.uniform(math.pi / 3 if k < 13 else math.pi / 5, math.pi)
        return sinc_kernel(cutoff, k), {"family": "sinc", "size": k, "cutoff": cutoff}
    family = str(rng.choice(KERNELS, p=KERNEL_PROBABILITIES))
    sigma_x, sigma_y = rng.uniform(*stage.blur_sigma), rng.uniform(*stage.blur_sigma)
    rotation = rng.uniform(-math.pi, math.pi)
    if family.endswith("iso") and not family.endswith("aniso"):
        sigma_y, rotation = sigma_x, 0.0
    beta = 1.0
    if "_" in family:
        low, high = stage.beta_generalized if family.startswith("generalized") else stage.beta_plateau
        beta = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
    kernel = gaussian_kernel(k, sigma_x, sigma_y, rotation, beta, plateau=family.startswith("plateau"))
    return kernel, {"family": family, "size": k, "sigma": [sigma_x, sigma_y], "rotation": rotation, "beta": beta}


def gaussian_kernel(k: int, sigma_x: float, sigma_y: float, rotation: float, beta: float, plateau: bool) -> np.ndarray:
    """Generalised Gaussian exp(-q^beta / 2) or plateau 1 / (1 + q^beta), q the Mahalanobis form; float32, sum 1."""
    c, s = math.cos(rotation), math.sin(rotation)
    turn = np.array([[c, -s], [s, c]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    axis = np.arange(k) - k // 2
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).astype(np.float64)
    q = np.einsum("...i,ij,...j->...", grid, inverse, grid) ** beta
    kernel = 1 / (1 + q) if plateau else np.exp(-0.5 * q)
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(cutoff: float, k: int) -> np.ndarray:
    """Circular low-pass (jinc) with cutoff in radians a pixel, [k, k] float32, sum 1: ringing of real cameras."""
    axis = np.arange(k) - k // 2
    radius = np.hypot(*np.meshgrid(axis, axis)).astype(np.float64)
    safe = np.where(radius == 0, 1.0, radius)
    kernel = np.where(radius == 0, cutoff**2 / (4 * math.pi), cutoff * j1(cutoff * safe) / (2 * math.pi * safe))
    return (kernel / kernel.sum()).astype(np.float32)


def _resize(x: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    return cv2.resize(x, size, interpolation=RESIZE_MODES[mode]).clip(0, 1)


def _noise(x: np.ndarray, stage: Stage, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Additive Gaussian or signal-dependent Poisson noise, on colour or on luma alone."""
    gray = bool(rng.random() < stage.gray_probability)
    shape = (*x.shape[:2], 1) if gray else x.shape
    if rng.random() < stage.gaussian_probability:
        sigma = rng.uniform(*stage.noise_sigma)
        noise, drawn = rng.standard_normal(shape, dtype=np.float32) * (sigma / 255), {"gaussian": sigma, "gray": gray}
    else:
        scale = rng.uniform(*stage.poisson_scale)
        base = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] if gray else x
        levels = (base * 255).round()
        count = 2 ** math.ceil(math.log2(max(2, len(np.unique(levels)))))
        noise = (rng.poisson(levels / 255 * count) / count - levels / 255) * scale
        drawn = {"poisson": scale, "gray": gray}
    return (x + noise.astype(np.float32)).clip(0, 1), drawn


def _jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    """One libjpeg round trip (4:2:0) of a float picture in [0, 1]."""
    bgr = (x * 255).round().astype(np.uint8)[..., ::-1]
    ok, coded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok, "libjpeg refused to encode"
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255
