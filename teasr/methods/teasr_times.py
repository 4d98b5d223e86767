"""The times of TEASR's losses, all drawn before its first network call, and the shortcuts of L_cons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teasr.backbones.model import Call, Condition, Model
from teasr.diffusion import flow
from teasr.util.randomness import Draws

if TYPE_CHECKING:
    from teasr.methods.teasr import TeasrConfig


@dataclass(frozen=True)
class Shortcut:
    """A shortcut t -> m -> s of L_cons, starting at z_t."""

    z_t: Tensor
    t: Tensor
    m: Tensor
    s: Tensor

    def to_s(self, z_lq: Tensor) -> Call:
        """The whole."""
        return Call(self.z_t, self.t, Condition(z_lq, self.s))

    def to_m(self, z_lq: Tensor) -> Call:
        """The first half."""
        return Call(self.z_t, self.t, Condition(z_lq, self.m))

    def from_m(self, z_lq: Tensor, u1: Tensor) -> Call:
        """The second half, from the point that the first half, with velocity `u1`, reaches."""
        return Call(flow.step(self.z_t, u1, self.t, self.m), self.m, Condition(z_lq, self.s))

    def target(self, u1: Tensor, u2: Tensor) -> Tensor:
        """The average velocity of both halves (eqs. 2-3)."""
        return flow.shortcut_target(u1, u2, self.t, self.m, self.s)


@dataclass(frozen=True)
class Times:
    """All times of one update, float32 [B], on the backbone's time grid."""

    t: Tensor  # L_cons shortcuts t -> s
    m: Tensor
    s: Tensor
    flow: Tensor
    fake: Tensor  # t' of L_adv
    score: Tensor  # s of L_rectify

    @classmethod
    def draw(cls, config: TeasrConfig, draws: Draws, model: Model) -> Times:
        """Draw the times: U(0, 1) for L_flow, U(s_range) for L_adv and L_rectify, `cons_mix` for L_cons."""
        t, s = shortcut_times(config, draws)
        t, s = model.snap(t), model.snap(s)
        return cls(
            t=t,
            m=model.snap(s + config.cons_midpoint * (t - s)),
            s=s,
            flow=model.snap(draws.uniform("flow time")),
            fake=model.snap(draws.uniform("fake time", *config.s_range)),
            score=model.snap(draws.uniform("score time", *(config.rectify_range or config.s_range))),
        )


def shortcut_times(config: TeasrConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """Draw (t, s) of L_cons from the mixture `cons_mix`.

    Its components are: t ~ U(0, 1) with s ~ U(0, t); the one-step jump (1, 0); a pair of the inference grid.
    """
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
