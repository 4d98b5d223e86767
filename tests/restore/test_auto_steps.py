"""auto_steps.py: the fewest steps whose result doubling would not change, judged in the most detailed region."""

import cv2
import numpy as np
import pytest
import skimage.data

from teasr import Upscaler
from teasr.restore.auto_steps import busiest, by_uncertainty, choose


def converging(first_change):
    """Results that change by first_change grey levels, then by half of that, and so on."""
    done = []

    def restore(steps):
        done.append(steps)
        return np.full((8, 8, 3), round(128 + first_change * 2 * (1 - 1 / steps)), np.uint8)

    return restore, done


@pytest.mark.parametrize(
    ("change", "steps", "evaluated"),
    [(2, 1, [1, 2]), (8, 2, [1, 2, 4]), (16, 4, [1, 2, 4, 8]), (40, 8, [1, 2, 4, 8])],
)
def test_steps_double_until_it_makes_no_difference(change, steps, evaluated):
    restore, done = converging(change)
    chosen, left = choose(restore)
    assert chosen == steps and done == evaluated
    assert (left <= 4) == (change < 40)


def test_sixteen_bits_count_in_the_same_levels():
    def restore(steps):
        return np.full((8, 8, 3), 30000 + 257 * 10 // steps, np.uint16)

    assert choose(restore) == (2, pytest.approx(10 / 2 - 10 / 4, abs=0.01))


@pytest.mark.parametrize("size", [(512, 1024), (2048, 1536)])
def test_the_busiest_part_is_found(size):
    frame = np.full((*size, 3), 100, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    frame[256:384, 320:448] = noise
    part = busiest(frame, 128, 16)
    assert part.shape == (128, 128, 3) and (part != 100).any(2).mean() > 0.9
    assert busiest(frame[:64], 128, 16).shape == (64, 128, 3)
    assert busiest(np.zeros_like(frame), 128, 16).shape == (128, 128, 3)


def test_a_picture_gets_the_steps_that_were_chosen_and_is_told(untrained, monkeypatch):
    upscaler, told = Upscaler.from_pretrained(untrained), []
    photo = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    made = upscaler(photo, "auto", say=told.append)
    (line,) = told
    steps = int(line.split()[0])
    assert line.startswith(f"{steps} step") and "twice as many would change" in line
    assert np.array_equal(made, upscaler(photo, steps))
    monkeypatch.setattr("teasr.restore.auto_steps.choose", lambda restore: (1, 0.0))
    assert np.array_equal(
        upscaler(photo, "auto", fidelity=0.5, say=told.append), upscaler(photo, 1)
    )  # one step leaves nothing to blend


@pytest.mark.parametrize(("uncertainty", "steps"), [(1.7, 4), (2.25, 2), (4.9, 2), (5.0, 1), (40.0, 1)])
def test_less_is_invented_where_less_is_known(uncertainty, steps):
    assert by_uncertainty(uncertainty) == steps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_small_model_predicts_it_without_trying(dtype):
    """The same photograph is more uncertain when it is blurred and noisy, and the steps follow from that."""
    upscaler, said = Upscaler.from_pretrained("small", device="cpu", dtype=dtype), []
    clean = np.ascontiguousarray(skimage.data.chelsea()[40:168:2, 100:228:2])
    noise = np.random.default_rng(0).normal(0, 12, clean.shape)
    poor = np.clip(cv2.GaussianBlur(clean, (0, 0), 2) + noise, 0, 255).astype(np.uint8)
    results = [upscaler(x, "auto", say=said.append) for x in (clean, poor)]
    shares = [float(line.split("chosen: ")[1].split()[0]) for line in said]
    assert len(said) == 2 and shares[0] < shares[1]
    for x, line, share, result in zip((clean, poor), said, shares, results, strict=True):
        assert int(line.split()[0]) == by_uncertainty(share)
        assert np.array_equal(result, upscaler(x, int(line.split()[0])))
