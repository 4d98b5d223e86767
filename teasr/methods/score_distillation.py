"""Score distillation into one step: OSEDiff (VSD), TSD-SR and CSD, as settings of one method.

A one-step student is trained by pixel losses and by the difference of two scores at its re-noised result: the frozen
real score, and a fake score that learns the distribution of the student's results (methods/scores.py). An update has
two graphs, one after another: `generator`, and the denoising loss of the fake score, `fake`. Both see the weights from
before the update, which is what "student first, then fake score" computes as well.

    OSEDiff   weight osediff, lambda_vsd 1, lambda_mse 1, lambda_lpips 2
    TSD-SR    weight s2, lambda_vsd .7, lambda_tsm .3, time_shift 3, s_range [.05, .95], mse_space latent,
              dasm_weights [1, .3, .3, .3], fake_rate .2
    CSD       fake null_prompt: the teacher's own output for the null prompt takes the place of the fake score

Sources: OSEDiff (arXiv:2406.08177), TSD-SR (arXiv:2411.18263), PiSA-SR (arXiv:2412.03017) for CSD. docs/comparison.md
says where this differs from the public code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from teasr.backbones.model import Condition, Model
from teasr.backbones.roles import Role
from teasr.data.batch import Batch
from teasr.diffusion import flow, losses
from teasr.methods import scores
from teasr.methods.base import Loss, Progress, latents, require_loss
from teasr.methods.pixel_losses import WithMetrics, of_rows, pixel_gradient
from teasr.methods.sampler import Sampler
from teasr.methods.scores import OneStep
from teasr.util.randomness import Draws

Factor = Annotated[float, "[0, inf)"]
WEIGHTED = ("vsd", "tsm", "mse", "lpips")


@dataclass(frozen=True)
class ScoreDistillationConfig:
    """Settings of score distillation; the defaults are OSEDiff's, for a backbone without text."""

    # dual: TEASR's student, from noise, LQ in the condition branch; single: from the LQ latent, as published
    student: scores.Branches = "dual"
    encoder: bool = False  # the student trains an adapter of the encoder too, as published; needs student single
    layout: scores.Layout = "one_base"  # LoRA sets on one base, or copies of it as in public code
    # trained: VSD. null_prompt: CSD, needs a null prompt. sample: the score of the result itself, a point (SDS)
    fake: Literal["trained", "null_prompt", "sample"] = "trained"
    # with data.captions: what the student is told; prompt: backbone.prompt, as while restoring (TSD-SR's choice)
    student_text: Literal["caption", "prompt"] = "caption"
    lambda_vsd: Factor = 1.0
    lambda_tsm: Factor = 0.0  # target score matching
    lambda_mse: Factor = 1.0
    mse_space: Literal["pixel", "latent"] = "pixel"
    lambda_lpips: Factor = 2.0
    lpips_net: Literal["vgg", "alex"] = "vgg"
    lpips_weights: Literal["pretrained", "random"] = "pretrained"  # random: same computation, for benchmarks
    weight: scores.Weight = "osediff"
    cfg_real: Factor = 1.0  # guidance of the real score; published: 7.5, which needs a null prompt
    cfg_fake: Factor = 1.0  # TSD-SR: 7.5; OSEDiff: none
    # times of the scores, before the shift, as shares of the network's noise schedule; of flows: the times themselves
    s_range: tuple[float, float] = (0.02, 0.98)
    time_shift: Annotated[float, "[1, inf)"] = 1.0
    # distribution-aware sampling: weights of sub-steps along the fake score's path towards less noise
    dasm_weights: tuple[Factor, ...] = (1.0,)
    dasm_stride: Annotated[float, "(0, 1)"] = 0.05
    dasm_jitter: Annotated[float, "[0, 1)"] = 0.025  # of the last sub-step's time, to both sides
    fake_rate: Annotated[float, "(0, inf)"] = 1.0  # factor on train.learning_rate
    fake_rank: Annotated[int, "[1, 65536]", "or null for the rank of the backbone"] | None = None
    fake_loss: scores.FakeLoss = "velocity"

    def __post_init__(self):
        require_loss(self, WEIGHTED)
        scores.check_range("s_range", self.s_range)
        if self.encoder and self.student == "dual":
            raise ValueError(
                "method.encoder = true adapts the latent from which a single-branch student starts: set "
                "method.student=single, or method.encoder=false"
            )
        if not self.dasm_weights:
            raise ValueError("method.dasm_weights is empty: give one weight for each sub-step, [1.0] for one")
        if self.layout == "three_copies" and self.fake != "trained":
            raise ValueError(
                f"method.layout = three_copies and method.fake = {self.fake}: without a trained fake score there are "
                "two networks; set method.layout=two_copies or one_base"
            )

    @property
    def uses_scores(self) -> bool:
        """Whether a loss needs the real score."""
        return bool(self.lambda_vsd or self.lambda_tsm)

    @property
    def trains_fake(self) -> bool:
        """Whether there is a fake score to train."""
        return self.uses_scores and self.fake == "trained"


class ScoreDistillation(WithMetrics):
    """A one-step student, a frozen real score and, for VSD, a trained fake score."""

    def roles(self) -> tuple[Role, ...]:
        c = self.config
        student = Role("student", branches=c.student, encoder=c.encoder, timed=False)
        if not c.uses_scores:
            return (student,)
        return student, *scores.score_roles(c.layout, c.trains_fake, c.fake_rate, c.fake_rank)

    def sampler(self) -> Sampler:
        return OneStep(self.config.student, encoder=self.config.encoder)

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        return {name: getattr(self.config, f"lambda_{name}") for name in WEIGHTED} | {"fake": 1.0}

    def check_models(self, models: Mapping[str, Model]) -> None:
        """Raise ValueError for a backbone that is no unconditional score, or has no text for guidance."""
        if "real" not in models:
            return
        models["real"].require_prior()
        for setting, asks in (
            (f"method.cfg_real = {self.config.cfg_real:g}", self.config.cfg_real != 1),
            (f"method.cfg_fake = {self.config.cfg_fake:g}", self.config.cfg_fake != 1 and self.config.trains_fake),
            (f"method.fake = {self.config.fake}", self.config.fake == "null_prompt"),
        ):
            if asks and models["real"].null_text is None:
                raise ValueError(
                    f"{setting} compares two prompts, but this backbone has no null prompt: set backbone.null_prompt "
                    "to a file of `teasr cache-prompt` if it takes text; otherwise set method.cfg_real=1, "
                    "method.cfg_fake=1 and a method.fake other than null_prompt"
                )

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        """Yield the loss of the student and, if there is a fake score, its own."""
        c, student = self.config, models["student"]
        if c.student_text == "prompt":
            student = student.with_text(None)
        needs_hq = c.lambda_tsm or (c.lambda_mse and c.mse_space == "latent")
        z_hq, z_lq = latents(student, batch, hq=bool(needs_hq))
        eps = draws.normal("one-step noise", z_lq) if c.student == "dual" else None
        z_hat = scores.one_step(student, c.student, z_lq, eps, encoder=c.encoder)
        z_fake = z_hat.detach()
        gradient, logs = self._data_gradient(student, batch, z_fake, z_hq)
        if c.uses_scores:
            gradient = gradient + self._score_gradient(models, z_fake, z_hq, draws, logs) / z_fake.numel()
        yield Loss("generator", "student", (z_hat * gradient).sum(), logs)
        del z_hat
        if c.trains_fake:
            loss = scores.fake_score_loss(models["fake"], z_fake, draws, c.fake_loss)
            yield Loss("fake", "fake", loss, {"fake": loss.detach()})

    def _data_gradient(
        self, student: Model, batch: Batch, z_hat: Tensor, z_hq: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of the weighted data losses with respect to z_hat, and values to log."""
        c, gradient = self.config, torch.zeros_like(z_hat)
        logs = {"z_hat_mean": z_hat.mean(), "z_hat_std": z_hat.flatten(1).std(1).mean()}
        latent = c.mse_space == "latent"
        if c.lambda_mse and latent:
            logs["mse"] = losses.mse(z_hat, z_hq)
            gradient += 2 * c.lambda_mse * (z_hat - z_hq) / z_hat.numel()
        weight = {"mse": 0.0 if latent else c.lambda_mse, "lpips": c.lambda_lpips}
        if any(weight.values()):
            lpips = of_rows(self.lpips, slice(None), batch.perceptual)
            _, pixels, more = pixel_gradient(student, z_hat, batch.x_hq, weight, lpips)
            gradient, logs = gradient + pixels, logs | more
        return gradient, logs

    @torch.no_grad()
    def _score_gradient(
        self, models: Mapping[str, Model], z_hat: Tensor, z_hq: Tensor | None, draws: Draws, logs: dict[str, Tensor]
    ) -> Tensor:
        """Return numel times the gradient of the weighted score losses with respect to z_hat; add values to log.

        Along the sub-steps, z_s follows the fake score and the noised HQ latent h_s the real one, by Euler steps.
        """
        c, real, noise = self.config, models["real"], draws.normal("score noise", z_hat)
        vsd = tsm = torch.zeros_like(z_hat)
        path = self._times(draws, real)
        s = path[0]
        z_s = flow.interpolate(z_hat, noise, s)
        h_s = flow.interpolate(z_hq, noise, s) if c.lambda_tsm else None
        for k, factor in enumerate(c.dasm_weights):
            at_z = scores.guided(real, z_s, s, c.cfg_real)
            v_fake = self._fake_velocity(models, at_z, z_s, z_hat, s)
            w = factor * scores.time_weight(c.weight, s, z_hat, flow.z0_from_velocity(z_s, at_z.v, s))
            vsd = vsd + scores.distribution_gradient(w, at_z.v, v_fake)
            if c.lambda_tsm:
                at_h = scores.guided(real, h_s, s, c.cfg_real)
                tsm = tsm + scores.target_gradient(w, s, (z_s, h_s), (at_z.v, at_h.v))
            if k == 0:
                logs |= self._observe(at_z, v_fake)
            if k + 1 < len(path):
                z_s = flow.step(z_s, v_fake, s, path[k + 1])
                h_s = flow.step(h_s, at_h.v, s, path[k + 1]) if c.lambda_tsm else None
                s = path[k + 1]
        logs |= {"vsd": scores.surrogate(vsd)} | ({"tsm": scores.surrogate(tsm)} if c.lambda_tsm else {})
        return c.lambda_vsd * vsd + c.lambda_tsm * tsm

    def _fake_velocity(
        self, models: Mapping[str, Model], real: scores.Guided, z_s: Tensor, z_hat: Tensor, s: Tensor
    ) -> Tensor:
        """Return the velocity of the fake score, or of what takes its place."""
        if self.config.fake == "trained":
            return scores.guided(models["fake"], z_s, s, self.config.cfg_fake).v
        if self.config.fake == "sample":  # the exact score of a point mass at z_hat
            return (z_s - z_hat) / flow.per_sample(s, z_s)
        if real.null is not None:
            return real.null
        return models["real"].velocity(z_s, s, Condition(text=models["real"].null_text))

    def _observe(self, real: scores.Guided, v_fake: Tensor) -> dict[str, Tensor]:
        """Values to watch: rms of the score difference, and of the part of it that guidance adds."""
        logs = {"score_difference": losses.rms(real.v - v_fake).mean()}
        if real.null is not None:
            logs["guidance_part"] = losses.rms(real.v - real.text).mean()
        return logs

    def _times(self, draws: Draws, real: Model) -> list[Tensor]:
        """Return the times [B] of the sub-steps, each on the backbone's grid, a stride apart before the shift.

        Deviation: TSD-SR's last indices may leave its table; here no time falls below s_range.
        """
        c, u = self.config, draws.uniform("score time", *self.config.s_range)
        path = [u - k * c.dasm_stride for k in range(len(c.dasm_weights))]
        if len(path) > 1:
            path[-1] = path[-1] + draws.uniform("last score time", -c.dasm_jitter, c.dasm_jitter)
        shares = [scores.shifted(x.clamp(min=c.s_range[0]), c.time_shift) for x in path]
        return [real.snap(real.time_at(u)) for u in shares]
