"""A discriminator of pictures: a convolutional network with random initial weights, for the section `prior:` of D3SR.

D3SR's discriminator is a diffusion network that judges latents. This is the usual alternative of one-step restorers,
with which it is compared (docs/comparison.md). It has neither a codec nor a velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.backbones.base import Backbone
from teasr.backbones.parts import RoleNet, sinusoid
from teasr.backbones.roles import STUDENT, Role
from teasr.util.seed import seed_of

EMBEDDING = 128


@dataclass(frozen=True)
class PixelCnnConfig:
    """Size of the network. Its k-th stage halves the picture k times and has 2^k times `width` channels."""

    width: int = 32
    depth: int = 4  # stages; method.disc_blocks chooses how many of them are used

    def __post_init__(self):
        if self.width < 1 or not 1 <= self.depth <= 6:
            raise ValueError(
                f"backbone pixel_cnn: width = {self.width} must be >= 1 and depth = {self.depth} must be in [1, 6]"
            )


class Stages(RoleNet):
    """Stages of one convolution with stride 2, whose biases depend on the noise level."""

    def __init__(self, config: PixelCnnConfig, stages: int):
        super().__init__()
        widths = [config.width * 2**k for k in range(stages + 1)]
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(a, 2 * a, 4, stride=2, padding=1) for a in widths[:-1])
        self.embed = nn.ModuleList(nn.Linear(EMBEDDING, 2 * a) for a in widths[:-1])

    def features(self, z_t: Tensor, t_cur: Tensor, text: Tensor | None, role: Role) -> Tensor:
        """Pictures [B, 3, H, W] at noise levels [B] -> [B, D, H / 2^k, W / 2^k] after stage k."""
        h, t = self.first(z_t), sinusoid(t_cur.float(), EMBEDDING).to(z_t.dtype)
        for stage, embed in zip(self.stages, self.embed, strict=True):
            h = stage(F.leaky_relu(h, 0.2)) + embed(t)[..., None, None]
        return F.leaky_relu(h, 0.2)

    def predict(self, *inputs: object) -> NoReturn:
        raise ValueError(REFUSAL)


class PixelCnn(Backbone):
    """`Stages` behind the interface of a backbone, for one role with a head."""

    sees_pixels = True
    restores = False
    trains_base = True
    latent_channels, downsample, pixel_multiple, patch_px = 3, 1, 1, 1

    def __init__(self, config: PixelCnnConfig, seed: int = 0, roles: Sequence[Role] = (STUDENT,)):
        """Raises ValueError for roles other than one discriminator with at most `config.depth` blocks."""
        self.config, self.roles = config, tuple(roles)
        self.check_sharing()
        if not roles[0].head:
            raise ValueError(REFUSAL)
        stages = roles[0].blocks or config.depth
        if stages > config.depth:
            raise ValueError(
                f"method.disc_blocks = {stages}, but pixel_cnn has {config.depth} stages: lower it, or raise "
                "prior.depth"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "pixel_cnn init"))
            self.net = Stages(config, stages)
            self.net.add_parts(roles[0], 3, config.width * 2**stages)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    def share_codec(self, other: Backbone) -> None:
        """It needs no codec."""


REFUSAL = (
    "the backbone pixel_cnn is a discriminator of pictures and predicts no velocity: use it in the section prior of "
    "the method d3sr, with method.discriminator=prior"
)
