"""A test method shaped like TADSR, which uses framework features that neither TEASR nor tests/two_roles.py needs.

The student has a single branch and starts at the low-quality latent. A time-aware encoder adapts this latent to a time
drawn for each sample. A fake score learns the distribution of the student's results; the frozen base is the real score.
The method restores in one step, with the time itself as its dial. The losses are simplified: the point is that such a
method fits in one file, not that it reproduces the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from teasr import run_config
from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.data.batch import Batch
from teasr.diffusion import flow, losses
from teasr.methods.base import Loss, Method, Progress
from teasr.methods.sampler import Dial, OnStep, Restorer, Sampler
from teasr.util.randomness import Draws


@dataclass(frozen=True)
class TimedConfig:
    """The weight of the score loss."""

    lambda_score: float = 0.1


class OneStep(Sampler):
    """z_in - v(z_in, t_s), where z_in is the low-quality latent adapted by the encoder to the dial's time t_s."""

    step_counts = (1,)
    dials = (Dial("strength", 0.6, "from faithful (0) to realistic (1)"),)

    def times(self, steps: int) -> list[tuple[float, float]]:
        return [(self.dials[0].default, 0.0)]

    @torch.no_grad()
    def sample(
        self,
        model: Restorer,
        z_lq: Tensor,
        eps: Tensor,
        steps: int,
        dials: Mapping[str, float] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        t = model.snap(torch.full((len(z_lq),), self.check(steps, dials)["strength"], device=z_lq.device))
        z_in = model.adapt(z_lq, t)
        z = z_in - model.velocity(z_in, t)
        other = on_step(1, 1, z) if on_step else None
        return z if other is None else other


class Timed(Method):
    """Pixel loss and score difference at a coupled time for the student, flow matching for the fake score."""

    def roles(self) -> tuple[Role, ...]:
        student = Role("student", branches="single", encoder=True)
        return student, Role("fake", branches="single", rate=0.5), Role("real", branches="single", trains="nothing")

    def sampler(self) -> Sampler:
        return OneStep()

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        return {"mse": 1.0, "fake": 1.0}

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        student, fake, real = (models[name] for name in ("student", "fake", "real"))
        t_s = draws.uniform("student time", 0.05, 0.95)
        with torch.no_grad():
            z_lq = student.encode(batch.x_lq)
        z_in = student.adapt(z_lq, t_s)  # not under no_grad, since the encoder is trained
        z_hat = z_in - student.velocity(z_in, t_s)
        t, noise = 0.66 * t_s, draws.normal("noise", z_hat)
        with torch.no_grad():
            z_t = flow.interpolate(z_hat, noise, t)
            score = flow.per_sample(t, z_hat) * (real.velocity(z_t, t) - fake.velocity(z_t, t)) / z_hat.numel()
        mse, gradient = losses.gradient_through(lambda z: losses.mse(student.decode(z), batch.x_hq), z_hat)
        yield Loss("student", "student", (z_hat * (gradient + self.config.lambda_score * score)).sum(), {"mse": mse})
        z_fake, eps = z_hat.detach(), draws.normal("fake noise", z_hat)
        del z_in, z_hat
        r = draws.uniform("fake time")
        loss = losses.mse(fake.velocity(flow.interpolate(z_fake, eps, r), r), flow.velocity_target(z_fake, eps))
        yield Loss("fake", "fake", loss, {"fake": loss.detach()})


run_config.METHODS["timed"] = lambda: (TimedConfig, Timed)
