"""`RoleNet`, the base class of networks shared by several roles, and the modules a role may have besides its LoRA set.

These modules are a time-aware adapter of the latent (`LatentAdapter`) and a discriminator head (`RegionHead`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.backbones.roles import STUDENT, Role

TIME_SCALE = 1000.0  # times are multiplied by this before the sinusoid, as in large diffusion transformers


def sinusoid(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of times [B], fp32 [B, width]; negating a time changes the sign of the sine half only."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = TIME_SCALE * t[:, None] * freqs
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which layers compute in the dtype of their weights; the meta device of a dry run has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class LatentAdapter(nn.Module):
    """The time-aware encoder of TADSR as an adapter z + B(z, t) of the latents of a frozen codec.

    Three 3x3 convolutions with FiLM conditioning on t; the last one is initialised to zero.

    Deviation: TADSR trains LoRA and FiLM inside its convolutional encoder; here the codec is frozen, so the latent is
    adapted instead.
    """

    def __init__(self, channels: int, width: int = 64, embedding: int = 256):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, 4 * width))
        self.first, self.second = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Map latents [B, C, h, w] and times [B] to adapted latents [B, C, h, w]; the residual is computed in fp32."""
        with without_autocast(z):
            film = self.embed(sinusoid(t.float(), self.embed[0].in_features).to(self.last.weight.dtype))
            scale1, shift1, scale2, shift2 = film[..., None, None].chunk(4, dim=1)
            y = F.silu(self.first(z.to(film.dtype)) * (1 + scale1) + shift1)
            return z + self.last(F.silu(self.second(y) * (1 + scale2) + shift2)).to(z.dtype)


class RegionHead(nn.Module):
    """Discriminator head with one logit per token of a feature map (D3SR).

    The last layer is initialised to zero, so that all logits start at zero.
    """

    def __init__(self, channels: int, width: int = 256):
        super().__init__()
        self.hidden, self.last = nn.Conv2d(channels, width, 1), nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D, h', w'] -> [B, h', w'], fp32."""
        with without_autocast(features):
            return self.last(F.silu(self.hidden(features.to(self.last.weight.dtype))))[:, 0]


class RoleNet(nn.Module):
    """A network shared by every role on its base. Subclasses implement `predict` and `features`."""

    parts: nn.ModuleDict  # encoder adapters and heads by role name; absent if no role has any

    def add_parts(self, role: Role, latent_channels: int, feature_channels: int) -> None:
        """Build this role's encoder adapter and head, if it has them, under `parts.<role>`."""
        own = nn.ModuleDict()
        if role.encoder:
            own["encoder"] = self.encoder_adapter(role, latent_channels)
        if role.head:
            own["head"] = RegionHead(feature_channels)
        if len(own):
            if "parts" not in self._modules:
                self.parts = nn.ModuleDict()
            self.parts[role.name] = own.requires_grad_(role.is_trained)

    def encoder_adapter(self, role: Role, latent_channels: int) -> nn.Module:
        """Build the encoder adapter of a role: (what `Backbone.encoder_input` returns, times) -> latents."""
        return LatentAdapter(latent_channels)

    def forward(
        self,
        z_t: Tensor,
        t_cur: Tensor,
        z_lq: Tensor | None = None,
        t_tar: Tensor | None = None,
        text: Tensor | None = None,
        *,
        role: Role = STUDENT,
        part: str = "velocity",
    ) -> Tensor:
        """Compute one output for a role, selected by `part`.

        velocity: [B, C, h, w]. coarse: coarse restoration of z_t and its log standard deviation, [B, 2 C, h, w].
        features: [B, D, h', w'] after block `role.blocks`. logits: [B, h', w']. encoder: the latents [B, C, h, w] that
        the encoder adapter makes of z_t at time t_cur.
        """
        if part == "encoder":
            return self.parts[role.name]["encoder"](z_t, t_cur)
        if part == "coarse":
            return self.coarse(z_t)
        if part == "velocity":
            return self.predict(z_t, t_cur, z_lq, t_tar, text, role)
        features = self.features(z_t, t_cur, text, role)
        return features if part == "features" else self.parts[role.name]["head"](features)

    @abstractmethod
    def predict(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Tensor:
        """Predict the velocity at z_t."""

    def coarse(self, z_lq: Tensor) -> Tensor:
        """Return a coarse restoration of z_lq and the log standard deviation of its error, [B, 2 C, h, w].

        Raises ValueError for a network that has none.
        """
        raise ValueError(
            f"{type(self).__name__} has no coarse restoration: choose another method, or backbone.name=unet"
        )

    @abstractmethod
    def features(self, z_t: Tensor, t_cur: Tensor, text: Tensor | None, role: Role) -> Tensor:
        """Return the tokens after block `role.blocks` (None: the last) as a feature map; single-branch roles only."""
