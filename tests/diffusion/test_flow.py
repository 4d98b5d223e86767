"""flow.py: the algebra, the shortcut composition, and w(s) against a closed form."""

import math

import pytest
import torch

from teasr.diffusion import flow


def test_path_and_its_inversions():
    g = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 4, 3, 5, 5, generator=g, dtype=torch.float64).unbind(0)
    t = torch.rand(4, generator=g, dtype=torch.float64)
    z_t, v = flow.interpolate(z0, eps, t), flow.velocity_target(z0, eps)
    assert torch.allclose(flow.z0_from_velocity(z_t, v, t), z0)
    assert torch.allclose(flow.eps_from_velocity(z_t, v, t), eps)
    assert torch.allclose(flow.step(z_t, v, t, t / 3), flow.interpolate(z0, eps, t / 3))


@pytest.mark.parametrize("place", [0.5, 0.1, 0.8])
def test_shortcut_target_is_the_jump_over_both_halves(place):
    """One jump along the composed velocity ends where the two half jumps end, for any midpoint (eqs. 1-3)."""
    g = torch.Generator().manual_seed(1)
    z, u1, u2 = torch.randn(3, 6, 2, 4, 4, generator=g, dtype=torch.float64).unbind(0)
    t = torch.rand(6, generator=g, dtype=torch.float64)
    s = t * torch.rand(6, generator=g, dtype=torch.float64)
    m = s + place * (t - s)
    two = flow.step(flow.step(z, u1, t, m), u2, m, s)
    assert torch.allclose(flow.step(z, flow.shortcut_target(u1, u2, t, m, s), t, s), two)


def test_shortcut_target_of_an_empty_jump_is_finite():
    u1, u2, t = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([0.3, 0.0])
    assert torch.equal(flow.shortcut_target(u1, u2, t, t, t), torch.full((2, 1, 2, 2), 0.5))


@pytest.mark.parametrize("s", [0.05, 0.3, 0.9])
def test_tar_weight_is_the_gradient_of_reverse_kl(s):
    """For 1-D Gaussians, d KL(fake_s || real_s) / d(shift of v) == E[w(s) (v_fake - v_real)] (eq. 14)."""
    mean_fake, mean_real, std = torch.tensor(0.7, dtype=torch.float64), 0.2, 0.5

    def mean_velocity(mean):  # E[v | z_s] for z0 ~ N(mean, std^2), averaged over the fake z_s
        a, variance = 1 - s, (1 - s) ** 2 * std**2 + s**2
        gain = (s - a * std**2) / variance
        return -mean + gain * (a * mean_fake - a * mean)

    difference = mean_velocity(mean_fake) - mean_velocity(mean_real)
    shift = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)  # v + shift moves z_fake by -shift
    variance = (1 - s) ** 2 * std**2 + s**2
    kl = ((1 - s) * (mean_fake - shift - mean_real)) ** 2 / (2 * variance)
    kl.backward()
    w = flow.tar_weight(torch.tensor([s], dtype=torch.float64))
    assert torch.allclose(w * difference, shift.grad)


def test_tar_weight_cap():
    s = torch.tensor([0.02, 0.5])
    assert flow.tar_weight(s).tolist() == pytest.approx([0.98**2 / 0.02, 0.5])
    assert flow.tar_weight(s, cap=10).tolist() == pytest.approx([10, 0.5])


def test_sampling_times_are_algorithm_1():
    assert flow.sampling_times(1) == [(1.0, 0.0)]
    times = flow.sampling_times(4)
    assert times == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert all(math.isclose(a - b, 1 / 30) for a, b in flow.sampling_times(30))
    with pytest.raises(ValueError, match="steps = 0"):
        flow.sampling_times(0)
