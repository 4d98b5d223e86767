"""metrics.py against independent implementations."""

import numpy as np
import pytest
import skimage.data
from skimage.metrics import structural_similarity

from teasr.metrics import luma, psnr_y, ssim_y


@pytest.fixture(params=[2, 20])
def pair(request):
    hq = skimage.data.chelsea()[:200, :300]
    noise = np.random.default_rng(0).normal(0, request.param, hq.shape)
    return hq, (hq + noise).clip(0, 255).round().astype(np.uint8)


def test_luma_range():
    assert luma(np.zeros((1, 1, 3), np.uint8)).item() == 16
    assert luma(np.full((1, 1, 3), 255, np.uint8)).item() == pytest.approx(235)


def test_psnr_is_its_definition(pair):
    a, b = (0.257 * x[..., 0] + 0.504 * x[..., 1] + 0.098 * x[..., 2] for x in (p.astype(float) for p in pair))
    assert psnr_y(*pair) == pytest.approx(20 * np.log10(255 / np.sqrt(np.mean((a - b) ** 2))), abs=0.02)
    assert psnr_y(pair[0], pair[0]) == pytest.approx(80)


def test_ssim_equals_scikit_image(pair):
    a, b = (luma(x).round() for x in pair)
    _, full = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert ssim_y(*pair) == pytest.approx(full[5:-5, 5:-5].mean(), abs=2e-5)
    assert ssim_y(pair[0], pair[0]) == pytest.approx(1)


def test_equal_to_pyiqa(pair):
    """The protocol of the published tables; runs where the non-commercial extra is installed."""
    pyiqa = pytest.importorskip("pyiqa", reason="the `metrics` extra is not installed (PolyForm Noncommercial)")
    import torch

    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255 for x in pair)
    for name, ours, tolerance in (("psnr", psnr_y, 3e-5), ("ssim", ssim_y, 2e-6)):
        metric = pyiqa.create_metric(name, test_y_channel=True, color_space="ycbcr", device=torch.device("cpu"))
        assert ours(*pair) == pytest.approx(metric(b, a).item(), abs=tolerance)


def test_bad_sizes(pair):
    with pytest.raises(ValueError, match="different size"):
        psnr_y(pair[0], pair[1][1:])
    with pytest.raises(ValueError, match="11x11"):
        ssim_y(pair[0][:8, :8], pair[1][:8, :8])
