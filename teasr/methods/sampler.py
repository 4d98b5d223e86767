"""Restoring with a trained student, for previews, evaluation and use: pure loops over times, and the dials that a method offers.

A sampler sees a `Model`, or anything with `snap`, `velocity` and `adapt` like one (restore/tiled.py). Its dials are numbers in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teasr.backbones.model import NOTHING, Condition, Model
from teasr.diffusion import flow

OnStep = Callable[[int, int, Tensor], Tensor | None]


@dataclass(frozen=True)
class Dial:
    """A trade that a user may choose, from 0 to 1, without training again."""

    name: str
    default: float
    help: str


class Restorer(Protocol):
    """What a sampler needs of a model."""

    def snap(self, t: Tensor) -> Tensor: ...

    def adapt(self, z_lq: Tensor, t: Tensor) -> Tensor: ...

    def velocity(self, z_t: Tensor, t_cur: Tensor, condition: Condition = NOTHING) -> Tensor: ...


class Sampler(ABC):
    """How a method restores."""

    step_counts: tuple[int, ...] | None = None  # that it can do; None: any number >= 1
    dials: tuple[Dial, ...] = ()

    @abstractmethod
    def times(self, steps: int) -> list[tuple[float, float]]:
        """(t_cur, t_tar) of every step, from noise to data."""

    @abstractmethod
    def sample(
        self,
        model: Restorer,
        z_lq: Tensor,
        eps: Tensor,
        steps: int,
        dials: Mapping[str, float] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Restored latents [B, C, h, w] from noise `eps` and the low-quality latent `z_lq`.

        on_step(i, steps, z) is called after step i and may return other latents to go on with. ValueError as of `check`.
        """

    def check(self, steps: int, dials: Mapping[str, float] | None = None) -> dict[str, float]:
        """All dials with their values, defaults filled in. ValueError for a number of steps or a dial that the method does not have."""
        if steps < 1:
            raise ValueError(f"steps = {steps}: the sampler needs at least 1 step; use steps >= 1")
        if self.step_counts is not None and steps not in self.step_counts:
            allowed = ", ".join(map(str, self.step_counts))
            raise ValueError(f"steps = {steps}: this model's method restores in {allowed} step(s)")
        known = {dial.name: dial.default for dial in self.dials}
        for name, value in (dials or {}).items():
            if name not in known:
                raise ValueError(f"this model's method has no {name}: its dials are {', '.join(known) or 'none'}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: must be between 0 and 1")
        return known | dict(dials or {})


class AnyStep(Sampler):
    """TEASR's Algorithm 1: one pure loop over average velocities, in any number of steps."""

    dials = (Dial("fidelity", 0.0, "blends the result of several steps with the one-step result, at no extra cost"),)

    def times(self, steps: int) -> list[tuple[float, float]]:
        return flow.sampling_times(steps)

    def check(self, steps: int, dials: Mapping[str, float] | None = None) -> dict[str, float]:
        """Also ValueError for a fidelity in one step, which has nothing to blend."""
        values = super().check(steps, dials)
        if values["fidelity"] > 0 and steps == 1:
            raise ValueError("fidelity blends several steps with the first one's result: use 2 steps or more")
        return values

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
        """Each step asks for the average velocity t_cur -> t_tar; the last one ends at 0 (TEASR Algorithm 1).

        fidelity moves the result on the straight line to the one-step estimate of the first step (eq. 6): from pure noise that is about the
        mean of all pictures that fit, of which the last step ends at one, and on this line lie the best trades between distortion and
        perception (Freirich et al. 2021). It costs no evaluation.
        """
        fidelity = self.check(steps, dials)["fidelity"]
        z, first = eps, None
        for i, (t_cur, t_tar) in enumerate(self.times(steps)):
            t = model.snap(torch.full((len(z),), t_cur, device=z.device))
            r = model.snap(torch.full((len(z),), t_tar, device=z.device))
            v = model.velocity(z, t, Condition(z_lq, r))
            if i == 0 and fidelity > 0:
                first = flow.z0_from_velocity(z, v, t)
            z = flow.step(z, v, t, r)
            if on_step:
                z = z if (other := on_step(i + 1, steps, z)) is None else other
        return z if first is None else torch.lerp(z, first, fidelity)


@torch.no_grad()
def restore(
    model: Model, sampler: Sampler, x_lq: Tensor, steps: int, seed: int, dials: Mapping[str, float] | None = None
) -> Tensor:
    """Restored pictures from low-quality ones of the same size, both [B, 3, H, W] in [-1, 1]; any size, padded inside.

    The noise is a function of the seed and the size alone. ValueError for steps or dials that the sampler does not have.
    """
    height, width = x_lq.shape[-2:]
    m = model.pixel_multiple
    z_lq = model.encode(F.pad(x_lq, (0, -width % m, 0, -height % m), mode="replicate"))
    eps = torch.randn(z_lq.shape, generator=torch.Generator().manual_seed(seed)).to(z_lq.device)
    return model.decode(sampler.sample(model, z_lq, eps, steps, dials))[..., :height, :width]
