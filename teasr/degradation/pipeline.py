"""Degradation presets, their random parameters, and the order of the operators.

`draw(settings, rng)` draws every random parameter except the noise of individual pixels, as a JSON-serialisable
mapping; `apply` computes LQ from it. Both are deterministic: the same image, config and numpy Generator state give the
same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from teasr.degradation import fast, kernels, reference


@dataclass(frozen=True)
class Stage:
    """One round of blur, resize, noise and JPEG.

    Ranges are sampled uniformly. Noise sigmas are in grey levels of 0..255, JPEG qualities in 0..100.
    """

    blur_probability: float
    blur_sigma: tuple[float, float] = (0.0, 0.0)
    beta_generalized: tuple[float, float] = (1.0, 1.0)
    beta_plateau: tuple[float, float] = (1.0, 1.0)
    resize_probability: tuple[float, float, float] = (0.0, 0.0, 1.0)  # up, down, keep
    resize_range: tuple[float, float] = (1.0, 1.0)
    noise_sigma: tuple[float, float] | None = None  # None: no noise
    poisson_scale: tuple[float, float] | None = None
    jpeg_quality: tuple[float, float] | None = None  # None: no JPEG
    gaussian_probability: float = 0.5
    gray_probability: float = 0.4
    sinc_probability: float = 0.1
    motion_probability: float = 0.0  # of a linear motion blur in place of the other kernels
    motion_px: tuple[float, float] = (3.0, 15.0)  # length of the motion


@dataclass(frozen=True)
class Degradation:
    """Config of one degradation pipeline; without stages it is plain antialiased bicubic down-sampling."""

    name: str
    scale: int = 4
    stages: tuple[Stage, ...] = ()
    final_sinc_probability: float = 0.8
    usm: bool = False  # the ground truth is first sharpened with `sharpen`
    peer_exact: bool = False  # operators that reproduce public code (see reference.py), 25 times slower


def _preset(name: str, usm: bool = False, **of_stage: tuple) -> Degradation:
    """Build a preset; each keyword is a field of `Stage` and holds one value per stage."""
    rows = zip(*of_stage.values(), strict=True)
    return Degradation(name, stages=tuple(Stage(**dict(zip(of_stage, row, strict=True))) for row in rows), usm=usm)


# From Real-ESRGAN's options file for x4plus. SeeSR, DiffBIR v2.1, HYPIR and OSEDiff use the same values.
_HEAVY = {
    "blur_probability": (1.0, 0.8),
    "blur_sigma": ((0.2, 3.0), (0.2, 1.5)),
    "beta_generalized": ((0.5, 4.0), (0.5, 4.0)),
    "beta_plateau": ((1.0, 2.0), (1.0, 2.0)),
    "resize_probability": ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3)),
    "resize_range": ((0.15, 1.5), (0.3, 1.2)),
    "noise_sigma": ((1.0, 30.0), (1.0, 25.0)),
    "poisson_scale": ((0.05, 3.0), (0.05, 2.5)),
    "jpeg_quality": ((30.0, 95.0), (30.0, 95.0)),
}
# From StableSR's options file for 512 px with text.
_LIGHT = {
    "blur_probability": (1.0, 0.5),
    "blur_sigma": ((0.2, 1.5), (0.2, 1.0)),
    "beta_generalized": ((0.5, 2.0), (0.5, 2.0)),
    "beta_plateau": ((1.0, 1.5), (1.0, 1.5)),
    "resize_probability": ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3)),
    "resize_range": ((0.3, 1.5), (0.6, 1.2)),
    "noise_sigma": ((1.0, 15.0), (1.0, 12.0)),
    "poisson_scale": ((0.05, 2.0), (0.05, 1.0)),
    "jpeg_quality": ((60.0, 95.0), (60.0, 100.0)),
}
PRESETS = {
    "osediff": _preset("osediff", **_HEAVY),  # OSEDiff does not sharpen the ground truth
    "realesrgan_usm": _preset("realesrgan_usm", usm=True, **_HEAVY),  # Real-ESRGAN, SeeSR, DiffBIR, HYPIR sharpen it
    "stablesr": _preset("stablesr", usm=True, **_LIGHT),  # StableSR sharpens too
    "none": Degradation("none"),
    "light": _preset("light", **_LIGHT),  # stablesr without sharpening
    # Our own: what a camera does, blur and a little noise, compressed with high quality.
    "camera": Degradation(
        "camera",
        stages=(
            Stage(
                0.9,
                blur_sigma=(0.6, 4.0),
                beta_generalized=(0.5, 4.0),
                beta_plateau=(1.0, 2.0),
                sinc_probability=0.0,
                noise_sigma=(0.0, 4.0),
                poisson_scale=(0.02, 0.3),
                gray_probability=0.4,
            ),
            Stage(
                0.0, noise_sigma=(0.0, 4.0), gaussian_probability=1.0, gray_probability=0.4, jpeg_quality=(75.0, 100.0)
            ),
        ),
        final_sinc_probability=0.0,
    ),
    # For restoration at scale 1. Our own ranges: Gaussian noise as in the usual benchmarks of blind denoising, JPEG
    # over the qualities that cameras and web sites use, and defocus or motion blur with a little sensor noise.
    "noise": Degradation(
        "noise",
        stages=(Stage(0.0, noise_sigma=(5.0, 50.0), gaussian_probability=1.0, gray_probability=0.0),),
        final_sinc_probability=0.0,
    ),
    "jpeg": Degradation("jpeg", stages=(Stage(0.0, jpeg_quality=(10.0, 80.0)),), final_sinc_probability=0.0),
    "blur": Degradation(
        "blur",
        stages=(
            Stage(
                1.0,
                blur_sigma=(0.6, 2.5),
                beta_generalized=(0.5, 4.0),
                beta_plateau=(1.0, 2.0),
                sinc_probability=0.0,
                noise_sigma=(0.0, 4.0),
                gaussian_probability=1.0,
                gray_probability=0.0,
                motion_probability=0.5,
            ),
        ),
        final_sinc_probability=0.0,
    ),
}


def preset(name: str, peer_exact: bool = False, scale: int = 4) -> Degradation:
    """Return a preset by name, which reduces the image `scale` times.

    Raises ValueError when the name is unknown, listing the available presets, or when it would not change the image.
    """
    if name not in PRESETS:
        raise ValueError(f"degradation preset {name!r} does not exist; use one of {', '.join(PRESETS)}")
    if scale == 1 and not PRESETS[name].stages:
        raise ValueError(f"degradation preset {name!r} with scale 1 leaves the image as it is: choose another preset")
    return replace(PRESETS[name], peer_exact=peer_exact, scale=scale)


def sharpen(hq: np.ndarray, settings: Degradation) -> np.ndarray:
    """Return the ground truth to train on, [H, W, 3] uint8: sharpened if `settings.usm`, else the same array."""
    return fast.sharpen(hq) if settings.usm else hq


def degrade(hq: np.ndarray, settings: Degradation, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """HQ [H, W, 3] RGB, uint8 or float32 in [0, 1] -> (LQ [H / scale, W / scale, 3] uint8, drawn parameters).

    If `settings.usm`, pass the output of `sharpen` as `hq`. Raises ValueError when the image is not RGB or its height
    or width is not a multiple of the scale.
    """
    drawn = draw(settings, rng)
    return apply(hq, drawn, rng), drawn


def draw(settings: Degradation, rng: np.random.Generator) -> dict:
    """Draw every random parameter except the noise of individual pixels, as JSON-serialisable values."""
    drawn: dict = {"preset": settings.name, "scale": settings.scale}
    if not settings.stages:
        return drawn
    drawn["peer_exact"] = settings.peer_exact
    drawn["stages"] = [_draw_stage(stage, rng) for stage in settings.stages]
    drawn["final"] = {"mode": _mode(rng), "jpeg_first": bool(rng.random() < 0.5)}
    if rng.random() < settings.final_sinc_probability:
        drawn["final"]["kernel"] = kernels.draw_final_sinc(rng)
    return drawn


def _draw_stage(stage: Stage, rng: np.random.Generator) -> dict:
    drawn: dict = {}
    if rng.random() < stage.blur_probability:
        drawn["kernel"] = kernels.draw(stage, rng)
    direction = rng.choice(3, p=stage.resize_probability)
    low, high = stage.resize_range
    drawn["resize"] = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[direction]
    drawn["mode"] = _mode(rng)
    if stage.noise_sigma is not None:
        gaussian = bool(rng.random() < stage.gaussian_probability)
        drawn["noise"] = "gaussian" if gaussian else "poisson"
        drawn["level"] = rng.uniform(*(stage.noise_sigma if gaussian else stage.poisson_scale))
        drawn["gray"] = bool(rng.random() < stage.gray_probability)
    if stage.jpeg_quality is not None:
        drawn["jpeg"] = rng.uniform(*stage.jpeg_quality)
    return drawn


def _mode(rng: np.random.Generator) -> str:
    return tuple(fast.MODES)[rng.integers(len(fast.MODES))]


def apply(hq: np.ndarray, drawn: dict, rng: np.random.Generator | None) -> np.ndarray:
    """Compute LQ [H / scale, W / scale, 3] uint8 from drawn parameters.

    `rng` draws the noise of the pixels; with None no noise is added.
    """
    size = _lq_size(hq, drawn["scale"])
    if "stages" not in drawn:
        return np.asarray(Image.fromarray(_as_uint8(hq)).resize(size, Image.Resampling.BICUBIC))
    ops = reference if drawn["peer_exact"] else fast
    x = hq if hq.dtype == np.uint8 else hq * np.float32(255)
    for i, stage in enumerate(drawn["stages"]):
        if "kernel" in stage:
            x = ops.blur(x, kernels.build(stage["kernel"]))
        x = x.astype(np.float32, copy=False)
        if i == 0:
            x = ops.resize_by(x, stage["resize"], stage["mode"])
        else:
            x = ops.resize_relative(x, size, stage["resize"], stage["mode"])
        if rng is not None and "noise" in stage:
            noise = ops.gaussian_noise if stage["noise"] == "gaussian" else ops.poisson_noise
            x = noise(x, stage["level"], stage["gray"], rng)
        if i < len(drawn["stages"]) - 1 and "jpeg" in stage:
            x = ops.jpeg(x, stage["jpeg"])
    return fast.to_uint8(_finish(x, drawn, size, ops))


def _finish(x: np.ndarray, drawn: dict, size: tuple[int, int], ops) -> np.ndarray:
    """Resize to LQ size, apply the optional sinc filter, and compress with JPEG before or after these, as drawn."""
    final, quality = drawn["final"], drawn["stages"][-1].get("jpeg")
    if quality is not None and final["jpeg_first"]:
        x = ops.jpeg(x, quality).astype(np.float32, copy=False)
    x = ops.resize(x, size, final["mode"])
    if "kernel" in final:
        x = ops.blur(x, kernels.build(final["kernel"]))
    return x if quality is None or final["jpeg_first"] else ops.jpeg(x, quality)


def _lq_size(hq: np.ndarray, scale: int) -> tuple[int, int]:
    if hq.dtype not in (np.uint8, np.float32) or hq.ndim != 3 or hq.shape[2] != 3:
        raise ValueError(
            f"degrade needs an image [H, W, 3] in uint8, or float32 in [0, 1], got {hq.shape} in {hq.dtype}: "
            "convert it to RGB first"
        )
    height, width = hq.shape[:2]
    if height % scale or width % scale:
        raise ValueError(f"{width}x{height} px cannot be divided by {scale}: crop the image to multiples of {scale} px")
    return width // scale, height // scale


def _as_uint8(hq: np.ndarray) -> np.ndarray:
    return fast.to_uint8(hq if hq.dtype == np.uint8 else hq * np.float32(255))
