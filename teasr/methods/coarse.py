"""Coarse restoration: the mean of what the LQ image may show, and how far the original is from it.

It is the first stage of the small backbone (backbones/unet): a regression without noise, whose result stays frozen
under TEASR. Loss: mean squared error of the pixels, and the negative log-likelihood of the original under a Gaussian
around the (detached) restoration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from teasr.backbones.model import Model
from teasr.backbones.roles import STUDENT, Role
from teasr.data.batch import Batch
from teasr.diffusion import losses
from teasr.methods.base import Loss, Method, Progress, latents
from teasr.methods.sampler import AnyStep, Sampler
from teasr.util.randomness import Draws


@dataclass(frozen=True)
class CoarseConfig:
    """Loss weights."""

    lambda_mse: float = 50.0  # of pixels in [-1, 1]
    lambda_nll: float = 1.0

    def __post_init__(self):
        for name in ("lambda_mse", "lambda_nll"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"method.{name} = {getattr(self, name)}: must be > 0, because both outputs are trained"
                )


class OneStep(AnyStep):
    """One step from noise, which the untrained branches of the network leave at the coarse restoration."""

    step_counts = (1,)


class Coarse(Method):
    """The coarse restoration and its uncertainty, trained by regression."""

    def roles(self) -> tuple[Role, ...]:
        return (STUDENT,)

    def sampler(self) -> Sampler:
        return OneStep()

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        return {"mse": self.config.lambda_mse, "nll": self.config.lambda_nll}

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: squared error of the pixels plus 1/2 ((z_hq - z) / sd)^2 + log sd, mean over the latents."""
        student = models["student"]
        z_hq, z_lq = latents(student, batch)
        z, log_sd = student.coarse(z_lq)
        mse = losses.mse(student.decode(z), batch.x_hq)
        error = (z_hq - z.detach()) * torch.exp(-log_sd)
        nll = (0.5 * error.square() + log_sd).mean()
        logs = {"mse": mse.detach(), "nll": nll.detach(), "log_sd": log_sd.detach().mean()}
        yield Loss("coarse", "student", self.config.lambda_mse * mse + self.config.lambda_nll * nll, logs)
