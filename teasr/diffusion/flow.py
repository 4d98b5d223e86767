"""Flow-matching algebra of TEASR: paths, velocities, shortcuts and the TAR weight, one function per paper equation.

Convention (TwinFlow, TEASR): t = 1 is noise, t = 0 is data, z_t = (1 - t) z0 + t eps, and the velocity is v = eps - z0.
Times are float32 [B]; latents are [B, C, h, w]. All functions are pure and keep the dtype of their inputs (fp32 in
training).
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Reshape a per-sample quantity [B] so that it broadcasts over `like` [B, ...]."""
    return t.reshape(-1, *([1] * (like.dim() - 1)))


def interpolate(z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Point on the straight path, z_t = (1 - t) z0 + t eps, at t [B] in [0, 1]."""
    t = per_sample(t, z0)
    return (1 - t) * z0 + t * eps


def velocity_target(z0: Tensor, eps: Tensor) -> Tensor:
    """Velocity of the straight path, v = eps - z0: the target of L_flow (TEASR sec. 3.1) and of L_adv (eq. 8)."""
    return eps - z0


def z0_from_velocity(z_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Clean latent implied by a velocity, z0 = z_t - t v.

    With z_t = eps and t = 1 it is the one-step estimate (TEASR eq. 6).
    """
    return z_t - per_sample(t, z_t) * v


def eps_from_velocity(z_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Noise implied by a velocity, eps = z_t + (1 - t) v."""
    return z_t + (1 - per_sample(t, z_t)) * v


def step(z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Move from time t to time s along an average velocity, z_s = z_t - (t - s) v (TEASR eq. 1, Algorithm 1 line 4)."""
    return z_t - per_sample(t - s, z_t) * v


def shortcut_target(u1: Tensor, u2: Tensor, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Average velocity over t -> s, composed of t -> m (u1) and m -> s (u2) (TEASR eqs. 2-3).

    Computes ((t - m) u1 + (m - s) u2) / (t - s) for any midpoint s <= m <= t; m = (t + s) / 2 gives the plain mean of
    the paper. Where t == s (after rounding to a time grid), u1 and u2 coincide and their mean is returned.
    """
    span = t - s
    share = torch.where(span > 0, (t - m) / span.clamp(min=torch.finfo(span.dtype).tiny), torch.full_like(span, 0.5))
    share = per_sample(share, u1)
    return share * u1 + (1 - share) * u2


def score_difference(v_fake: Tensor, v_real: Tensor, clamp: float | None) -> Tensor:
    """D = v_fake - v_real (TEASR eq. 10), clamped elementwise to +-clamp before any weighting (as TwinFlow does)."""
    difference = v_fake - v_real
    return difference if clamp is None else difference.clamp(-clamp, clamp)


def tar_weight(s: Tensor, cap: float | None = None) -> Tensor:
    """Time-aware rectification weight w(s) = (1 - s)^2 / s (TEASR eq. 14), optionally capped; s [B] in (0, 1].

    It is the exact gradient weight of KL(p_fake || p_real) at noise level s with respect to the velocity.
    """
    w = (1 - s) ** 2 / s
    return w if cap is None else w.clamp(max=cap)


def sampling_times(steps: int) -> list[tuple[float, float]]:
    """Pairs (t_cur, t_tar) of Algorithm 1, linear from 1 to 0 in `steps` intervals; the last pair is (1/N, 0)."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: the sampler needs at least 1 step; use steps >= 1")
    return [(1 - i / steps, 1 - (i + 1) / steps) for i in range(steps)]
