"""tiling.py: every position is covered, weights sum to one, and margins have zero weight."""

import itertools

import pytest
import torch

from teasr.restore.tiling import Axis, Plan

CASES = [
    (length, size, overlap, margin)
    for length, size, overlap, margin in itertools.product(
        (1, 7, 16, 17, 31, 33, 100, 257), (16, 24), (3, 6, 15), (0, 1)
    )
    if 2 * margin < overlap
]


@pytest.mark.parametrize(("length", "size", "overlap", "margin"), CASES)
def test_weights_sum_to_one_everywhere(length, size, overlap, margin):
    axis = Axis.of(length, size, overlap, margin)
    for factor in (1, 4):
        total = torch.zeros(length * factor)
        for start, weight in zip(axis.starts, axis.weights(factor), strict=True):
            total[start * factor : (start + axis.size) * factor] += weight
            assert weight.min() >= 0
        assert (total - 1).abs().max() < 1e-6
    assert axis.starts[0] == 0 and axis.starts[-1] + axis.size == length
    for a, b in itertools.pairwise(axis.starts):
        assert a + axis.size - b >= overlap
    if len(axis.starts) > 1 and margin:
        assert (
            axis.weights()[1][0] == 0 and axis.weights()[0][0] == 1
        )  # context at an inner end, the image border at an outer one


def test_a_plan_puts_a_picture_together_again():
    picture = torch.randn(2, 3, 40 * 4, 56 * 4)
    plan = Plan.of(40, 56, 16, 6, 1)
    total = torch.zeros_like(picture)
    for tile in plan:
        tile.of(total, 4).add_(tile.of(picture, 4) * plan.weight(tile, 4))
    assert len(plan) == 4 * 5 and (total - picture).abs().max() < 1e-5
    whole = Plan.of(40, 56, 64, 6)
    assert len(whole) == 1 and (next(iter(whole)).height, next(iter(whole)).width) == (40, 56)


def test_the_weight_of_one_place_changes_slowly():
    """No step exceeds that of the ramp: a larger step would be a visible seam."""
    axis = Axis.of(100, 24, 8, 1)
    for weight in axis.weights(8):
        assert (weight[1:] - weight[:-1]).abs().max() <= 1.01 / (6 * 8)


def test_too_small_tiles_are_refused():
    with pytest.raises(ValueError, match="cannot overlap by 16"):
        Axis.of(100, 16, 16)


def test_spans_are_no_longer_than_their_overlap_asks_for():
    """With the same number of spans, shorter ones would overlap too little and longer ones repeat computation."""
    for length in range(20, 200, 7):
        for size, overlap in ((16, 3), (32, 4), (64, 8)):
            axis = Axis.of(length, size, overlap, 1)
            gaps = [b - a for a, b in itertools.pairwise(axis.starts)]
            assert axis.size <= size and axis.starts[-1] + axis.size == length
            if gaps:
                assert axis.size - max(gaps) >= overlap
                assert len(gaps) * (axis.size - 1 - overlap) + axis.size - 1 < length
    assert Axis.of(64, 32, 4).size == 24  # 512 px by tiles of 256: 3 x 192, not 3 x 256
