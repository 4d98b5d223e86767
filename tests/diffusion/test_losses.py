"""losses.py: rectification and its analytic gradient, EA-DISTS, GAN losses, the checkerboard detector."""

import math

import pytest
import torch
import torch.nn.functional as F

from teasr.diffusion import losses, perceptual


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


def test_the_grid_loss_removes_the_pattern_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 64, 64, generator=g) * 2 - 1
    dots = torch.rand(1, 1, 4, 4, generator=g).repeat(1, 1, 16, 16) - 0.5
    dotted = x + dots
    value, gradient = losses.gradient_through(lambda z: losses.grid(z, 4).sum(), dotted)
    assert value > 20 * losses.grid(x, 4).sum() and torch.allclose(
        value / 2, losses.checkerboard_energy(dotted, 4), 0.01
    )
    cell = gradient.mean(1).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
    assert torch.allclose(cell[:, 1:-1, :, 1:-1], cell[:, 1:2, :, 1:2], atol=1e-9), (
        "the same in every cell but the border"
    )
    assert torch.corrcoef(torch.stack((gradient[0, 0].flatten(), dots.flatten())))[0, 1] > 0.8
    assert losses.grid(torch.zeros(1, 3, 16, 16), 4) == 0


def test_checkerboard_energy_finds_its_period():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 128, 128, generator=g)
    tile = torch.randn(1, 3, 8, 8, generator=g).repeat(1, 1, 16, 16)
    assert losses.checkerboard_energy(noise, 8) < 0.01
    assert losses.checkerboard_energy(tile, 8) > 0.9
    assert losses.checkerboard_energy(tile, 7) < 0.1
    weak, strong = (losses.checkerboard_energy(noise + a * tile, 8) for a in (0.2, 1.0))
    assert weak < strong


def test_sobel_of_a_ramp_is_eight_and_its_gradient_on_flat_regions_is_finite():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    for x in (ramp, ramp.transpose(2, 3)):
        assert torch.allclose(losses.sobel(x)[..., 1:-1, 1:-1], torch.tensor(8.0), atol=1e-5)
    both = losses.sobel(ramp + ramp.transpose(2, 3))[..., 1:-1, 1:-1]
    assert torch.allclose(both, torch.tensor(8 * math.sqrt(2)), atol=1e-5)
    flat = torch.full((2, 3, 16, 16), 0.3, requires_grad=True)
    found = losses.sobel(flat)
    found.sum().backward()
    assert flat.grad.isfinite().all() and found.max() < 2e-3
    colours = torch.stack((ramp[0, 0], torch.zeros(16, 16), 2 * ramp[0, 0]))[None]  # each channel by itself
    assert torch.allclose(losses.sobel(colours)[0, :, 8, 8], torch.tensor([8.0, 1e-3, 16.0]), atol=1e-5)


def test_ea_dists_is_dists_of_the_pictures_plus_dists_of_their_edges():
    torch.manual_seed(0)
    dists, g = perceptual.load_dists(weights=False), torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(2, 3, 12, 12, generator=g), size=48, mode="bicubic").clamp(0, 1) * 1.4 - 0.9
    blurred, brighter = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False), x + 0.2

    def edges(z):
        return 2 * losses.sobel((z + 1) / 2) - 1

    with torch.no_grad():
        found = losses.ea_dists(dists, x, blurred)
        assert found.shape == (2,)
        assert torch.allclose(found, dists(x, blurred) + dists(edges(x), edges(blurred)), atol=1e-6)
        assert torch.allclose(found, losses.ea_dists(dists, blurred, x), atol=1e-6)
        assert losses.ea_dists(dists, x, x).abs().max() < 1e-5
        edge_term = [losses.ea_dists(dists, x, y) - dists(x, y) for y in (blurred, brighter)]
    assert edge_term[1].abs().max() < 1e-4 < edge_term[0].min()


def test_ea_dists_has_a_finite_gradient_on_flat_pictures():
    torch.manual_seed(0)
    dists, flat = perceptual.load_dists(weights=False), torch.zeros(1, 3, 32, 32)
    for y in (flat, torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1):
        x = flat.clone().requires_grad_()
        losses.ea_dists(dists, x, y).sum().backward()
        assert x.grad.isfinite().all()


def test_gan_losses_are_those_of_probabilities_and_finite_for_large_logits():
    zero = torch.zeros(2, 3, 3)
    assert losses.gan_discriminator(zero, zero).item() == pytest.approx(2 * math.log(2), abs=1e-7)
    assert losses.gan_generator(zero).item() == pytest.approx(math.log(2), abs=1e-7)
    real, fake = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p_real, p_fake = real.sigmoid(), fake.sigmoid()
    assert torch.allclose(losses.gan_generator(fake), -p_fake.log().mean())
    assert torch.allclose(losses.gan_discriminator(real, fake), -p_real.log().mean() - (1 - p_fake).log().mean())
    for value in (1e4, -1e4):
        logits = torch.full((2, 2), value, requires_grad=True)
        (losses.gan_generator(logits) + losses.gan_discriminator(logits, logits)).backward()
        assert logits.grad.isfinite().all()
