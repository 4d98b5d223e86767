"""TEASR: self-adversarial distillation in one model with time-aware rectification (the paper's sec. 3).

One update has four graphs, one alive at a time. A: the one-step estimate (eq. 6); the scores at it (eqs. 9-10) and the
pixel losses at it (eqs. 12-13) reach the network through *one* backward with an analytic output gradient, since
z_hat = eps - v means d z_hat / d v = -1. Then L_cons (eqs. 1-4), L_flow and L_adv (eqs. 7-8). The weights do not change
in between, so the summed gradients are those of the joint loss
L = L_flow + l_cons L_cons + l_adv L_adv + l_rectify L_rectify + l_mse L_mse + l_lpips L_lpips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from teasr import flow, losses
from teasr.backbones.base import Backbone
from teasr.methods.base import Batch, Method, Progress, Term
from teasr.randomness import Draws

WEIGHTED = ("flow", "cons", "adv", "rectify", "mse", "lpips")


@dataclass(frozen=True)
class Ramp:
    """A weight that is zero until `start`, then rises linearly over `length`; both in `unit`."""

    start: float
    length: float
    unit: Literal["updates", "fraction"] = "updates"  # fraction: of the whole run

    def __post_init__(self):
        if self.start < 0 or self.length < 0:
            raise ValueError(f"a ramp needs start >= 0 and length >= 0, got start={self.start} length={self.length}")
        if self.unit == "fraction" and self.start + self.length > 1:
            raise ValueError(
                f"a ramp in fractions ends at {self.start + self.length:g} of the run: start + length must be <= 1"
            )

    def factor(self, progress: Progress) -> float:
        """0 before the start, 1 after the end."""
        at = progress.update / progress.updates if self.unit == "fraction" else progress.update
        if at < self.start:
            return 0.0
        return min(1.0, (at - self.start) / self.length) if self.length else 1.0


@dataclass(frozen=True)
class TeasrConfig:
    """Weights and choices of TEASR; what the paper leaves open has its reason in docs/method.md."""

    lambda_flow: float = 1.0
    lambda_cons: float = 1.0
    lambda_adv: float = 1.0
    lambda_rectify: float = 0.5
    lambda_mse: float = 1.0
    lambda_lpips: float = 1.0
    lpips_net: Literal["vgg", "alex"] = "vgg"
    ramps: dict[str, Ramp] = field(default_factory=lambda: {"rectify": Ramp(start=1500, length=2000)})
    s_range: tuple[float, float] = (0.02, 0.98)  # s of L_rectify and t' of L_adv: 1/s, and +-t look alike near 0
    score_clamp: float | None = 1.0  # elementwise on v_fake - v_real, before w(s)
    w_cap: float | None = None  # cap of w(s) = (1 - s)^2 / s
    time_aware: bool = True  # false: w = 1 (Table 3, without TAR)
    cons_mix: tuple[float, float, float] = (0.5, 0.25, 0.25)  # (t, s): uniform | (1, 0) | inference grid
    cons_grid: tuple[int, ...] = (2, 4, 8)  # step counts N of the grid pairs ((k + 1) / N, k / N)
    cons_midpoint: float = 0.5  # m = s + cons_midpoint (t - s)
    mode: Literal["all", "alternate_base", "cycle"] = "all"

    def __post_init__(self):
        for name in WEIGHTED:
            if getattr(self, f"lambda_{name}") < 0:
                raise ValueError(f"method.lambda_{name} = {getattr(self, f'lambda_{name}')}: a weight must be >= 0")
        if not any(getattr(self, f"lambda_{name}") for name in WEIGHTED):
            raise ValueError("every method.lambda_* is 0: there is nothing to train; set at least one above 0")
        unknown = sorted(set(self.ramps) - set(WEIGHTED))
        if unknown:
            raise ValueError(f"method.ramps.{unknown[0]}: no such loss term; the terms are {', '.join(WEIGHTED)}")
        low, high = self.s_range
        if not 0 < low < high <= 1:
            raise ValueError(f"method.s_range = {self.s_range}: needs 0 < low < high <= 1, such as [0.02, 0.98]")
        if abs(sum(self.cons_mix) - 1) > 1e-6 or min(self.cons_mix) < 0:
            raise ValueError(
                f"method.cons_mix = {self.cons_mix}: three shares >= 0 that sum to 1, such as [0.5, 0.25, 0.25]"
            )
        if not 0 < self.cons_midpoint < 1:
            raise ValueError(f"method.cons_midpoint = {self.cons_midpoint}: must lie inside (0, 1); the paper has 0.5")
        if not self.cons_grid or min(self.cons_grid) < 1:
            raise ValueError(f"method.cons_grid = {self.cons_grid}: step counts >= 1, such as [2, 4, 8]")


class Teasr(Method):
    """The method on one network, the student: it is generator, real score and fake score at once."""

    networks = ("student",)

    def __init__(self, config: TeasrConfig, lpips: nn.Module | None = None):
        """`lpips`: the metric network, built when not given and lambda_lpips > 0 (ValueError if its weights lack)."""
        self.config = config
        self.lpips = lpips
        if config.lambda_lpips and lpips is None:
            self.lpips = losses.load_lpips(config.lpips_net)

    def check(self, accumulation: int) -> None:
        if self.config.mode == "cycle" and accumulation % 4:
            raise ValueError(
                f"method.mode = cycle spreads its four graphs over the micro-batches of an update, {accumulation} is not "
                "a multiple of 4: set train.batch and train.micro_batch so that there are 4, 8, .. or use method.mode=all"
            )

    def to(self, device: torch.device) -> None:
        if self.lpips is not None:
            self.lpips.to(device)

    def weights(self, progress: Progress) -> dict[str, float]:
        """Weight of each term at this point of the run: lambda times its ramp."""
        return {
            name: getattr(self.config, f"lambda_{name}")
            * (self.config.ramps[name].factor(progress) if name in self.config.ramps else 1.0)
            for name in WEIGHTED
        }

    def terms(self, networks: dict[str, Backbone], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Term]:
        """Up to four terms; a term of zero weight is not computed, nor is anything only it would need."""
        student, weight = networks["student"], self._select(self.weights(progress), draws, progress)
        times = Times.draw(self.config, draws, student)
        with torch.no_grad():
            z0, z_lq = student.encode(batch.x_hq), student.encode(batch.x_lq)
        z_t = flow.interpolate(z0, eps := draws.normal("flow noise", z0), times.t)
        shortcut = (z_t, times.t, times.m, times.s) if weight["cons"] else None
        v_target = z_fake = None

        if weight["rectify"] or weight["mse"] or weight["lpips"]:
            term, z_fake, v_target = self._one_step(student, batch.x_hq, z_lq, draws, times, weight, shortcut)
            yield term
            del term
        elif weight["adv"]:
            with torch.no_grad():
                z_fake = one_step(student, z_lq, draws)[0]

        if weight["cons"]:
            if v_target is None:
                with torch.no_grad():
                    v_target = self._finish_shortcut(
                        student, z_lq, shortcut, student.velocity(z_t, times.t, z_lq, times.m)
                    )
            loss = losses.mse(student.velocity(z_t, times.t, z_lq, times.s), v_target)  # eq. 4, stop-gradient target
            yield Term("cons", "student", weight["cons"] * loss, {"cons": loss.detach()})
            del loss

        if weight["flow"]:
            # t_tar = t_cur is the instantaneous velocity, the one that eq. 10 uses as the real score.
            r = times.flow
            z_r = flow.interpolate(z0, eps, r)
            loss = losses.mse(student.velocity(z_r, r, z_lq, r), flow.velocity_target(z0, eps))
            yield Term("flow", "student", weight["flow"] * loss, {"flow": loss.detach()})
            del loss

        if weight["adv"]:
            eps_fake = draws.normal("fake noise", z0)
            z_a = flow.interpolate(z_fake, eps_fake, times.fake)  # eq. 7
            v = student.velocity(z_a, times.fake, z_lq, -times.fake)
            loss = losses.mse(v, flow.velocity_target(z_fake, eps_fake))  # eq. 8
            yield Term("adv", "student", weight["adv"] * loss, {"adv": loss.detach()})

    def _select(self, weight: dict[str, float], draws: Draws, progress: Progress) -> dict[str, float]:
        """The weights of this micro-batch; the cheaper modes keep their mean over updates or micro-batches.

        Deviation: `cycle` and `alternate_base` (docs/method.md) are cheaper schedules that the paper does not have.
        """
        if self.config.mode == "alternate_base" and weight["flow"] and weight["cons"]:
            on, off = ("flow", "cons") if draws.shared_uniform("alternate base") < 0.5 else ("cons", "flow")
            return weight | {on: 2 * weight[on], off: 0.0}
        if self.config.mode == "cycle":
            group = (("rectify", "mse", "lpips"), ("cons",), ("flow",), ("adv",))[progress.micro % 4]
            return {name: 4 * value if name in group else 0.0 for name, value in weight.items()}
        return weight

    def _one_step(
        self, student: Backbone, x_hq: Tensor, z_lq: Tensor, draws: Draws, times: Times, weight: dict, shortcut
    ) -> tuple[Term, Tensor, Tensor | None]:
        """L_data + L_rectify at the one-step estimate as one scalar whose gradient is exactly theirs.

        Returns the term, the detached estimate, and the consistency target where its first half could ride along in
        the batched no-grad forward.
        """
        z_hat, v = one_step(student, z_lq, draws)
        z_fake = z_hat.detach()
        logs = {"z_hat_mean": z_fake.mean(), "z_hat_std": z_fake.flatten(1).std(1).mean()}
        scores, v_target = self._no_grad_round(student, z_fake, z_lq, draws, times, weight, shortcut)
        gradient = torch.zeros_like(z_fake)  # of the loss with respect to v
        if scores is not None:
            w = (
                flow.tar_weight(times.score, self.config.w_cap)
                if self.config.time_aware
                else torch.ones_like(times.score)
            )
            difference = flow.score_difference(*scores, self.config.score_clamp)
            rectify = weight["rectify"] * losses.rectification_gradient(difference, w.to(difference.dtype))
            gradient += rectify
            logs["rectify"] = losses.rectification(torch.zeros_like(difference), difference, w.to(difference.dtype))
            logs["score_difference"] = losses.rms(difference).mean()
        if weight["mse"] or weight["lpips"]:
            data, more = self._data_gradient(student, z_fake, x_hq, weight)
            gradient -= data  # d z_hat / d v = -1
            logs |= more
            if scores is not None:
                logs["rectify_to_data"] = (losses.rms(rectify) / losses.rms(data).clamp(min=1e-12)).mean()
        return Term("one_step", "student", (v * gradient).sum(), logs), z_fake, v_target

    def _no_grad_round(
        self, student: Backbone, z_fake: Tensor, z_lq: Tensor, draws: Draws, times: Times, weight: dict, shortcut
    ):
        """Fake score, real score and the first half of the shortcut, in one batched forward without graph."""
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        if weight["rectify"]:
            s = times.score
            z_s = flow.interpolate(z_fake, draws.normal("score noise", z_fake), s)  # eq. 9
            rows += [(z_s, s, -s), (z_s, s, s)]
        if shortcut is not None:
            z_t, t, m, _ = shortcut
            rows.append((z_t, t, m))
        if not rows:
            return None, None
        with torch.no_grad():
            z, t_cur, t_tar = (torch.cat(column) for column in zip(*rows, strict=True))
            v = student.velocity(z, t_cur, z_lq.repeat(len(rows), 1, 1, 1), t_tar).chunk(len(rows))
            v_target = None if shortcut is None else self._finish_shortcut(student, z_lq, shortcut, v[-1])
        return (v[:2] if weight["rectify"] else None), v_target

    @staticmethod
    def _finish_shortcut(student: Backbone, z_lq: Tensor, shortcut, u1: Tensor) -> Tensor:
        """Second half m -> s from where the first half arrives, and their composition (eqs. 2-3); without graph."""
        z_t, t, m, s = shortcut
        u2 = student.velocity(flow.step(z_t, u1, t, m), m, z_lq, s)
        return flow.shortcut_target(u1, u2, t, m, s)

    def _data_gradient(self, student: Backbone, z_fake: Tensor, x_hq: Tensor, weight: dict) -> tuple[Tensor, dict]:
        """Gradient of the pixel losses (eqs. 12-13) at the one-step estimate; the decoder's graph dies here."""
        with torch.enable_grad():
            leaf = z_fake.clone().requires_grad_()
            x_hat = student.decode(leaf)
            logs: dict[str, Tensor] = {"checkerboard": losses.checkerboard_energy(x_hat, student.patch_px)}
            total = torch.zeros((), device=leaf.device)
            if weight["mse"]:
                logs["mse"] = (pixel := losses.mse(x_hat, x_hq)).detach()
                total = total + weight["mse"] * pixel
            if weight["lpips"]:
                logs["lpips"] = (perceptual := self.lpips(x_hat, x_hq).mean()).detach()
                total = total + weight["lpips"] * perceptual
            return torch.autograd.grad(total, leaf)[0], logs


def one_step(student: Backbone, z_lq: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """The one-step estimate z_hat = eps - v(eps, 1, z_lq, 0) (eq. 6) and its velocity, with graph if enabled."""
    eps = draws.normal("one-step noise", z_lq)
    one, zero = torch.ones(len(eps), device=eps.device), torch.zeros(len(eps), device=eps.device)
    v = student.velocity(eps, one, z_lq, zero)
    return flow.z0_from_velocity(eps, v, one), v


@dataclass(frozen=True)
class Times:
    """All times of one update, float32 [B], on the backbone's grid."""

    t: Tensor  # L_cons jumps t -> s
    m: Tensor
    s: Tensor
    flow: Tensor
    fake: Tensor  # t' of L_adv
    score: Tensor  # s of L_rectify

    @classmethod
    def draw(cls, config: TeasrConfig, draws: Draws, backbone: Backbone) -> Times:
        """Draw them: L_flow U(0, 1); L_adv and L_rectify U(s_range); L_cons from the mix of the config."""
        t, s = shortcut_times(config, draws)
        t, s = backbone.snap(t), backbone.snap(s)
        return cls(
            t=t,
            m=backbone.snap(s + config.cons_midpoint * (t - s)),
            s=s,
            flow=backbone.snap(draws.uniform("flow time")),
            fake=backbone.snap(draws.uniform("fake time", *config.s_range)),
            score=backbone.snap(draws.uniform("score time", *config.s_range)),
        )


def shortcut_times(config: TeasrConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """(t, s) of L_cons: t ~ U(0, 1), s ~ U(0, t) | the one-step jump (1, 0) | a pair of the inference grid."""
    t = draws.uniform("cons t")
    s = t * draws.uniform("cons s")
    kind = draws.uniform("cons kind")
    sizes = torch.tensor(config.cons_grid, device=t.device, dtype=t.dtype)
    n = sizes[(draws.uniform("cons grid size") * len(sizes)).long()]
    k = (draws.uniform("cons grid place") * n).floor()
    uniform, one = config.cons_mix[0], config.cons_mix[0] + config.cons_mix[1]
    t = torch.where(kind < uniform, t, torch.where(kind < one, torch.ones_like(t), (k + 1) / n))
    s = torch.where(kind < uniform, s, torch.where(kind < one, torch.zeros_like(s), k / n))
    return t, s
