"""losses.py: rectification and its analytic gradient, the checkerboard detector."""

import torch

from teasr.diffusion import losses


def test_rectification_gradient_is_that_of_the_squared_loss():
    g = torch.Generator().manual_seed(0)
    v, difference = torch.randn(2, 3, 4, 5, 5, generator=g, dtype=torch.float64).unbind(0)
    w = torch.rand(3, generator=g, dtype=torch.float64) * 5
    v.requires_grad_()
    losses.rectification(v, difference, w).backward()
    assert torch.allclose(v.grad, losses.rectification_gradient(difference, w), atol=1e-12)


def test_an_unsquared_norm_would_make_the_weight_a_no_op():
    """The reason for squaring the norm in eq. 11: an unsquared norm has the same gradient for two different w."""
    g = torch.Generator().manual_seed(0)
    difference = torch.randn(1, 4, 5, 5, generator=g)
    grads = []
    for w in (0.5, 8.0):
        v = torch.zeros_like(difference, requires_grad=True)
        (v - (v - w * difference).detach()).norm().backward()
        grads.append(v.grad)
    assert torch.allclose(*grads, atol=1e-6)
    squared = [losses.rectification_gradient(difference, torch.tensor([w])) for w in (0.5, 8.0)]
    assert torch.allclose(squared[0] * 16, squared[1])


def test_checkerboard_energy_finds_its_period():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 128, 128, generator=g)
    tile = torch.randn(1, 3, 8, 8, generator=g).repeat(1, 1, 16, 16)
    assert losses.checkerboard_energy(noise, 8) < 0.01
    assert losses.checkerboard_energy(tile, 8) > 0.9
    assert losses.checkerboard_energy(tile, 7) < 0.1
    weak, strong = (losses.checkerboard_energy(noise + a * tile, 8) for a in (0.2, 1.0))
    assert weak < strong
