"""Reference update that TEASR's update is compared with: all losses in one graph.

`joint_loss` is the total loss of TEASR as one expression, written from the equations without the method's helpers; the
tests check that the memory-saving update has the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from teasr.backbones.model import Condition, Model
from teasr.data.batch import Batch
from teasr.diffusion import flow
from teasr.methods.base import Loss, Progress
from teasr.methods.teasr import Teasr, TeasrConfig
from teasr.methods.teasr_times import Times
from teasr.util.randomness import Draws


def joint_loss(config: TeasrConfig, student: Model, b: Batch, d: Draws, lpips=None) -> Tensor:
    """Total loss of TEASR; every graph stays in memory until the backward pass."""
    times = Times.draw(config, d, student)
    z0, z_lq = student.encode(b.x_hq), student.encode(b.x_lq)
    eps, one = d.normal("one-step noise", z_lq), torch.ones(len(z_lq), device=z_lq.device)
    v = student.velocity(eps, one, Condition(z_lq, 0 * one))
    z_hat = eps - v
    x_hat = student.decode(z_hat)
    total = config.lambda_mse * (x_hat - b.x_hq).square().mean()
    if lpips is not None:
        total = total + config.lambda_lpips * lpips(x_hat, b.x_hq).mean()
    z_fake, s = z_hat.detach(), times.score
    z_s = flow.interpolate(z_fake, d.normal("score noise", z0), s)
    with torch.no_grad():
        difference = student.velocity(z_s, s, Condition(z_lq, -s)) - student.velocity(z_s, s, Condition(z_lq, s))
        difference = difference.clamp(-config.score_clamp, config.score_clamp)
    w = ((1 - s) ** 2 / s) if config.time_aware else torch.ones_like(s)
    w = w.clamp(max=config.w_cap) if config.w_cap else w
    target = (v - w.view(-1, 1, 1, 1) * difference).detach()
    total = total + config.lambda_rectify * 0.5 * (v - target).square().mean()
    noise, t, m, s = d.normal("flow noise", z0), times.t, times.m, times.s
    z_t = flow.interpolate(z0, noise, t)
    with torch.no_grad():
        u1 = student.velocity(z_t, t, Condition(z_lq, m))
        u2 = student.velocity(z_t - (t - m).view(-1, 1, 1, 1) * u1, m, Condition(z_lq, s))
        target = flow.shortcut_target(u1, u2, t, m, s)
    total = total + config.lambda_cons * (student.velocity(z_t, t, Condition(z_lq, s)) - target).square().mean()
    r = times.flow
    v = student.velocity(flow.interpolate(z0, noise, r), r, Condition(z_lq, r))
    total = total + config.lambda_flow * (v - (noise - z0)).square().mean()
    e, t = d.normal("fake noise", z0), times.fake
    v = student.velocity(flow.interpolate(z_fake, e, t), t, Condition(z_lq, -t))
    return total + config.lambda_adv * (v - (e - z_fake)).square().mean()


class Joint(Teasr):
    """TEASR with its total loss in one graph."""

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        yield Loss("joint", "student", joint_loss(self.config, models["student"], batch, draws, self.lpips))
