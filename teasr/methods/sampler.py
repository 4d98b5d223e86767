"""Samplers that restore with a trained student, for previews, evaluation and inference, and the dials they offer.

A sampler is a pure loop over times. It takes a `Model`, or any other `Restorer` (restore/tiled.py). Its dials are
numbers in [0, 1].
"""

from __future__ import annotations

import math
import zlib
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
    """A trade-off between 0 and 1 that the user can choose without retraining."""

    name: str
    default: float | None  # None: without effect unless set
    help: str
    previewed: tuple[float, ...] = ()  # values that previews show beside the default
    one_step: bool = False  # it can be set for one step only


class Restorer(Protocol):
    """The part of a model's interface that a sampler needs."""

    def snap(self, t: Tensor) -> Tensor: ...

    def time_at(self, u: Tensor) -> Tensor: ...

    def adapt(self, z_lq: Tensor, t: Tensor) -> Tensor: ...

    def start_from(self, z_lq: Tensor, t: Tensor) -> Tensor: ...

    def velocity(self, z_t: Tensor, t_cur: Tensor, condition: Condition = NOTHING) -> Tensor: ...

    def jump_from_coarse(self, z_lq: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...


class Sampler(ABC):
    """Base class of samplers, which define how a method restores."""

    step_counts: tuple[int, ...] | None = None  # supported step counts; None: any number >= 1
    dials: tuple[Dial, ...] = ()

    @abstractmethod
    def times(self, steps: int) -> list[tuple[float, float]]:
        """Return (t_cur, t_tar) of every step, from noise to data."""

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
        """Return restored latents [B, C, h, w] from noise `eps` and the low-quality latent `z_lq`.

        on_step(i, steps, z) is called after step i and may return other latents to continue with. Raises ValueError
        like `check`.
        """

    def suited(self, model: Model) -> Sampler:
        """Return this sampler, or one with further dials for a model that allows them."""
        return self

    def check(self, steps: int, dials: Mapping[str, float] | None = None) -> dict[str, float | None]:
        """Return the values of all dials, with defaults filled in.

        Raises ValueError for a number of steps or a dial that the method does not support.
        """
        if steps < 1:
            raise ValueError(f"steps = {steps}: the sampler needs at least 1 step; use steps >= 1")
        if self.step_counts is not None and steps not in self.step_counts:
            allowed = ", ".join(map(str, self.step_counts))
            raise ValueError(f"steps = {steps} is not supported: this model restores in {allowed} step(s)")
        known = {dial.name: dial.default for dial in self.dials}
        for name, value in (dials or {}).items():
            if name not in known:
                raise ValueError(f"this model has no setting {name}: its settings are {', '.join(known) or 'none'}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}: must be between 0 and 1")
        return known | dict(dials or {})


def shown(on_step: OnStep | None, step: int, steps: int, z: Tensor) -> Tensor:
    """Show the latents to `on_step`, if there is one; return those that it puts in their place, or else z."""
    replacement = on_step(step, steps, z) if on_step else None
    return z if replacement is None else replacement


class SingleStep(Sampler):
    """Base class of samplers that restore in one jump."""

    step_counts = (1,)
    why: str  # why there is one step, in the error for other numbers

    @abstractmethod
    def jump(self, model: Restorer, z_lq: Tensor, eps: Tensor, dials: Mapping[str, float]) -> Tensor:
        """Return the restored latents [B, C, h, w]; dials: a value for each of the sampler's."""

    def check(self, steps: int, dials: Mapping[str, float] | None = None) -> dict[str, float]:
        if steps > 1:
            raise ValueError(
                f"steps = {steps}: {self.why}; set steps to 1 (previews: preview.steps=[1]), or train with the method "
                "teasr"
            )
        return super().check(steps, dials)

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
        return shown(on_step, 1, 1, self.jump(model, z_lq, eps, self.check(steps, dials)))


class AnyStep(Sampler):
    """TEASR's Algorithm 1: one pure loop over average velocities, for any number of steps."""

    dials = (Dial("fidelity", 0.0, "blends the result of several steps with the one-step result, at no extra cost"),)

    def times(self, steps: int) -> list[tuple[float, float]]:
        return flow.sampling_times(steps)

    def check(self, steps: int, dials: Mapping[str, float] | None = None) -> dict[str, float]:
        """Also raise ValueError for fidelity > 0 with one step, where there is nothing to blend."""
        values = super().check(steps, dials)
        if values.get("fidelity", 0) > 0 and steps == 1:
            raise ValueError(
                "fidelity > 0 blends the result of several steps with the one-step result: use 2 steps or more"
            )
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
        """Restore with one average velocity t_cur -> t_tar per step; the last step ends at 0 (TEASR Algorithm 1).

        `fidelity` moves the result linearly towards the one-step estimate of the first step (eq. 6). Starting from pure
        noise, this estimate is approximately the mean of all images consistent with the input, whereas the last step
        ends at one of them. The best trade-offs between distortion and perception lie on the line between the two
        (Freirich et al. 2021). The blend needs no additional network evaluation.
        """
        fidelity = self.check(steps, dials)["fidelity"]
        z, first = eps, None
        for i, (t_cur, t_tar) in enumerate(self.times(steps)):
            t = model.snap(torch.full((len(z),), t_cur, device=z.device))
            r = model.snap(torch.full((len(z),), t_tar, device=z.device))
            z = self.state(i, z, t, eps)
            v = model.velocity(z, t, Condition(z_lq, r))
            if i == 0 and fidelity > 0:
                first = flow.z0_from_velocity(z, v, t)
            z = shown(on_step, i + 1, steps, flow.step(z, v, t, r))
        return z if first is None else torch.lerp(z, first, fidelity)

    def state(self, i: int, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the state from which step i = 0, 1, .. starts, at time t [B]; z: where the step before it ended."""
        return z


MOST_NOISE = 0.15  # time of the noised coarse restoration at strength 1; beyond it, noise grows faster than detail
STRENGTH = Dial(
    "strength", None, "from faithful (0) to detailed (1) within one step", previewed=(0.0, 1.0), one_step=True
)


class Restarts(AnyStep):
    """One step to the image, then N - 1 restarts: re-noise the result to a lower time and jump to the image again.

    Deviation: not TEASR's Algorithm 1; it is the few-step mode of TwinFlow. The fresh noise is a function of `eps`.

    With a backbone that has a coarse restoration, one step can start there instead of from pure noise: the dial
    `strength` is the time to which the coarse restoration is noised, as a share of MOST_NOISE.
    """

    def __init__(self, from_coarse: bool = False):
        """from_coarse: whether the model has a coarse restoration."""
        self.dials = (*AnyStep.dials, STRENGTH) if from_coarse else AnyStep.dials

    def suited(self, model: Model) -> Sampler:
        return Restarts(model.backbone.has_coarse)

    def check(self, steps: int, dials: Mapping[str, float] | None = None) -> dict[str, float | None]:
        """Also raise ValueError for a strength with several steps."""
        values = super().check(steps, dials)
        if values.get("strength") is not None and steps > 1:
            raise ValueError("strength sets how far one step goes: use 1 step, or fidelity with several")
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
        strength = self.check(steps, dials).get("strength")
        if strength is None:
            return super().sample(model, z_lq, eps, steps, dials, on_step)
        t = model.snap(torch.full((len(z_lq),), MOST_NOISE * strength, device=z_lq.device))
        return shown(on_step, 1, 1, model.jump_from_coarse(z_lq, eps, t))

    def times(self, steps: int) -> list[tuple[float, float]]:
        """Jumps (t, 0): t = 1, then N - 1 times that fall geometrically, from a higher start the more there are.

        Two steps restart at 0.1, four at 0.15 and below, 30 at 0.3 and below: later times leave more noise in the
        result than they add detail (docs/log.md, "Low restarts").
        """
        high, low = 0.05 * (1 + math.log2(steps)), 0.05
        n = steps - 1
        restarts = [high * (low / high) ** (i / (n - 1)) if n > 1 else high for i in range(n)]
        return [(t, 0.0) for t in (1.0, *restarts)]

    def state(self, i: int, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        if i == 0:
            return z
        seed = zlib.crc32(eps.flatten()[:64].cpu().numpy().tobytes() + bytes([i]))
        return flow.interpolate(z, torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z), t)


@torch.no_grad()
def restore(
    model: Model, sampler: Sampler, x_lq: Tensor, steps: int, seed: int, dials: Mapping[str, float] | None = None
) -> Tensor:
    """Restore low-quality images that already have the output size.

    Input and output are [B, 3, H, W] in [-1, 1]; any size works, since images are padded internally. The noise depends
    only on the seed and the size. Raises ValueError for steps or dials that the sampler does not support.
    """
    height, width = x_lq.shape[-2:]
    m = model.pixel_multiple
    z_lq = model.encode_lq(F.pad(x_lq, (0, -width % m, 0, -height % m), mode="replicate"))
    shape = len(z_lq), model.backbone.latent_channels, *z_lq.shape[-2:]
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(z_lq.device)
    return model.decode(sampler.sample(model, z_lq, eps, steps, dials))[..., :height, :width]
