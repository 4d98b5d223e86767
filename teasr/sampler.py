"""Any-step sampling: one pure loop over (t_cur, t_tar) pairs (TEASR Algorithm 1), for previews, evaluation and use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from teasr import flow
from teasr.backbones.base import Backbone


@torch.no_grad()
def sample(
    backbone: Backbone,
    z_lq: Tensor,
    eps: Tensor,
    steps: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Restored latents [B, C, h, w] from noise `eps` and condition `z_lq` in `steps` jumps (TEASR Algorithm 1).

    Each jump asks for the average velocity t_cur -> t_tar; the last one ends at 0. Raises ValueError for steps < 1.
    """
    z = eps
    for i, (t_cur, t_tar) in enumerate(flow.sampling_times(steps)):
        t = backbone.snap(torch.full((len(z),), t_cur, device=z.device))
        r = backbone.snap(torch.full((len(z),), t_tar, device=z.device))
        z = flow.step(z, backbone.velocity(z, t, z_lq, r), t, r)
        if on_step:
            on_step(i + 1, steps)
    return z


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
