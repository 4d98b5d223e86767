"""Losses on tensors (MSE, squared rectification, EA-DISTS, GAN, grid), a grid detector, and gradients of inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from teasr.diffusion.flow import per_sample

FLAT = 1e-6  # below the root of the Sobel magnitude, whose gradient is not finite on flat regions without it
FAINT = 1e-4  # energy of 1.3 grey levels: images with less detail have no visible grid
_ONLY_INPUT: ContextVar[bool] = ContextVar("only_input_gradient", default=False)


def gradient_through(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of the scalar function(z) and its gradient with respect to z, both without a graph.

    z is detached first. No parameter receives a gradient: this is how a generator learns through a discriminator, a
    decoder or LPIPS. A plain backward pass would add to the discriminator's own gradient, with the wrong sign. Networks
    can be called as usual inside `function`.
    """
    leaf = z.detach().requires_grad_()
    token = _ONLY_INPUT.set(True)
    try:
        with torch.enable_grad():
            value = function(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
    finally:
        _ONLY_INPUT.reset(token)
    return value.detach(), gradient


def only_input_gradient() -> bool:
    """Whether the caller runs inside the function of a `gradient_through` call."""
    return _ONLY_INPUT.get()


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, computed in at least fp32.

    Used for L_flow, L_cons (TEASR eq. 4), L_adv (eq. 8) and the pixels (eq. 12).
    """
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    return F.mse_loss(prediction, target)


def rectification(v: Tensor, difference: Tensor, w: Tensor) -> Tensor:
    """*Squared* rectification loss, L_rectify = 1/2 mean || v - sg(v - w D) ||^2 (TEASR eqs. 9-11).

    w is [B]; D is the result of `score_difference`.

    Deviation: eq. 11 prints an un-squared norm, but its gradient D / ||D|| would not depend on w(s) at all.
    """
    target = (v - per_sample(w, v) * difference).detach()
    return 0.5 * F.mse_loss(v, target)


def rectification_gradient(difference: Tensor, w: Tensor) -> Tensor:
    """Gradient of `rectification` with respect to v, w D / numel, without building a graph."""
    return per_sample(w, difference) * difference / difference.numel()


def sobel(x: Tensor) -> Tensor:
    """Sobel magnitude of each channel, sqrt(Gx^2 + Gy^2 + 1e-6), [B, C, H, W] in [0, 1] -> the same shape, 0 to 5.7.

    Sides are continued by reflection and must be at least 2 px.
    """
    smooth, difference = x.new_tensor([1.0, 2.0, 1.0]), x.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack((torch.outer(smooth, difference), torch.outer(difference, smooth)))[:, None]
    b, c, h, w = x.shape
    gradients = F.conv2d(F.pad(x.reshape(b * c, 1, h, w), (1, 1, 1, 1), mode="reflect"), kernels)
    return (gradients.square().sum(1) + FLAT).sqrt().view(b, c, h, w)


def ea_dists(dists: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Edge-aware DISTS (D3SR), DISTS(x, y) + DISTS(S(x), S(y)) with S = `sobel`, as [B].

    Images are [B, 3, H, W] in [-1, 1]. S acts on each channel in [0, 1]. Both terms share one call of `dists`.
    """
    x, y = (torch.cat((z, 2 * sobel((z + 1) / 2) - 1)) for z in (x, y))
    return sum(dists(x, y).chunk(2))


def gan_generator(fake: Tensor) -> Tensor:
    """Non-saturating generator loss (D3SR), mean -log sigma(l) = mean softplus(-l) of the logits of fakes."""
    return F.softplus(-fake).mean()


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss (D3SR), mean -log sigma(l_real) + mean -log(1 - sigma(l_fake)); 2 ln 2 for logits of zero."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, [B, ...] -> [B]."""
    return x.detach().float().flatten(1).square().mean(1).sqrt()


def checkerboard_energy(x: Tensor, period_px: int) -> Tensor:
    """Share of the high-pass energy of images [B, 3, H, W] that repeats every `period_px` pixels, mean over B.

    One-step diffusion transformers tend to make their patch grid visible in the image. Averaging the high-pass luma
    over all grid cells keeps exactly the harmonics of 1 / period (Parseval), so no FFT is needed. A value of 1 means
    that all of this energy is periodic; an image without a grid gives about 1 / (number of cells).
    """
    folded, whole = _grid(x, period_px)
    return (folded / whole.clamp(min=1e-12)).mean().detach()


def grid(x: Tensor, period_px: int) -> Tensor:
    """L_grid: `checkerboard_energy` of each image, [B], with a gradient that lowers the periodic part alone.

    Deviation: not in TEASR. LPIPS tolerates a pattern with the period of the codec's patches, which one layer writes.
    """
    folded, whole = _grid(x, period_px)
    return folded / (whole.detach() + FAINT)


def _grid(x: Tensor, period_px: int) -> tuple[Tensor, Tensor]:
    """Periodic and whole energy of the high-pass luma of images [B, 3, H, W], [B] each."""
    luma = x.float().mean(1, keepdim=True)
    high = luma - F.avg_pool2d(luma, 3, 1, 1, count_include_pad=False)
    rows, cols = (n // period_px * period_px for n in high.shape[-2:])
    high = high[..., :rows, :cols]
    cells = high.reshape(-1, rows // period_px, period_px, cols // period_px, period_px)
    return cells.mean(dim=(1, 3)).square().mean(dim=(1, 2)), cells.square().mean(dim=(1, 2, 3, 4))
