"""Any-step sampling: one pure loop over (t_cur, t_tar) pairs (TEASR Algorithm 1), for previews, evaluation and use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.diffusion import flow


@torch.no_grad()
def sample(
    backbone: Backbone,
    z_lq: Tensor,
    eps: Tensor,
    steps: int,
    fidelity: float = 0.0,
    on_step: Callable[[int, int, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Restored latents [B, C, h, w] from noise `eps` and condition `z_lq` in `steps` jumps (TEASR Algorithm 1).

    Each jump asks for the average velocity t_cur -> t_tar; the last one ends at 0. fidelity in [0, 1] moves the result on the straight line to
    the one-step estimate of the first jump, eq. 6: from pure noise it is about the mean of all pictures that fit, of which the last jump ends at
    one, and on this line lie the best trades between distortion and perception (Freirich et al. 2021). It costs no evaluation.
    on_step(i, steps, z) may return other latents to go on with. Raises ValueError for steps < 1, or fidelity outside of [0, 1] or in one step.
    """
    times = flow.sampling_times(steps)
    check_fidelity(fidelity, steps)
    z, first = eps, None
    for i, (t_cur, t_tar) in enumerate(times):
        t = backbone.snap(torch.full((len(z),), t_cur, device=z.device))
        r = backbone.snap(torch.full((len(z),), t_tar, device=z.device))
        v = backbone.velocity(z, t, z_lq, r)
        if i == 0 and fidelity > 0:
            first = flow.z0_from_velocity(z, v, t)
        z = flow.step(z, v, t, r)
        if on_step:
            z = z if (other := on_step(i + 1, steps, z)) is None else other
    return z if first is None else torch.lerp(z, first, fidelity)


def check_fidelity(fidelity: float, steps: int) -> None:
    """ValueError where `sample` cannot do it."""
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity {fidelity}: must be between 0 (detail) and 1 (faithful)")
    if fidelity > 0 and steps == 1:
        raise ValueError("fidelity takes back detail of several steps, and one step has no such: use 2 steps or more")


@torch.no_grad()
def restore(backbone: Backbone, x_lq: Tensor, steps: int, seed: int) -> Tensor:
    """Restored pictures from low-quality ones of the same size, both [B, 3, H, W] in [-1, 1]; any size, padded inside.

    The noise is a function of the seed and the size alone. Raises ValueError for steps < 1.
    """
    height, width = x_lq.shape[-2:]
    m = backbone.pixel_multiple
    z_lq = backbone.encode(F.pad(x_lq, (0, -width % m, 0, -height % m), mode="replicate"))
    eps = torch.randn(z_lq.shape, generator=torch.Generator().manual_seed(seed)).to(z_lq.device)
    return backbone.decode(sample(backbone, z_lq, eps, steps))[..., :height, :width]
