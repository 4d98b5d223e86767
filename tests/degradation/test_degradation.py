"""degradation/: pure, within its ranges, no shift against HQ; kernels, stages and statistics match public code.

The reference is bench/peer_degradation.py: a slow and literal version of the public pipeline that uses torch's own
operators and shares no code with ours. Both were written by the same author, so both could contain the same misreading
of the public code.
"""

import dataclasses
import io
import json
import math

import cv2
import numpy as np
import peer_degradation as peers
import pytest
import skimage.data
import torch
from PIL import Image
from scipy import stats

from teasr import degradation
from teasr.degradation import PRESETS, Degradation, Stage, apply, degrade, draw, fast, kernels, preset, sharpen
from teasr.degradation import reference as ref

COFFEE = skimage.data.coffee()
CROP = np.ascontiguousarray(COFFEE[100:228, 200:328])
SMOOTH = cv2.GaussianBlur(CROP, (0, 0), 1).astype(np.float32)


def as_torch(x):
    return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].float() / 255


def as_numpy(x):
    return x[0].permute(1, 2, 0).numpy() * 255


def of_peers(params, settings):
    """Convert the reference's drawn parameters to ours; its kernels are matrices and are used as they are."""
    stages = []
    for stage in (params["first"], params["second"]):
        drawn = {
            "resize": stage["scale"],
            "mode": stage["mode"],
            "noise": "gaussian" if stage["gaussian"] else "poisson",
        }
        drawn |= {"level": stage["level"], "gray": stage["gray"], "jpeg": stage["quality"]}
        stages.append(drawn | ({"kernel": stage["kernel"]} if stage["blur"] else {}))
    final = {"mode": params["final_mode"], "jpeg_first": not params["resize_first"], "kernel": params["sinc"]}
    return {"scale": settings.scale, "peer_exact": settings.peer_exact, "stages": stages, "final": final}


FIELDS = {  # the compared draws: (from ours, from the reference's), lists of numbers
    name: (ours, theirs)
    for i, stage in enumerate(("first", "second"))
    for name, ours, theirs in (
        (f"resize {stage}", lambda r, i=i: [r["stages"][i]["resize"]], lambda r, s=stage: [r[s]["scale"]]),
        (f"quality {stage}", lambda r, i=i: [r["stages"][i]["jpeg"]], lambda r, s=stage: [r[s]["quality"]]),
        (
            f"sigma {stage}",
            lambda r, i=i: [r["stages"][i]["level"]] * (r["stages"][i]["noise"] == "gaussian"),
            lambda r, s=stage: [r[s]["level"]] * r[s]["gaussian"],
        ),
        (
            f"poisson {stage}",
            lambda r, i=i: [r["stages"][i]["level"]] * (r["stages"][i]["noise"] == "poisson"),
            lambda r, s=stage: [r[s]["level"]] * (not r[s]["gaussian"]),
        ),
        (
            f"kernel's peak {stage}",
            lambda r, i=i: [kernels.build(r["stages"][i]["kernel"]).max()] if "kernel" in r["stages"][i] else [],
            lambda r, s=stage: [r[s]["kernel"].max()] * r[s]["blur"],
        ),
    )
}


# purity, ranges


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("peer_exact", [False, True])
def test_same_generator_same_bytes(name, peer_exact):
    settings = preset(name, peer_exact)
    (a, drawn), (b, again), (c, _) = (degrade(CROP, settings, np.random.default_rng(s)) for s in (5, 5, 6))
    assert a.shape == (32, 32, 3) and a.dtype == np.uint8
    assert np.array_equal(a, b) and drawn == again
    assert name == "none" or not np.array_equal(a, c)


@pytest.mark.parametrize("name", PRESETS)
def test_float_pictures_give_the_same_as_uint8(name):
    for seed in range(4):
        a, b = (degrade(x, preset(name), np.random.default_rng(seed))[0] for x in (CROP, CROP / np.float32(255)))
        assert np.abs(a.astype(int) - b).max() <= (8 if name != "none" else 0)
        # a difference in the last bit may change a rounding, which JPEG spreads over a block
        assert (a != b).mean() < 0.02


def test_restoration_presets_keep_the_size_at_scale_1_and_do_what_their_names_say():
    hq = np.ascontiguousarray(skimage.data.astronaut()[:128, 100:228])
    for name, (low, high) in {"noise": (14, 36), "jpeg": (18, 40), "blur": (18, 40)}.items():
        settings = preset(name, scale=1)
        rows = [degrade(hq, settings, np.random.default_rng(seed)) for seed in range(20)]
        assert all(lq.shape == hq.shape for lq, _ in rows)
        psnr = [10 * np.log10(255**2 / np.mean((lq.astype(float) - hq) ** 2)) for lq, _ in rows]
        assert low < min(psnr) and max(psnr) < high and max(psnr) - min(psnr) > 3, (name, psnr)
        stages = [drawn["stages"][0] for _, drawn in rows]
        assert all(("noise" in s) == (name != "jpeg") and ("jpeg" in s) == (name == "jpeg") for s in stages)
        assert all(("kernel" in s) == (name == "blur") and s["resize"] == 1 for s in stages)
    families = {
        draw(preset("blur", scale=1), np.random.default_rng(i))["stages"][0]["kernel"]["family"] for i in range(99)
    }
    assert "motion" in families and len(families) == 7
    noisy, drawn = degrade(np.full((256, 256, 3), 128, np.uint8), preset("noise", scale=1), np.random.default_rng(3))
    assert noisy.std() == pytest.approx(drawn["stages"][0]["level"], rel=0.02)


@pytest.mark.parametrize(("length", "angle"), [(3.0, 0.0), (9.5, 0.7), (15.0, math.pi / 2), (8.0, 2.5)])
def test_a_motion_kernel_is_a_line_of_its_length_and_angle(length, angle):
    """Its second moments are those of a uniform line, plus at most 1/4 px^2 from the bilinear weights."""
    kernel = kernels.motion(length, angle)
    r = len(kernel) // 2
    y, x = np.mgrid[: 2 * r + 1, : 2 * r + 1] - float(r)
    along, across = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0 and len(kernel) % 2 == 1
    assert [(kernel * v).sum() for v in (x, y)] == pytest.approx([0, 0], abs=1e-9)
    assert length**2 / 12 - 0.01 <= (kernel * along**2).sum() <= length**2 / 12 + 0.26
    assert 0 <= (kernel * across**2).sum() <= 0.26


def test_what_was_drawn_makes_the_same_lq_again():
    """The mapping survives JSON, so a sample's LQ can be made again from its record."""
    settings = preset("osediff")
    for seed in range(5):
        lq, drawn = degrade(CROP, settings, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        assert json.loads(json.dumps(drawn)) == draw(settings, rng) == drawn
        assert np.array_equal(apply(CROP, json.loads(json.dumps(drawn)), rng), lq)


def test_draws_stay_in_the_ranges_of_the_preset_and_come_in_their_proportions():
    settings = preset("osediff")
    rows = [draw(settings, np.random.default_rng(seed)) for seed in range(3000)]
    for i, stage in enumerate(settings.stages):
        drawn = [row["stages"][i] for row in rows]
        low, high = stage.resize_range
        assert all(low <= d["resize"] <= high and 30 <= d["jpeg"] <= 95 for d in drawn)
        shares = [np.mean([d["resize"] > 1 for d in drawn]), np.mean([d["resize"] < 1 for d in drawn])]
        assert shares == pytest.approx(stage.resize_probability[:2], abs=0.03)
        assert np.mean(["kernel" in d for d in drawn]) == pytest.approx(stage.blur_probability, abs=0.03)
        assert np.mean([d["gray"] for d in drawn]) == pytest.approx(0.4, abs=0.03)
        assert np.mean([d["noise"] == "gaussian" for d in drawn]) == pytest.approx(0.5, abs=0.03)
        for kind, (low, high) in (("gaussian", stage.noise_sigma), ("poisson", stage.poisson_scale)):
            levels = [d["level"] for d in drawn if d["noise"] == kind]
            assert stats.kstest(levels, "uniform", (low, high - low)).pvalue > 1e-3
        made = [d["kernel"] for d in drawn if "kernel" in d]
        share = {f: np.mean([d["family"] == f for d in made]) for f in (*kernels.FAMILIES, "sinc")}
        assert share["sinc"] == pytest.approx(0.1, abs=0.02)
        for family, p in zip(kernels.FAMILIES, kernels.PROBABILITIES, strict=True):
            assert share[family] == pytest.approx(0.9 * p, abs=0.03)
        assert {d["size"] for d in made} == set(range(7, 22, 2))
        betas = [d["beta"] for d in made if d["family"].startswith("plateau")]
        # a quirk of the public code, kept on purpose
        assert np.mean(np.array(betas) == 1) == pytest.approx(0.5, abs=0.08)
    assert np.mean([row["final"]["jpeg_first"] for row in rows]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(["kernel" in row["final"] for row in rows]) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("osediff", "osediff"), ("realesrgan_usm", "osediff"), ("stablesr", "stablesr")]
)
def test_presets_have_the_published_numbers(ours, theirs):
    """Both sides write out the public options independently, so the draws must have the same distributions."""
    settings, options = preset(ours), peers.OPTIONS[theirs]
    a = [draw(settings, np.random.default_rng(s)) for s in range(1500)]
    b = [peers.draw(options, np.random.default_rng(s)) for s in range(1500)]
    for ours_of, theirs_of in FIELDS.values():
        left, right = [v for row in a for v in ours_of(row)], [v for row in b for v in theirs_of(row)]
        assert min(len(left), len(right)) > 100
        assert stats.ks_2samp(left, right).pvalue > 1e-4


# kernels


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["osediff", "stablesr"])
def test_kernels_are_those_of_public_code(name, stage):
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(150):
        d = kernels.draw(PRESETS[name].stages[stage], rng)
        ours = kernels.build(d)
        assert ours.sum() == pytest.approx(1)
        if d["family"] == "sinc":
            reference = peers.sinc(d["cutoff"], d["size"])
        else:
            kind = d["family"].split("_")[0]
            arguments = (d["size"], *d["sigma"], d["rotation"])
            isotropic = not d["family"].endswith("aniso")
            if kind in ("iso", "aniso"):
                reference = peers.gaussian(*arguments, isotropic)
            else:
                reference = {"generalized": peers.generalized, "plateau": peers.plateau}[kind](
                    *arguments, d["beta"], isotropic
                )
        worst = max(worst, np.abs(ours - reference).max())
    assert worst < 1e-5


def test_sinc_kernel_is_a_low_pass():
    spectrum = np.abs(np.fft.fft2(kernels.sinc(math.pi / 3, 21), (64, 64)))
    assert spectrum[0, 0] == pytest.approx(1, abs=1e-4)
    assert spectrum[0, 4] == pytest.approx(1, abs=0.25) and spectrum[0, 25] < 0.1  # the cutoff is at 64 / 6 = 10.7


# individual stages


def test_blur_is_the_dense_correlation_whichever_way_is_cheapest():
    """Separable, direct and FFT paths against torch's dense filter, on non-square uint8 and float32 input."""
    rng, ways = np.random.default_rng(1), set()
    x = np.ascontiguousarray(COFFEE[:90, :140])
    for _ in range(80):
        kernel = kernels.build(kernels.draw(PRESETS["osediff"].stages[0], rng))
        reference = as_numpy(peers.filter2d(as_torch(x), peers.pad(kernel)))
        for source in (x, x.astype(np.float32)):
            assert np.abs(fast.blur(source, kernel) - reference).max() < 0.03  # of 255
        assert np.abs(ref.blur(x, kernel) - reference).max() < 1e-3
        trimmed = fast._trim(kernel)
        ways.add(len(fast._separable_terms(trimmed)[1]) if len(trimmed) > 11 else -len(trimmed))
    assert 1 in ways and max(ways) > 5 and min(ways) < -5


@pytest.mark.parametrize("mode", fast.MODES)
@pytest.mark.parametrize("factor", [0.15, 0.33, 0.5, 0.77, 1.0, 1.4])
def test_peer_resizes_are_torchs(mode, factor):
    x = SMOOTH[:, :100]
    ours, theirs = ref.resize_by(x, factor, mode), as_numpy(peers.resize_factor(as_torch(x), factor, mode))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 0.01
    ours, theirs = ref.resize(x, (37, 41), mode), as_numpy(peers.resize_to(as_torch(x), (41, 37), mode))
    assert np.abs(ours - theirs).max() < 0.01
    if mode != "area":  # ours is an exact box filter, the reference uses adaptive pooling
        assert np.abs(fast.resize(x, (37, 41), mode) - theirs).max() < 0.02


@pytest.mark.parametrize("quality", [30.0, 49.9, 61.3, 95.0])
@pytest.mark.parametrize("size", [(128, 128), (77, 101)])
def test_peer_jpeg_is_diffjpeg(quality, size):
    x = np.ascontiguousarray(CROP[: size[0], : size[1]])
    ours, theirs = ref.jpeg(x, quality), as_numpy(peers.jpeg(as_torch(x), quality))
    close = np.abs(ours - theirs) < 0.1  # where float32 rounds a coefficient the other way, a whole block changes
    assert close.mean() > 0.99 and np.abs(ours - theirs).mean() < 0.05


def test_lean_jpeg_is_libjpeg_and_differs_from_diffjpeg_as_measured():
    """DiffJPEG has transposed tables: its output is closer to libjpeg's on the transposed image than on the image."""

    def psnr(a, b):
        return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - b) ** 2))

    theirs = ref.jpeg(CROP, 50)
    turned = fast.jpeg(np.ascontiguousarray(CROP.transpose(1, 0, 2)), 50).transpose(1, 0, 2)
    assert psnr(turned, theirs) > psnr(fast.jpeg(CROP, 50), theirs) + 3


def test_usm_is_that_of_public_code():
    x = np.ascontiguousarray(COFFEE[:200, :240])
    theirs = as_numpy(peers.Usm()(as_torch(x)))
    assert np.abs(fast.sharpen(x) - theirs).max() <= 1.0
    assert np.abs(theirs - x).mean() > 1
    assert sharpen(x, preset("osediff")) is x


def test_gaussian_noise_is_normal():
    x = np.full((256, 256, 3), 128, np.float32)
    for gray in (False, True):
        noise = fast.gaussian_noise(x, 12.0, gray, np.random.default_rng(0)) - 128
        assert stats.kstest(noise[..., 0].ravel() / 12, "norm").pvalue > 1e-3
        assert noise.std() == pytest.approx(12, rel=0.01) and abs(noise.mean()) < 0.1
        assert (np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1] > 0.99) == gray
        assert abs(np.corrcoef(noise[:-1, :, 0].ravel(), noise[1:, :, 0].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_has_the_law_of_public_code(gray):
    """Level by level, our draws (numpy's generator) against the literal reference operator (torch.poisson)."""
    x = np.repeat(np.linspace(0, 255, 256, dtype=np.float32)[None], 400, 0)[..., None].repeat(3, 2)
    for scale in (0.2, 1.0):
        ours = fast.poisson_noise(x, scale, gray, np.random.default_rng(0))
        theirs = as_numpy(peers.poisson_noise(as_torch(x), scale, gray, torch.Generator().manual_seed(0)))
        assert ours.std((0, 2))[40:200] == pytest.approx(theirs.std((0, 2))[40:200], rel=0.2)
        assert np.abs(ours.mean((0, 2)) - theirs.mean((0, 2))).max() < 4.5 * scale
        for level in (3, 30, 128, 220):
            a, b = ours[:, level, 0], theirs[:, level, 0]
            assert stats.ks_2samp(a.round(1), b.round(1)).pvalue > 1e-4


def test_few_levels_make_strong_poisson_noise():
    """Public code derives the photon count from the number of distinct levels.

    A flat image therefore gets one photon at white.
    """
    x = np.full((64, 64, 3), 128, np.float32)
    noise = fast.poisson_noise(x, 1.0, True, np.random.default_rng(0)) - 128
    assert set(np.unique(noise.round())) <= {-128.0, 127.0} and noise[..., 0].std() > 100


# the whole


def test_peer_exact_without_pixel_noise_equals_the_reference(monkeypatch):
    """With the same drawn parameters, both pipelines agree in 30 draws, except for roundings inside JPEG."""
    settings, options = preset("osediff", peer_exact=True), peers.OPTIONS["osediff"]
    errors = []
    for seed in range(30):
        params = peers.draw(options, np.random.default_rng(seed))
        theirs = as_numpy(peers.apply(as_torch(CROP), params, None))
        monkeypatch.setattr(kernels, "build", lambda kernel: kernel)
        errors.append(np.abs(apply(CROP, of_peers(params, settings), None) - theirs).mean())
    assert np.median(errors) < 0.02 and max(errors) < 0.5


def statistics_of(lq):
    up = cv2.resize(lq, (128, 128), interpolation=cv2.INTER_CUBIC)
    luma = cv2.cvtColor(lq, cv2.COLOR_RGB2GRAY)
    detail = cv2.Laplacian(luma, cv2.CV_32F)
    return {
        "psnr": 10 * np.log10(255**2 / np.mean((up.astype(float) - CROP) ** 2)),
        "median detail": np.median(np.abs(detail)),
        "detail": detail.std(),
        "chroma": cv2.cvtColor(lq, cv2.COLOR_RGB2YCrCb)[..., 1].std(),
        "shift of the mean": luma.mean() - cv2.cvtColor(CROP, cv2.COLOR_RGB2GRAY).mean(),
    }


def assert_same_law(settings, options, n=400):
    theirs = []
    for seed in range(n):
        noise = torch.Generator().manual_seed(seed)
        x = peers.degrade(as_torch(CROP), options, np.random.default_rng(seed), noise)
        theirs.append(statistics_of(as_numpy(x).round().astype(np.uint8)))
    ours = [statistics_of(degrade(CROP, settings, np.random.default_rng(10_000 + seed))[0]) for seed in range(n)]
    for key in ours[0]:
        p = stats.ks_2samp([row[key] for row in ours], [row[key] for row in theirs]).pvalue
        assert p > 0.002, (key, p)


@pytest.mark.parametrize("name", ["osediff", "stablesr"])
def test_peer_exact_pictures_are_distributed_as_those_of_public_code(name):
    """Kolmogorov-Smirnov tests on five statistics of 400 LQ images each."""
    assert_same_law(preset(name, peer_exact=True), peers.OPTIONS[name])


def box_weights(n, m):
    edge = np.linspace(0, n, m + 1)
    inside = np.minimum(edge[1:, None], np.arange(1, n + 1)) - np.maximum(edge[:-1, None], np.arange(n))
    return torch.tensor(np.clip(inside, 0, None) * m / n, dtype=torch.float32)


@pytest.mark.parametrize("name", ["osediff", "stablesr"])
def test_lean_pictures_are_distributed_as_public_codes_but_for_its_defects(monkeypatch, name):
    """The reference with the three documented deviations applied.

    These are explicit sizes, an exact box filter and libjpeg (through Pillow).
    """
    resize_to = peers.resize_to

    def to_size(x, size, mode):
        if mode != "area":
            return resize_to(x, size, mode)
        rows, columns = box_weights(x.shape[2], size[0]), box_weights(x.shape[3], size[1])
        return torch.einsum("ay,bcyx,dx->bcad", rows, x, columns)

    def by_factor(x, factor, mode):
        return to_size(x, (round(x.shape[2] * factor), round(x.shape[3] * factor)), mode)

    def libjpeg(x, quality):
        coded = io.BytesIO()
        pixels = as_numpy(x).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(coded, "JPEG", quality=round(quality), subsampling=2)
        return as_torch(np.array(Image.open(coded)))

    for function, replacement in (("resize_to", to_size), ("resize_factor", by_factor), ("jpeg", libjpeg)):
        monkeypatch.setattr(peers, function, replacement)
    assert_same_law(preset(name), peers.OPTIONS[name])


def test_the_statistics_would_notice_other_settings():
    with pytest.raises(AssertionError, match=r"detail|psnr|chroma"):
        assert_same_law(preset("stablesr", peer_exact=True), peers.OPTIONS["osediff"], n=200)


@pytest.mark.parametrize("mode", fast.MODES)
@pytest.mark.parametrize("scale", [0.15, 0.33, 0.77, 1.4])
def test_resizing_does_not_shift(mode, scale):
    """Public code's resize by scale factor drifts by up to 5 px along a ramp of 512.

    Resizing to explicit sizes must drift by less than 0.05 px.
    """
    n, m = 512, round(512 * scale)
    ramp = np.repeat(np.arange(n, dtype=np.float32)[None] / 2, n, 0)[..., None].repeat(3, 2)
    positions = (np.arange(m) + 0.5) * n / m - 0.5  # the HQ column that corresponds to each LQ column
    errors = 2 * fast.resize_by(ramp, scale, mode)[m // 2, :, 0] - positions
    for part in np.split(errors[m // 16 :][: m // 8 * 7], 7):
        assert abs(part.mean()) < 0.05  # a box filter gives a saw-tooth error within the parts, but no drift
    if mode != "area":
        assert np.abs(errors[m // 16 : -(m // 16)]).max() < 0.05


def test_the_whole_pipeline_does_not_shift_a_ramp_and_public_codes_does():
    """All draws, but no noise and the best JPEG quality: the ramp position of each LQ column near the far edge."""
    ramp = np.repeat(np.arange(0, 256, 2, dtype=np.float32)[None] / 255, 128, 0)[..., None].repeat(3, 2)
    shifts = {}
    for exact in (False, True):
        rows = []
        for seed in range(80):
            drawn = draw(preset("osediff", exact), np.random.default_rng(seed))
            for stage in drawn["stages"]:
                stage["jpeg"] = 99.0
            columns = apply(ramp, drawn, None)[8:-8, 20:28].astype(float).mean((0, 2)) / 2
            rows.append((columns - ((np.arange(20, 28) + 0.5) * 4 - 0.5)).mean())
        shifts[exact] = np.array(rows)
    # A single LQ is rounded to 0.25 px, and wide kernels see the mirrored border.
    assert abs(np.mean(shifts[False])) < 0.05 and np.quantile(np.abs(shifts[False]), 0.9) < 0.4
    assert abs(np.mean(shifts[True])) > 0.2 and np.quantile(np.abs(shifts[True]), 0.9) > 0.6


def test_whole_pipeline_keeps_the_geometry():
    """A soft edge crosses its midpoint at the same position in LQ, on average over all draws (without noise)."""
    edge = 255 / (1 + np.exp(-(np.arange(128) - 63.5) / 6))
    hq = np.repeat(edge[None, :, None].round().astype(np.uint8), 128, 0).repeat(3, 2)
    places = []
    for seed in range(40):
        row = apply(hq, draw(preset("stablesr"), np.random.default_rng(seed)), None).astype(float).mean((0, 2))
        places.append(np.interp(127.5, row[12:20], np.arange(12, 20)))
    assert np.mean(places) == pytest.approx(15.5, abs=0.05)


# mistakes


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (CROP.astype(np.float64), "uint8"),
        (CROP[..., 0], "uint8"),
        (np.ascontiguousarray(CROP[:126]), "126 px cannot be divided by 4"),
    ],
)
def test_bad_pictures_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        degrade(picture, preset("osediff"), np.random.default_rng(0))


def test_unknown_preset():
    with pytest.raises(ValueError, match="use one of osediff"):
        preset("osedif")


def test_settings_of_ones_own():
    """One stage, scale 1, no blur: users can define their own settings as plain data."""
    stage = Stage(0, (1, 1), (1, 1), (1, 1), (0, 0, 1), (1, 1), (10, 10), (1, 1), (95, 95), gaussian_probability=1)
    lq, drawn = degrade(
        CROP, Degradation("mine", scale=1, stages=(stage,), final_sinc_probability=0), np.random.default_rng(0)
    )
    assert lq.shape == CROP.shape and drawn["stages"][0]["level"] == 10 and "kernel" not in drawn["stages"][0]
    assert dataclasses.replace(preset("osediff"), usm=True).stages == degradation.preset("realesrgan_usm").stages
