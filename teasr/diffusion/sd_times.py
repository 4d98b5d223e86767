"""Indices of Stable Diffusion's noise schedule as times of the flow, for settings that a paper states as indices.

At index i the state is a z0 + s eps with a = sqrt(alpha_bar_i), s = sqrt(1 - alpha_bar_i); divided by a + s it lies on
the straight path at t = s / (a + s). Values between two indices are interpolated.
"""

from __future__ import annotations

import torch
from torch import Tensor

INDICES = 1000
FIRST_BETA, LAST_BETA = 0.00085, 0.012  # schedule `scaled_linear` of Stable Diffusion 1 and 2


def scale_of(t: Tensor) -> Tensor:
    """Return a + s of the state at times t, by which a state of the flow is multiplied; from a^2 + s^2 = 1."""
    return ((1 - t).square() + t.square()).rsqrt()


def _times(device: torch.device) -> Tensor:
    """Times of all indices, float64 [1000], increasing from 0.03 to 0.94."""
    roots = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, INDICES, dtype=torch.float64, device=device)
    alpha_bar = (1 - roots.square()).cumprod(0)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return s / (a + s)


def time_of(index: Tensor) -> Tensor:
    """Map indices [B] to times [B]; indices outside of 0 .. 999 count as the nearest of these."""
    times, i = _times(index.device), index.double().clamp(0, INDICES - 1)
    low = i.floor().long().clamp(max=INDICES - 2)
    return torch.lerp(times[low], times[low + 1], i - low).to(index.dtype)


def index_of(t: Tensor) -> Tensor:
    """Map times [B] to indices [B], the inverse of `time_of`; times outside of the schedule give 0 or 999."""
    times = _times(t.device)
    x = t.double().clamp(times[0], times[-1])
    low = (torch.searchsorted(times, x) - 1).clamp(0, INDICES - 2)
    return (low + (x - times[low]) / (times[low + 1] - times[low])).to(t.dtype)
