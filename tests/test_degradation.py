"""degradation.py: pure, within its ranges, its kernels against their definition, no drift against HQ."""

import dataclasses
import math

import cv2
import numpy as np
import pytest
import skimage.data

from teasr.degradation import (
    KERNELS,
    PRESETS,
    Degradation,
    Stage,
    _resize,
    degrade,
    draw_kernel,
    gaussian_kernel,
    preset,
    sinc_kernel,
)

CROP = np.ascontiguousarray(skimage.data.coffee()[100:228, 200:328])


@pytest.mark.parametrize("name", PRESETS)
def test_same_generator_same_bytes(name):
    (a, drawn), (b, again), (c, _) = (degrade(CROP, preset(name), np.random.default_rng(s)) for s in (5, 5, 6))
    assert a.shape == (32, 32, 3) and a.dtype == np.uint8
    assert np.array_equal(a, b) and drawn == again
    assert name == "none" or not np.array_equal(a, c)


def test_draws_stay_in_the_ranges_of_the_preset():
    stages, n = PRESETS["osediff"].stages, 0
    for seed in range(60):
        _, drawn = degrade(CROP, PRESETS["osediff"], np.random.default_rng(seed))
        for stage, d in zip(stages, (drawn["stage1"], drawn["stage2"]), strict=True):
            assert stage.resize_range[0] <= d["resize"] <= stage.resize_range[1]
            noise = d["noise"]
            low, high = stage.noise_sigma if "gaussian" in noise else stage.poisson_scale
            assert low <= noise.get("gaussian", noise.get("poisson")) <= high
            if "kernel" in d:
                n += 1
                assert d["kernel"]["size"] in range(7, 22, 2)
        assert 30 <= drawn["stage1"]["jpeg"] <= 95 and 30 <= drawn["final"]["jpeg"] <= 95
    assert n > 90


def test_kernel_families_come_in_their_proportions():
    stage, rng = PRESETS["osediff"].stages[0], np.random.default_rng(0)
    families = [draw_kernel(stage, rng)[1]["family"] for _ in range(2000)]
    share = {f: families.count(f) / 2000 for f in (*KERNELS, "sinc")}
    assert share["sinc"] == pytest.approx(0.1, abs=0.02)
    assert share["iso"] == pytest.approx(0.9 * 0.45, abs=0.04) and share["plateau_aniso"] == pytest.approx(
        0.027, abs=0.015
    )


def test_kernels_sum_to_one_and_match_their_definition():
    k = gaussian_kernel(15, 2.0, 2.0, 0.0, 1.0, plateau=False)
    g = cv2.getGaussianKernel(15, 2.0)
    assert np.allclose(k, g @ g.T, atol=1e-6)
    aniso = gaussian_kernel(21, 3.0, 1.0, math.pi / 2, 1.0, plateau=False)
    axis = np.arange(21) - 10
    assert (aniso.sum(1) * axis**2).sum() > 2 * (aniso.sum(0) * axis**2).sum()  # turned: long side vertical
    flat = gaussian_kernel(15, 2.0, 2.0, 0.0, 2.0, plateau=True)
    assert flat[7, 8] / flat[7, 7] > k[7, 8] / k[7, 7]
    rng = np.random.default_rng(0)
    for _ in range(50):
        kernel, _ = draw_kernel(PRESETS["osediff"].stages[0], rng)
        assert kernel.sum() == pytest.approx(1, abs=1e-4)


def test_sinc_kernel_is_a_low_pass():
    spectrum = np.abs(np.fft.fft2(sinc_kernel(math.pi / 3, 21), (64, 64)))
    assert spectrum[0, 0] == pytest.approx(1, abs=1e-4)
    assert spectrum[0, 4] == pytest.approx(1, abs=0.25) and spectrum[0, 25] < 0.1  # cutoff lies at 64 / 6 = 10.7


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [0.15, 0.33, 0.77, 1.4])
def test_resizing_there_and_back_does_not_shift(mode, scale):
    """The peers' scale-factor resize drifts by up to 5 px on a ramp; explicit sizes must not: < 0.05 px of 512."""
    n, m = 512, round(512 * scale)
    ramp = np.repeat(np.linspace(0, 1, n, dtype=np.float32)[None], n, 0)[..., None].repeat(3, 2)
    down = _resize(ramp, (m, m), mode)
    positions = (np.arange(m) + 0.5) * n / m - 0.5  # HQ column under each LQ column
    inner = slice(m // 8, -m // 8)
    assert np.abs(down[m // 2, inner, 0] * (n - 1) - positions[inner]).max() < 0.05


def test_whole_pipeline_keeps_the_geometry():
    """A soft edge crosses its middle at the same place in LQ, on average over all draws (noise aside)."""
    edge = 255 / (1 + np.exp(-(np.arange(128) - 63.5) / 6))
    hq = np.repeat(edge[None, :, None].round().astype(np.uint8), 128, 0).repeat(3, 2)
    light = preset("stablesr")
    quiet = [dataclasses.replace(s, noise_sigma=(0, 0), gaussian_probability=1.0) for s in light.stages]
    places = []
    for seed in range(40):
        lq, _ = degrade(hq, dataclasses.replace(light, stages=tuple(quiet)), np.random.default_rng(seed))
        row = lq.astype(float).mean((0, 2))
        places.append(np.interp(127.5, row[12:20], np.arange(12, 20)))
    assert np.mean(places) == pytest.approx(15.5, abs=0.05)


def test_poisson_and_gray_noise():
    stage = Stage(
        0,
        (1, 1),
        (1, 1),
        (1, 1),
        (0, 0, 1),
        (1, 1),
        (10, 10),
        (1, 1),
        (95, 95),
        gaussian_probability=0,
        gray_probability=1,
    )
    hq = np.full((64, 64, 3), 128, np.uint8)
    only = Degradation("x", scale=1, stages=(stage,), final_sinc_probability=0)
    lq, drawn = degrade(hq, only, np.random.default_rng(0))
    assert drawn["stage1"]["noise"] == {"poisson": 1.0, "gray": True}
    noise = lq.astype(float) - 128
    # two grey levels are taken for flat: vals = 2, so the Poisson noise of 0.5 is sqrt(0.25) = 0.5 of full scale
    assert noise.std() > 60 and np.abs(noise[..., 0] - noise[..., 1]).mean() < 8


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (CROP.astype(np.float32), "uint8"),
        (CROP[..., 0], "uint8"),
        (np.ascontiguousarray(CROP[:126]), "126 px cannot be reduced x4"),
    ],
)
def test_bad_pictures_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        degrade(picture, preset("osediff"), np.random.default_rng(0))


def test_unknown_preset():
    with pytest.raises(ValueError, match="use one of osediff"):
        preset("osedif")
