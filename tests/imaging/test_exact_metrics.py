"""Seam and detail ratio on pictures whose values are known in closed form."""

import numpy as np
import pytest
import skimage.data
from scipy.ndimage import gaussian_filter

from teasr.imaging.exact_metrics import detail_ratio, seam_ratio


def grey(x: np.ndarray) -> np.ndarray:
    return np.repeat(x[..., None], 3, 2).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_blocks_are_seen_by_the_expected_amount(period):
    """A ramp of one grey level a pixel along both axes; at every seam it jumps by two levels more."""
    i = np.arange(64)
    ramp = i + 2 * (i // period)
    x = grey(ramp[:, None] + ramp[None] * 0 + ramp[None])
    assert seam_ratio(x, (period,)) == pytest.approx(3) and seam_ratio(x) == pytest.approx(3)


def test_only_a_seam_along_one_axis_counts_half():
    i = np.arange(48)
    x = grey(i[:, None] + (i + 2 * (i // 8))[None])
    assert seam_ratio(x, (8,)) == pytest.approx(2)


def test_pictures_without_blocks_have_no_seams():
    assert seam_ratio(grey(np.full((40, 40), 90.0))) == 1
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    assert seam_ratio(noise) == pytest.approx(1, abs=0.02)
    assert 0.95 < seam_ratio(skimage.data.astronaut()) < 1.08
    assert seam_ratio(noise[:12, :12]) > 0  # periods that do not fit are left out
    with pytest.raises(ValueError, match=r"more than 4 px on both sides, got 40x4"):
        seam_ratio(noise[:4, :40])


@pytest.mark.parametrize("photo", ["astronaut", "coffee", "chelsea"])
def test_noise_raises_the_detail_ratio_and_equal_pictures_have_1(photo):
    hq = getattr(skimage.data, photo)()[:256, :256]
    assert detail_ratio(hq, hq) == 1
    noise = np.random.default_rng(0).normal(0, 1, hq.shape)
    ratios = [detail_ratio((hq + sd * noise).clip(0, 255).round().astype(np.uint8), hq) for sd in (0, 5, 10, 20)]
    assert ratios == sorted(ratios) and ratios[2] > 1.3


def test_too_little_detail_in_busy_areas_is_seen_too():
    """Halving the contrast of fine detail on a textured half takes the ratio to 4, energies being squares.

    The other half is flat, and stays as it was.
    """
    rng = np.random.default_rng(0)
    texture = rng.normal(0, 30, (128, 128))
    texture -= gaussian_filter(texture, 2.5)
    texture[:, :64] = 0
    made, hq = grey(120 + texture / 2), grey(120 + texture)
    assert detail_ratio(made, hq) == pytest.approx(4, rel=0.15)
    assert detail_ratio(hq, made) == pytest.approx(1 / 4, rel=0.15)
    with pytest.raises(ValueError, match="different sizes"):
        detail_ratio(made[1:], hq)
