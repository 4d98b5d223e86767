"""Building blocks of score distillation: one-step students, real and fake scores, time weights, the fake score's loss.

Scores are single-branch networks: they know the noised latent, its time and a text, never the LQ image. A fake score
that saw z_lq would model p(z_hat | z_lq), for a one-step student a single point, and nothing of the entropy term of
KL(p_fake || p_real) would be left. Convention: t = 1 is noise, z_s = (1 - s) z0 + s eps, v = eps - z0. Every gradient
here is one with respect to z_hat, times the number of its elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from teasr.backbones.model import NOTHING, Condition, Model
from teasr.backbones.roles import Role
from teasr.diffusion import flow, losses
from teasr.methods.sampler import Restorer, SingleStep
from teasr.util.randomness import Draws

Branches = Literal["dual", "single"]
Layout = Literal["one_base", "two_copies", "three_copies"]
Weight = Literal["osediff", "s2", "kl"]
FakeLoss = Literal["velocity", "x0", "eps"]
SMALLEST_N = 1e-3  # N of OSEDiff falls to 0 where z_hat already is what the teacher guesses


def score_roles(layout: Layout, fake: bool = True, rate: float = 1.0, rank: int | None = None) -> tuple[Role, ...]:
    """Return the real and, if `fake`, the trained fake score.

    one_base: LoRA sets on the student's base. two_copies: both scores on one copy of it. three_copies: one copy each.
    """
    copies = {"one_base": ("", ""), "two_copies": ("scores", "scores"), "three_copies": ("real", "fake")}[layout]
    real = Role("real", copy=copies[0], trains="nothing", branches="single")
    return (real, Role("fake", copy=copies[1], rate=rate, rank=rank, branches="single")) if fake else (real,)


def one_step(
    student: Restorer, branches: Branches, z_lq: Tensor, eps: Tensor | None, start: float = 1.0, encoder: bool = False
) -> Tensor:
    """Return the student's estimate z_hat, from time `start`.

    dual: z_hat = eps - v(eps, 1, z_lq, 0), as in TEASR. single: z_hat = z - start v(z, start) with z = z_lq: the LQ
    latent takes the place of the noised one, and nothing is random (eps is not used). OSEDiff and TSD-SR start at 1,
    D3SR in between. encoder: the student has an encoder adapter, which makes z of the LQ image.
    """
    t = student.snap(torch.full((len(z_lq),), start, device=z_lq.device))
    if branches == "dual":
        z, condition = eps, Condition(z_lq, torch.zeros_like(t))
    else:
        z, condition = student.start_from(student.adapt(z_lq, t) if encoder else z_lq, t), NOTHING
    return flow.z0_from_velocity(z, student.velocity(z, t, condition), t)


class OneStep(SingleStep):
    """The student's one jump to time 0: from noise with two branches, from the LQ latent at time `start` with one."""

    def __init__(self, branches: Branches, start: float = 1.0, encoder: bool = False):
        self.branches, self.start, self.encoder = branches, start, encoder
        self.why = f"this method trains the jump from time {start:g} to 0 alone, so that the model restores in 1 step"

    def times(self, steps: int) -> list[tuple[float, float]]:
        return [(self.start, 0.0)]

    def jump(self, model: Restorer, z_lq: Tensor, eps: Tensor, dials: Mapping[str, float]) -> Tensor:
        return one_step(model, self.branches, z_lq, eps, self.start, self.encoder)


def check_range(name: str, times: tuple[float, float]) -> None:
    """Raise ValueError if a setting is not a range of times in which scores are defined."""
    low, high = times
    if not 0 < low < high < 1:
        raise ValueError(f"method.{name} = {times}: must be [low, high] with 0 < low < high < 1")


@dataclass(frozen=True)
class Guided:
    """A guided velocity and its two parts; `null` is None where there is no guidance."""

    v: Tensor
    text: Tensor
    null: Tensor | None = None


def guided(score: Model, z_t: Tensor, t: Tensor, guidance: float | Tensor) -> Guided:
    """Evaluate a score with classifier-free guidance, v = v_null + guidance (v_text - v_null).

    v_text has the captions of the batch, or else the prompt of the backbone, v_null its null prompt. guidance: a
    number, or one for each sample [B]. With the number 1 the null prompt is not evaluated.
    """
    text = score.velocity(z_t, t)
    if isinstance(guidance, Tensor):
        guidance = flow.per_sample(guidance, text)
    elif guidance == 1:
        return Guided(text, text)
    null = score.velocity(z_t, t, Condition(text=score.null_text))
    return Guided(null + guidance * (text - null), text, null)


def shifted(u: Tensor, shift: float) -> Tensor:
    """Shift times towards noise, s = shift u / (1 + (shift - 1) u); 1 changes nothing, SD3 and TSD-SR use 3."""
    return shift * u / (1 + (shift - 1) * u)


def time_weight(kind: Weight, s: Tensor, z_hat: Tensor, x_real: Tensor) -> Tensor:
    """Return the weight w [B] of v_real - v_fake in the gradient with respect to z_hat.

    kl: (1 - s)^2 / s, the gradient of KL(p_fake || p_real) at noise level s. s2: s^2 (TSD-SR). osediff: 2 s / N with
    N = mean |z_hat - x_real| of the sample, from mse(z_hat, sg(z_hat - (x_fake - x_real) / N)).
    """
    if kind == "kl":
        return flow.tar_weight(s)
    if kind == "s2":
        return s.square()
    n = (z_hat - x_real).abs().flatten(1).mean(1)
    return 2 * s / n.clamp(min=SMALLEST_N)


def distribution_gradient(w: Tensor, v_real: Tensor, v_fake: Tensor) -> Tensor:
    """VSD: w (v_real - v_fake), downhill for KL(p_fake || p_real) with respect to z_hat."""
    return flow.per_sample(w, v_real) * (v_real - v_fake)


def target_gradient(w: Tensor, s: Tensor, z: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> Tensor:
    """Target score matching (TSD-SR): w (eps_real(z_s) - eps_real(h_s)), h_s being the noised HQ latent.

    z: (z_s, h_s). v: the real score's velocities there.

    Deviation: TSD-SR's code takes the difference of velocities. The two inputs differ, so that it lacks the term
    (1 - s)(z_hat - z_hq) and pushes z_hat away from z_hq at low noise; the difference of noises always attracts.
    """
    eps_z, eps_h = (flow.eps_from_velocity(at, velocity, s) for at, velocity in zip(z, v, strict=True))
    return flow.per_sample(w, eps_z) * (eps_z - eps_h)


def surrogate(gradient: Tensor) -> Tensor:
    """Value of 1/2 mean || z_hat - sg(z_hat - gradient) ||^2, whose gradient is gradient / numel."""
    return 0.5 * gradient.square().mean()


def fake_score_loss(fake: Model, z_hat: Tensor, draws: Draws, kind: FakeLoss = "velocity") -> Tensor:
    """Denoising loss of the fake score at the student's result, with fresh noise and time; one graph.

    In a rectified flow, the loss of x0 is s^2 and that of the noise (1 - s)^2 times the loss of the velocity, sample by
    sample: the choice decides at which noise levels the fake score is good.
    """
    z, eps = z_hat.detach(), draws.normal("fake noise", z_hat)
    t = fake.snap(fake.time_at(draws.uniform("fake time")))
    error = fake.velocity(flow.interpolate(z, eps, t), t) - flow.velocity_target(z, eps)
    if kind == "velocity":
        return losses.mse(error, torch.zeros_like(error))
    factor = t if kind == "x0" else 1 - t
    return losses.mse(flow.per_sample(factor, error) * error, torch.zeros_like(error))
