"""TADSR: one step whose time is a dial between fidelity and realism.

The student is told a time t_s that is drawn for each sample, through a time-aware encoder and in the network itself.
The two scores (methods/scores.py) are compared at a time t_v that is computed from t_s: a larger t_s means guidance by
a noisier, more semantic score. While restoring, t_s is the dial `strength`. An update has two graphs, one after
another: `generator`, and the denoising loss of the fake score, `fake`, which knows neither the LQ image nor t_s.

Source: arXiv:2508.16557, built from its formulas. docs/method.md has the equations beside the code, and
docs/comparison.md says where this differs from the paper and its public code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from teasr.backbones.model import Condition, Model
from teasr.backbones.roles import Role
from teasr.data.batch import Batch
from teasr.diffusion import blur, flow, losses, sd_times
from teasr.methods import scores
from teasr.methods.base import Loss, Progress, latents, require_loss
from teasr.methods.pixel_losses import WithMetrics, of_rows, pixel_gradient
from teasr.methods.sampler import Dial, Restorer, Sampler, SingleStep
from teasr.util.randomness import Draws

Factor = Annotated[float, "[0, inf)"]
WEIGHTED = ("vsd", "mse", "lpips")


@dataclass(frozen=True)
class TadsrConfig:
    """Settings of TADSR; the defaults are the paper's in the time of the flow, for a backbone without text."""

    # single: from the adapted LQ latent alone, as published; dual: TEASR's branches, LQ in the condition branch too
    student: scores.Branches = "single"
    encoder: bool = True  # false: the network alone knows t_s, the paper's ablation "w/o TAE"
    # residual: z_hat = z_in - v. published: z_hat = z_in / (1 - t_s) - eps, where the noise schedule ends before t = 1,
    # as that of Stable Diffusion does. flow: z_hat = z_in - t_s v, which needs a larger t_min such as 0.2
    step: Literal["residual", "published", "flow"] = "residual"
    # t_s is uniform between this and 1, as shares of the network's noise schedule; of flows: the times themselves
    t_min: Annotated[float, "[0, 1)"] = 0.02
    layout: scores.Layout = "one_base"  # LoRA sets on one base, or copies of it
    # t_v = time_offset + time_factor t_s. flow: both are times of the flow. index: indices of Stable Diffusion / 1000,
    # in which the paper has 0.5 and 0; 0.66 in the time of the flow is nearly the same pairing
    clock: Literal["flow", "index"] = "flow"
    time_factor: Annotated[float, "[0, 1]"] = 0.66
    time_offset: Annotated[float, "[0, 1)"] = 0.0
    coupled: bool = True  # false: t_v has the same distribution but is drawn independently of t_s (ablation)
    s_range: tuple[float, float] = (0.02, 0.98)  # t_v is clamped to it
    lambda_vsd: Factor = 1.0
    lambda_mse: Factor = 1.0
    lambda_lpips: Factor = 2.0  # as in the public code; paper: 1
    lpips_net: Literal["vgg", "alex"] = "vgg"
    lpips_weights: Literal["pretrained", "random"] = "pretrained"  # random: same computation, for benchmarks
    # of the MSE, stronger for larger t_s. smooth: its size grows continuously; steps: the published sizes
    blur: Literal["smooth", "steps", "none"] = "smooth"
    weight: scores.Weight = "osediff"
    # guidance of the real score, cfg_real + cfg_slope t_v in the clock above; public code: 7.5 and 5, with captions
    cfg_real: Factor = 1.0
    cfg_slope: Factor = 0.0
    fake_rate: Annotated[float, "(0, inf)"] = 1.0  # factor on train.learning_rate
    fake_rank: Annotated[int, "[1, 65536]", "or null for the rank of the backbone"] | None = None
    fake_loss: scores.FakeLoss = "velocity"

    def __post_init__(self):
        require_loss(self, WEIGHTED)
        scores.check_range("s_range", self.s_range)

    @property
    def guided(self) -> bool:
        """Whether the real score has guidance."""
        return self.cfg_real != 1 or self.cfg_slope != 0


def one_step(student: Restorer, config: TadsrConfig, z_lq: Tensor, t_s: Tensor) -> Tensor:
    """Return the student's estimate z_hat = z_in - kappa v(z_in, t_s) with z_in = encoder(z_lq, t_s).

    kappa is 1 (`step: residual`) or t_s. With kappa = 1 a small t_s can restore as much as a large one. `published`
    has the noise eps = z_in + (1 - t_s) v in the place of v, and z_in / (1 - t_s) in that of z_in. With `dual`, z_lq
    reaches the network undistorted in the condition branch, at t_tar = 0.
    """
    z_in = student.start_from(student.adapt(z_lq, t_s) if config.encoder else z_lq, t_s)
    if config.student == "dual":
        v = student.velocity(z_in, t_s, Condition(z_lq, torch.zeros_like(t_s)))
    else:
        v = student.velocity(z_in, t_s)
    if config.step == "published":
        return z_in / (1 - flow.per_sample(t_s, z_in)) - flow.eps_from_velocity(z_in, v, t_s)
    return flow.z0_from_velocity(z_in, v, torch.ones_like(t_s) if config.step == "residual" else t_s)


class TimedStep(SingleStep):
    """The student's one step, at the time that the dial `strength` sets."""

    # the default is index 500, at which the paper tests
    dials = (Dial("strength", 0.62, "from faithful (0) to realistic (1) within one step", previewed=(0.1, 0.9)),)
    why = "TADSR restores in 1 step, of which the time is the dial strength"

    def __init__(self, config: TadsrConfig):
        self.config = config

    def times(self, steps: int) -> list[tuple[float, float]]:
        return [(self.dials[0].default, 0.0)]

    def jump(self, model: Restorer, z_lq: Tensor, eps: Tensor, dials: Mapping[str, float]) -> Tensor:
        """Uses no noise. A strength below the smallest time of the training, method.t_min, counts as that time."""
        ones = torch.ones(len(z_lq), device=z_lq.device)
        t_s = torch.maximum(dials["strength"] * ones, model.time_at(self.config.t_min * ones))
        return one_step(model, self.config, z_lq, model.snap(t_s))


class Tadsr(WithMetrics):
    """A one-step student that knows its time, a frozen real score and a trained fake score at a coupled time."""

    def roles(self) -> tuple[Role, ...]:
        c = self.config
        student = Role("student", branches=c.student, encoder=c.encoder)
        return (student, *scores.score_roles(c.layout, True, c.fake_rate, c.fake_rank)) if c.lambda_vsd else (student,)

    def sampler(self) -> Sampler:
        return TimedStep(self.config)

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        return {name: getattr(self.config, f"lambda_{name}") for name in WEIGHTED} | {"fake": 1.0}

    def check_models(self, models: Mapping[str, Model]) -> None:
        """Raise ValueError for a backbone that is no unconditional score, or has no text for guidance."""
        if self.config.step == "published" and models["student"].snap(torch.ones(1)).item() == 1:
            raise ValueError(
                "method.step = published divides by 1 - t_s, and the times of this backbone reach 1: set "
                "method.step=residual"
            )
        if "real" not in models:
            return
        models["real"].require_prior()
        if self.config.guided and models["real"].null_text is None:
            raise ValueError(
                f"method.cfg_real = {self.config.cfg_real:g} and method.cfg_slope = {self.config.cfg_slope:g} compare "
                "two prompts, but this backbone has no null prompt: set backbone.null_prompt to a file of `teasr "
                "cache-prompt` if it takes text; otherwise set method.cfg_real=1 and method.cfg_slope=0"
            )

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        """Yield the loss of the student and, if there are scores, that of the fake score.

        The gradient is applied to z_hat, not to v: z_in has a graph too, the encoder's.
        """
        c, student = self.config, models["student"]
        _, z_lq = latents(student, batch, hq=False)
        t_s = student.snap(student.time_at(draws.uniform("student time", c.t_min, 1.0)))
        z_hat = one_step(student, c, z_lq, t_s)
        z_fake = z_hat.detach()
        gradient, logs = self._data_gradient(student, batch, z_fake, t_s)
        if c.lambda_vsd:
            score = self._score_gradient(models, z_fake, t_s, draws, logs)
            gradient = gradient + c.lambda_vsd * score / z_fake.numel()
        yield Loss("generator", "student", (z_hat * gradient).sum(), logs)
        del z_hat
        if c.lambda_vsd:
            loss = scores.fake_score_loss(models["fake"], z_fake, draws, c.fake_loss)
            yield Loss("fake", "fake", loss, {"fake": loss.detach()})

    def _data_gradient(
        self, student: Model, batch: Batch, z_hat: Tensor, t_s: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of the weighted pixel losses with respect to z_hat, and values to log."""
        c = self.config
        logs = {"z_hat_mean": z_hat.mean(), "z_hat_std": z_hat.flatten(1).std(1).mean()}
        weight = {"mse": c.lambda_mse, "lpips": c.lambda_lpips}
        if not any(weight.values()):
            return torch.zeros_like(z_hat), logs
        mse = losses.mse
        if c.blur != "none":
            size = blur.smooth(t_s) if c.blur == "smooth" else blur.published(sd_times.index_of(t_s))
            mse = partial(blur.mse, sigma=size[0], radius=size[1])
        lpips = of_rows(self.lpips, slice(None), batch.perceptual)
        _, gradient, more = pixel_gradient(student, z_hat, batch.x_hq, weight, lpips, mse=mse)
        return gradient, logs | more

    @torch.no_grad()
    def _score_gradient(
        self, models: Mapping[str, Model], z_hat: Tensor, t_s: Tensor, draws: Draws, logs: dict[str, Tensor]
    ) -> Tensor:
        """Return numel times the gradient of the score loss (TAVSD) with respect to z_hat; add values to log."""
        c, real, noise = self.config, models["real"], draws.normal("score noise", z_hat)
        t_v, tau = self._teacher_time(t_s if c.coupled else real.time_at(draws.uniform("score time", c.t_min, 1.0)))
        t_v = real.snap(t_v)
        z_v = flow.interpolate(z_hat, noise, t_v)
        at = scores.guided(real, z_v, t_v, c.cfg_real + c.cfg_slope * tau if c.guided else 1.0)
        v_fake = models["fake"].velocity(z_v, t_v)
        w = scores.time_weight(c.weight, t_v, z_hat, flow.z0_from_velocity(z_v, at.v, t_v))
        gradient = scores.distribution_gradient(w, at.v, v_fake)
        logs |= {"score_difference": losses.rms(at.v - v_fake).mean(), "vsd": scores.surrogate(gradient)}
        return gradient

    def _teacher_time(self, t_s: Tensor) -> tuple[Tensor, Tensor]:
        """Return t_v [B] as a time of the flow, inside s_range, and t_v in the clock of the config."""
        c, by_index = self.config, self.config.clock == "index"
        tau = c.time_offset + c.time_factor * (sd_times.index_of(t_s) / sd_times.INDICES if by_index else t_s)
        t_v = sd_times.time_of(sd_times.INDICES * tau) if by_index else tau
        return t_v.clamp(*c.s_range), tau
