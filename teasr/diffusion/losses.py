"""Losses on tensors (MSE, squared rectification), a checkerboard detector, and gradients of inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from teasr.diffusion.flow import per_sample

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


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, [B, ...] -> [B]."""
    return x.detach().float().flatten(1).square().mean(1).sqrt()


def checkerboard_energy(x: Tensor, period_px: int) -> Tensor:
    """Share of the high-pass energy of images [B, 3, H, W] that repeats every `period_px` pixels, mean over B.

    One-step diffusion transformers tend to make their patch grid visible in the image. Averaging the high-pass luma
    over all grid cells keeps exactly the harmonics of 1 / period (Parseval), so no FFT is needed. A value of 1 means
    that all of this energy is periodic; an image without a grid gives about 1 / (number of cells).
    """
    luma = x.float().mean(1, keepdim=True)
    high = luma - F.avg_pool2d(luma, 3, 1, 1, count_include_pad=False)
    rows, cols = (n // period_px * period_px for n in high.shape[-2:])
    high = high[..., :rows, :cols]
    cells = high.reshape(-1, rows // period_px, period_px, cols // period_px, period_px)
    folded = cells.mean(dim=(1, 3)).square().mean(dim=(1, 2))
    return (folded / cells.square().mean(dim=(1, 2, 3, 4)).clamp(min=1e-12)).mean().detach()
