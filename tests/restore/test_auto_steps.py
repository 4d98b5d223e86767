"""auto_steps.py: the fewest steps whose result doubling would not change, judged in the most detailed region."""

import numpy as np
import pytest

from teasr import Upscaler
from teasr.restore.auto_steps import busiest, choose


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
