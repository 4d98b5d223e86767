"""Models: a role as a method calls it, and what it may be asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.backbones.roles import STUDENT, Role


@dataclass(frozen=True)
class Condition:
    """What a velocity is asked for besides the noised latent and its time; what a role's layout does not take is an error."""

    z_lq: Tensor | None = None  # [B, C, h, w], latent of the low-quality picture: dual branch alone
    t_tar: Tensor | None = None  # [B] in [-1, 1], time of the condition branch: dual branch alone
    text: Tensor | None = None  # [B or 1, T, D], embedding of the prompt; None: the backbone's own
    null_text: Tensor | None = None  # the same of the null prompt, for guidance
    guidance: float | Tensor = 1.0  # classifier-free: v_null + guidance (v_text - v_null); a number or [B]


NOTHING = Condition()


class Model:
    """One role as a method sees it. Times are float32 [B]: t_cur in [0, 1] (0 clean, 1 noise), t_tar in [-1, 1]."""

    def __init__(self, backbone: Backbone, role: Role = STUDENT):
        self.backbone, self.role = backbone, role

    @property
    def patch_px(self) -> int:
        """Pixels of the picture for one token."""
        return self.backbone.patch_px

    @property
    def pixel_multiple(self) -> int:
        """Height and width of a picture must be divisible by it."""
        return self.backbone.pixel_multiple

    def snap(self, t: Tensor) -> Tensor:
        """Round times to what the network can tell apart."""
        return self.backbone.snap(t)

    def encode(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]; at time t [B] for a role with an encoder adapter."""
        z = self.backbone.encode(x)
        return z if t is None else self.adapt(z, t)

    def adapt(self, z_lq: Tensor, t: Tensor) -> Tensor:
        """Latents as the time-aware encoder gives them at time t [B]. ValueError for a role without one."""
        if not self.role.encoder:
            raise ValueError(
                f"role {self.role.name} has no encoder adapter: encode without a time, or set encoder=True"
            )
        return self.backbone.call(self.role, "encoder", z_lq, t)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pictures, differentiable and not clamped."""
        return self.backbone.decode(z)

    def velocity(self, z_t: Tensor, t_cur: Tensor, condition: Condition = NOTHING) -> Tensor:
        """Velocity at z_t [B, C, h, w], fp32 at least. ValueError for a condition that the role's layout does not take.

        Dual branch: t_tar = t_cur asks for the instantaneous velocity, 0 <= t_tar < t_cur for the average one of the jump t_cur -> t_tar,
        and t_tar = -t_cur for the one of the fake trajectory (TEASR sec. 3.2, 3.4). Guidance costs a second evaluation, with the null prompt.
        """
        role, c = self.role, condition
        if role.blocks is not None:
            raise ValueError(f"role {role.name} sees blocks 1..{role.blocks} alone: it has features and no velocity")
        if (role.branches == "dual") != (c.z_lq is not None) or (c.z_lq is None) != (c.t_tar is None):
            needs = "z_lq and t_tar" if role.branches == "dual" else "neither z_lq nor t_tar"
            raise ValueError(f"role {role.name} has a {role.branches} branch layout: its condition needs {needs}")
        v = self.backbone.call(role, "velocity", z_t, t_cur, c.z_lq, c.t_tar, c.text)
        if isinstance(c.guidance, float | int) and c.guidance == 1:
            return v
        if c.text is None or c.null_text is None:
            raise ValueError("guidance needs two prompts: give text and null_text")
        null = self.velocity(z_t, t_cur, replace(c, text=c.null_text, guidance=1.0))
        g = torch.as_tensor(c.guidance, dtype=v.dtype, device=v.device)
        return null + g.reshape(-1, 1, 1, 1) * (v - null)

    def features(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Tokens after block k of the single branch as a map [B, D, h', w'], k = `blocks` of the role (default: the last)."""
        self._single("features")
        return self.backbone.call(self.role, "features", z_t, t)

    def logits(self, z_t: Tensor, t: Tensor) -> Tensor:
        """One logit for each token of the features, fp32 [B, h', w']. ValueError for a role without a head."""
        if not self.role.head:
            raise ValueError(f"role {self.role.name} has no head: set head=True")
        self._single("logits")
        return self.backbone.call(self.role, "logits", z_t, t)

    def _single(self, what: str) -> None:
        if self.role.branches != "single":
            raise ValueError(f"role {self.role.name} has two branches: {what} are those of a single one")
