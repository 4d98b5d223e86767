"""D3SR: a one-step restorer trained against a diffusion discriminator in latent space, without a teacher.

The student maps the LQ latent to z_hat in one step. The discriminator is a diffusion network up to block k with one
logit l for each token. It sees the latents of originals and of results at a random noise level, which makes the two
laws overlap. Its best answer at noise level t is l = log p_real,t - log p_fake,t, so that the student's gradient is
that of KL(p_fake || p_real) times the probability that the discriminator says "fake": score distillation whose real
score comes from data.

    z_hat     = z_lq - t_start v(z_lq, t_start)                       single branch, as published; or from noise
    L_spatial = mse(x_hat, x_hq) + lambda_ea_dists EA-DISTS(x_hat, x_hq)
    L_G       = mean softplus(-l(z_t))                                z_t = (1 - t) z_hat + t n
    L_D       = mean softplus(-l(h_t)) + mean softplus(l(sg z_t))     h_t = (1 - t) z_hq + t n'

An update has two graphs, one after another: `generator` (L_spatial + lambda_adv L_G) and `discriminator` (L_D). The
discriminator trains from the first update on, and L_G sets in later (`adv_ramp`), because its head starts at zero.

Source: D3SR (arXiv:2410.04224 v3), of which no code is public. docs/comparison.md has the choices that it leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from teasr.backbones.model import Model
from teasr.backbones.roles import FIRST, Role
from teasr.data.batch import Batch
from teasr.diffusion import flow, losses
from teasr.methods import scores
from teasr.methods.base import Loss, Progress, Ramp, latents
from teasr.methods.pixel_losses import WithMetrics, of_rows, pixel_gradient
from teasr.methods.sampler import Sampler
from teasr.util.randomness import Draws

Factor = Annotated[float, "[0, inf)"]
PIXELS = ("mse", "lpips", "dists", "ea_dists")
BINS = 4  # equal parts of t_range, for which the discriminator's accuracy is logged


@dataclass(frozen=True)
class D3srConfig:
    """Settings of D3SR; docs/comparison.md gives the reasons for choices that the paper leaves open."""

    # single: from the LQ latent at t_start, as published; dual: TEASR's student, from noise, LQ in the condition branch
    student: scores.Branches = "single"
    t_start: Annotated[float, "(0, 1]"] = 0.43  # of student single; .43 is the noise level of index 273 of SD 2.1
    # own: a LoRA set on the student's base; copy: a copy of this base; prior: the base of the section `prior:`, a
    # diffusion model of the same latents, or pixel_cnn, which judges pictures (not in D3SR, for comparison)
    discriminator: Literal["own", "copy", "prior"] = "own"
    # the discriminator ends after this block; half of the depth, as the down and middle blocks of a U-Net
    disc_blocks: Annotated[int, "[1, inf)"] = 2
    disc_rank: Annotated[int, "[1, 65536]", "or null for the rank of the backbone"] | None = None
    disc_rate: Annotated[float, "(0, inf)"] = 1.0  # factor on train.learning_rate
    # noise levels of the discriminator, as shares of the network's noise schedule; of flows: times. [0, 0]: none, for
    # comparison
    t_range: tuple[float, float] = (0.02, 0.98)
    lambda_adv: Factor = 0.01  # of L_G; 0: no discriminator. Watch adv_to_pixels, which should reach .1 to .5
    adv_ramp: Ramp = field(default_factory=lambda: Ramp(start=500, length=1000))  # factor on lambda_adv
    lambda_mse: Factor = 1.0  # of pixels in [-1, 1]
    lambda_ea_dists: Factor = 1.0  # edge-aware DISTS, the paper's lambda_2
    lambda_dists: Factor = 0.0  # for comparison
    lambda_lpips: Factor = 0.0  # for comparison
    # share of the images on which LPIPS and DISTS are computed, which cost more than a small network
    perceptual_share: Annotated[float, "(0, 1]"] = 1.0
    lpips_net: Literal["vgg", "alex"] = "vgg"
    lpips_weights: Literal["pretrained", "random"] = "pretrained"  # random: same computation, for benchmarks
    dists_weights: Literal["pretrained", "random"] = "pretrained"

    def __post_init__(self):
        low, high = self.t_range
        if not 0 <= low <= high < 1 or (low == high and high > 0):
            raise ValueError(
                f"method.t_range = {self.t_range}: must be [low, high] with 0 <= low < high < 1, such as [0.02, 0.98], "
                "or [0, 0] for no noise"
            )
        if not any(getattr(self, f"lambda_{name}") for name in PIXELS):
            raise ValueError(
                "every loss of pixels is 0, so that nothing would tie the result to the picture: set "
                + ", ".join(f"method.lambda_{name}" for name in PIXELS[:-1])
                + f" or method.lambda_{PIXELS[-1]} above 0"
            )

    @property
    def start(self) -> float:
        """Time from which the student jumps to 0."""
        return self.t_start if self.student == "single" else 1.0

    @property
    def uses_dists(self) -> bool:
        """Whether a loss needs the DISTS network."""
        return bool(self.lambda_dists or self.lambda_ea_dists)


def _as_it_is(z: Tensor) -> Tensor:
    return z


class D3sr(WithMetrics):
    """A one-step student, and a discriminator that judges its results at random noise levels."""

    def roles(self) -> tuple[Role, ...]:
        c = self.config
        student = Role(FIRST, branches=c.student)
        if not c.lambda_adv:
            return (student,)
        return student, Role(
            "discriminator",
            base="prior" if c.discriminator == "prior" else "main",
            copy="discriminator" if c.discriminator == "copy" else "",
            rate=c.disc_rate,
            branches="single",
            blocks=c.disc_blocks,
            head=True,
            rank=c.disc_rank,
        )

    def sampler(self) -> Sampler:
        return scores.OneStep(self.config.student, self.config.start)

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        """Return the factor of each loss at this point of the run; that of L_G is its lambda times its ramp."""
        c = self.config
        weight = {name: getattr(c, f"lambda_{name}") for name in PIXELS}
        if not c.lambda_adv:
            return weight
        return weight | {"adv": c.lambda_adv * c.adv_ramp.factor(progress), "disc": 1.0}

    def check_models(self, models: Mapping[str, Model]) -> None:
        """Raise ValueError for a discriminator whose weights know nothing of images."""
        discriminator = models.get("discriminator")
        if discriminator and not (discriminator.sees_pixels or discriminator.backbone.has_prior):
            raise ValueError(
                "role discriminator judges by the features of a diffusion model of images, but the weights of this "
                f"{type(discriminator.backbone).__name__} were never trained without an LQ image: use the backbone "
                "tiny with a prior (backbone.base=small-prior) or one of diffusers (sd_unet, sd3, z_image, "
                "qwen_image), or train without a discriminator (method.lambda_adv=0)"
            )

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        """Yield the loss of the student and, if there is a discriminator, its own."""
        c, weight, student = self.config, self.loss_weights(progress), models["student"]
        discriminator = models.get("discriminator")
        judges_pixels = discriminator is not None and discriminator.sees_pixels
        seen = student.decode if judges_pixels else _as_it_is
        z_hq, z_lq = latents(student, batch, hq=discriminator is not None and not judges_pixels)
        eps = draws.normal("one-step noise", z_lq) if c.student == "dual" else None
        z_hat = scores.one_step(student, c.student, z_lq, eps, c.start)
        z_fake = z_hat.detach()
        gradient, logs = self._pixel_gradient(student, batch, z_fake)
        if weight.get("adv"):
            logs["adv"], adv = self._adversarial_gradient(discriminator, z_fake, draws, seen)
            adv = weight["adv"] * adv
            logs["adv_to_pixels"] = (losses.rms(adv) / losses.rms(gradient).clamp(min=1e-12)).mean()
            gradient = gradient + adv
        yield Loss("generator", "student", (z_hat * gradient).sum(), logs)
        del z_hat
        if discriminator is not None:
            with torch.no_grad():
                fake = seen(z_fake)
            real = batch.x_hq if judges_pixels else z_hq
            loss, logs = self._discriminator_loss(discriminator, real, fake, draws)
            yield Loss("discriminator", "discriminator", loss, logs)

    def _pixel_gradient(self, student: Model, batch: Batch, z_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of L_spatial with respect to z_hat, and values to log."""
        weight = {name: getattr(self.config, f"lambda_{name}") for name in PIXELS}
        distances = {"lpips": self.lpips, "dists": self.dists, "ea_dists": partial(losses.ea_dists, self.dists)}
        n = max(1, round(len(batch.keys) * self.config.perceptual_share))
        seen = {name: of_rows(distance, slice(n), batch.perceptual) for name, distance in distances.items()}
        _, gradient, logs = pixel_gradient(student, z_hat, batch.x_hq, weight, seen.pop("lpips"), others=seen)
        logs |= {"z_hat_mean": z_hat.mean(), "z_hat_std": z_hat.flatten(1).std(1).mean()}
        return gradient, logs

    def _adversarial_gradient(
        self, discriminator: Model, z_hat: Tensor, draws: Draws, seen: Callable[[Tensor], Tensor] = _as_it_is
    ) -> tuple[Tensor, Tensor]:
        """Return L_G of `seen`(z_hat) and its gradient with respect to z_hat; the discriminator gets none."""
        t = self._times(draws, discriminator)

        def generator_loss(z: Tensor) -> Tensor:
            fake = seen(z)
            fake = flow.interpolate(fake, draws.normal("fake noise", fake), t)
            return losses.gan_generator(discriminator.logits(fake, t))

        return losses.gradient_through(generator_loss, z_hat)

    def _discriminator_loss(
        self, discriminator: Model, real: Tensor, fake: Tensor, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_D of originals and results, latents or pictures, and values to log.

        Real and fake have the same time and different noise; one batched call.

        The accuracy counts logits of zero as half right. That of a part of t_range is exact if the batch of the update
        is a multiple of BINS, since each sample then has its part.
        """
        t = self._times(draws, discriminator)
        real = flow.interpolate(real, draws.normal("real noise", real), t)
        fake = flow.interpolate(fake, draws.normal("fake noise", fake), t)
        real, fake = discriminator.logits(torch.cat((real, fake)), t.repeat(2)).chunk(2)
        loss, right = losses.gan_discriminator(real, fake), _accuracy(real, fake)
        logs = {"disc": loss, "logit_real": real.mean(), "logit_fake": fake.mean(), "accuracy": right.mean()}
        part = _parts(draws)
        logs |= {f"accuracy_t{k + 1}": BINS * (right * (part == k)).mean() for k in range(BINS)}
        return loss, {name: value.detach() for name, value in logs.items()}

    def _times(self, draws: Draws, discriminator: Model) -> Tensor:
        """Return times [B], uniform in t_range and stratified: neighbours in the batch lie in different parts."""
        low, high = self.config.t_range
        u = (_parts(draws) + draws.uniform("discriminator time")) / BINS
        return discriminator.snap(discriminator.time_at(low + (high - low) * u))


def _parts(draws: Draws) -> Tensor:
    """Return the part 0 .. BINS - 1 of t_range in which each sample's time lies, [B]."""
    return torch.tensor([(n + draws.update) % BINS for n in draws.samples], device=draws.device)


@torch.no_grad()
def _accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share of right signs of logits [B, h', w'], as [B]."""
    return 0.5 + 0.25 * (real.sign() - fake.sign()).flatten(1).mean(1)
