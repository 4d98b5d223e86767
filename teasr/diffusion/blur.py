"""Gaussian blur with a strength of its own for each picture, and the blurred MSE of TADSR.

A blur is given by sigma [B] and radius [B], both in pixels; weights beyond the radius are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 12  # px: the largest radius


def smooth(t: Tensor) -> tuple[Tensor, Tensor]:
    """sigma = 1 + 5 t and a radius of at least 2 sigma, for times t [B] in [0, 1].

    Deviation: the published sizes jump at some indices (`published`), which cuts off the Gaussian in between.
    """
    sigma = 1 + 5 * t
    return sigma, (2 * sigma).ceil()


def published(index: Tensor) -> tuple[Tensor, Tensor]:
    """sigma = 1 + index / 200 and kernels of 5 + 4 floor(index / 200) px, for indices [B] in 0 .. 999 (TADSR)."""
    return 1 + index / 200, 2 + 2 * (index / 200).floor()


def weights(sigma: Tensor, radius: Tensor) -> Tensor:
    """Return the weights of each blur along one axis, [B, 2 REACH + 1]; they sum to 1."""
    x = torch.arange(-REACH, REACH + 1, device=sigma.device, dtype=sigma.dtype)
    w = torch.exp(-x.square() / (2 * sigma[:, None].square()))
    w = torch.where(x.abs() <= radius[:, None], w, torch.zeros_like(w))
    return w / w.sum(1, keepdim=True)


def blurred(x: Tensor, sigma: Tensor, radius: Tensor) -> Tensor:
    """Blur pictures [B, C, H, W], each with its own sigma and radius; the border is mirrored, H and W exceed REACH."""
    batch, channels, height, width = x.shape
    w = weights(sigma, radius).to(x).repeat_interleave(channels, 0)[:, None]  # [B C, 1, 2 REACH + 1]
    y = F.pad(x, (REACH,) * 4, mode="reflect").reshape(1, batch * channels, height + 2 * REACH, width + 2 * REACH)
    y = F.conv2d(y, w[..., None], groups=batch * channels)
    return F.conv2d(y, w[:, :, None], groups=batch * channels).reshape(x.shape)


def mse(prediction: Tensor, target: Tensor, sigma: Tensor, radius: Tensor) -> Tensor:
    """Mean squared error of the blurred pictures, in at least fp32. Blurring is linear, so that one blur suffices."""
    error = prediction - target if prediction.dtype == torch.float64 else prediction.float() - target.float()
    return blurred(error, sigma, radius).square().mean()
