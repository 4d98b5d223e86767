"""color.py: a colour cast is removed, detail and bit depth are kept, and processing by rows equals the whole image."""

import cv2
import numpy as np
import pytest
import skimage.data

from teasr.imaging import color

SOURCE = np.ascontiguousarray(skimage.data.coffee())  # 600 x 400


def with_a_cast(x: np.ndarray) -> np.ndarray:
    """An image sharper than the source and with wrong colours."""
    sharper = x + 0.8 * (x.astype(np.float32) - cv2.GaussianBlur(x, (0, 0), 2).astype(np.float32))
    return (sharper * (0.85, 1.0, 1.1) + (12, -8, 3)).clip(0, 255).astype(np.uint8)


def coarse(x: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(x.astype(np.float32), (0, 0), 30)


@pytest.mark.parametrize("kind", ["wavelet", "adain", "lab"])
def test_a_cast_goes_and_detail_stays(kind):
    made = with_a_cast(SOURCE)
    before, detail = np.abs(coarse(made) - coarse(SOURCE)).mean(), cv2.Laplacian(made, cv2.CV_32F).std()
    color.correct(kind, made, SOURCE)
    assert np.abs(coarse(made) - coarse(SOURCE)).mean() < before / (
        2 if kind == "lab" else 4
    )  # a gain in RGB is not a gain in CIELAB
    assert cv2.Laplacian(made, cv2.CV_32F).std() > 0.85 * detail


def test_wavelet_is_the_published_decomposition():
    """High frequencies of the restored image plus low ones of the source.

    They are computed by dilated 3x3 convolutions with repeated edges.
    """
    import torch
    import torch.nn.functional as F

    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None].repeat(3, 1, 1, 1) / 16

    def low(x: np.ndarray) -> torch.Tensor:
        z = torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None]
        for level in range(5):
            z = F.conv2d(F.pad(z, [2**level] * 4, mode="replicate"), kernel, groups=3, dilation=2**level)
        return z[0].permute(1, 2, 0)

    made = with_a_cast(SOURCE)
    wanted = (torch.from_numpy(made.astype(np.float32)) - low(made) + low(SOURCE)).round().clamp(0, 255).numpy()
    color.correct("wavelet", made, SOURCE)
    assert np.abs(made - wanted).max() <= 1 and (made != wanted).mean() < 1e-3


@pytest.mark.parametrize("kind", ["wavelet", "adain", "lab"])
def test_rows_at_a_time_are_the_whole_at_once(kind, monkeypatch):
    whole, rows = with_a_cast(SOURCE), with_a_cast(SOURCE)
    color.correct(kind, whole, SOURCE)
    for step in (40, 7):
        rows = with_a_cast(SOURCE)
        monkeypatch.setattr(color, "ROWS", step)
        color.correct(kind, rows, SOURCE)
        assert np.abs(rows.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("kind", ["wavelet", "adain", "lab"])
def test_the_source_itself_stays_in_either_depth(kind):
    for x in (SOURCE, SOURCE.astype(np.uint16) * 257):
        made = x.copy()
        color.correct(kind, made, x)
        assert made.dtype == x.dtype and np.abs(made.astype(int) - x).max() <= (
            1 if x.dtype == np.uint8 else 200
        )  # OpenCV's CIELAB conversion uses a lookup table


def test_none_and_others():
    made = with_a_cast(SOURCE)
    color.correct("none", made, SOURCE)
    assert np.array_equal(made, with_a_cast(SOURCE))
    with pytest.raises(ValueError, match="none, wavelet, adain, lab"):
        color.correct("sepia", made, SOURCE)
