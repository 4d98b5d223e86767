"""The small backbone: `DualUNet` and an invertible linear codec. A few million parameters, for CPUs.

It is trained in two stages, because its trunk, a coarse restoration with its uncertainty, stays frozen under TEASR as
Qwen-Image's weights do: `train: trunk` with the method `coarse`, then `train: branches` with `base` naming that run.

Deviation: TEASR's network restores the image itself; this one draws the residual to the trunk's coarse restoration, at
the scale that the trunk predicts (as UPSR scales its noise), so that it cannot paint where nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from teasr.backbones.base import Backbone, find_weights
from teasr.backbones.roles import STUDENT, Role
from teasr.backbones.unet.network import BLOCK_PX, CHANNELS, DualUNet
from teasr.util.seed import seed_of

# orthonormal colour axes: (R + G + B) / sqrt 3, (R - B) / sqrt 2, (R - 2 G + B) / sqrt 6
AXES = torch.tensor([[3**-0.5] * 3, [2**-0.5, 0.0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]])


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network, and what is trained.

    train: `trunk` trains the coarse restoration (method `coarse`); `branches` freezes it and trains the rest.
    base: for `branches`, where the trunk comes from: a folder (of a run, a checkpoint or `teasr export`), the name of
    a shipped model, or `random` for explicitly random weights.
    """

    noise_widths: tuple[int, ...] = (48, 96, 192)
    condition_widths: tuple[int, ...] = (32, 64, 128)
    depth: int = 2  # residual blocks at each resolution
    trunk_width: int = 64
    trunk_depth: int = 6
    sigma: tuple[float, float, float] = (0.30, 0.08, 0.04)  # unit of the latents by colour axis, for images in [-1, 1]
    train: Literal["trunk", "branches"] = "branches"
    base: str | None = None
    decoupled_timestep: bool = True  # false: both branches share the sum of both time embeddings (Table 3, row 1)

    def __post_init__(self):
        if len(self.noise_widths) != len(self.condition_widths) or not self.noise_widths:
            raise ValueError(
                f"backbone.noise_widths = {self.noise_widths} and backbone.condition_widths = {self.condition_widths}: "
                "give one width per resolution in both, such as [48, 96, 192] and [32, 64, 128]"
            )
        sizes = (*self.noise_widths, *self.condition_widths, self.depth, self.trunk_width, self.trunk_depth)
        if min(sizes) < 1 or min(self.sigma) <= 0:
            raise ValueError("backbone: all widths and depths must be >= 1, and backbone.sigma > 0")
        if (self.train == "trunk") != (self.base is None):
            raise ValueError(
                f"backbone.train = {self.train} and backbone.base = {self.base}: train the trunk without a base, then "
                "the branches with backbone.base set to the folder of that run"
            )


class LinearCodec(nn.Module):
    """Invertible codec: colour axes in units of `sigma`, in blocks of 4x4 pixels."""

    def __init__(self, sigma: tuple[float, float, float]):
        super().__init__()
        self.register_buffer("axes", AXES / torch.tensor(sigma)[:, None], persistent=False)
        self.register_buffer("inverse", AXES.T * torch.tensor(sigma), persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 48, H / 4, W / 4]."""
        return F.pixel_unshuffle(torch.einsum("kc,bchw->bkhw", self.axes.to(x), x), BLOCK_PX)

    def decode(self, z: Tensor) -> Tensor:
        """[B, 48, h, w] -> [B, 3, 4 h, 4 w]."""
        return torch.einsum("ck,bkhw->bchw", self.inverse.to(z), F.pixel_shuffle(z, BLOCK_PX))


class UNet(Backbone):
    """The backbone: `DualUNet` and `LinearCodec`."""

    has_coarse = True
    exports_base = True  # the trunk is small and goes into every weight file
    decoder_halo = 0  # its codec decodes each patch by itself

    def __init__(self, config: UNetConfig, seed: int = 0, roles: Sequence[Role] = (STUDENT,)):
        """Raises ValueError if the trunk cannot be loaded, or if several trained roles share this base."""
        self.config, self.roles = config, tuple(roles)
        self.trains_base = any(role.trains == "adapter" for role in roles)
        self.check_sharing()
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "unet init"))
            net = DualUNet(config)
            for role in roles:
                net.add_parts(role, CHANNELS, config.noise_widths[-1])
        if config.base not in (None, "random"):
            load_trunk(config.base, net)
        for name, p in net.named_parameters():
            if not name.startswith("parts."):
                p.requires_grad_(self.trains_base and name.startswith("trunk.") == (config.train == "trunk"))
        self.net, self.codec = net, LinearCodec(config.sigma)
        self.latent_channels, self.downsample, self.patch_px = CHANNELS, BLOCK_PX, BLOCK_PX
        self.pixel_multiple = BLOCK_PX * 2 ** (len(config.noise_widths) - 1)
        self.tile_px = 512

    def encode(self, x: Tensor) -> Tensor:
        self.check_size(*x.shape[-2:])
        return self.codec.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.codec.decode(z)

    @torch.no_grad()
    def uncertainty(self, z_lq: Tensor) -> float:
        """Root mean square of the error that the trunk expects, over that of the detail in its coarse restoration.

        Detail is what differs from the mean of the 9x9 pixels around. Photographs have some 2 when they are clean, 3
        with the faults of a camera, 5 when they are heavily degraded.
        """
        coarse, log_sd = self.call(self.roles[0], "coarse", z_lq, z_lq.new_zeros(len(z_lq))).chunk(2, dim=1)
        sd = F.pixel_shuffle(log_sd.exp(), BLOCK_PX)
        missing = torch.einsum("ck,bkhw->bchw", self.codec.inverse.to(sd) ** 2, sd**2).mean().sqrt()
        grey = self.decode(coarse).float().mean(1, keepdim=True)
        detail = grey - F.avg_pool2d(grey, 9, stride=1, padding=4, count_include_pad=False)
        return float(missing / detail.square().mean().sqrt().clamp(min=1e-6))

    @classmethod
    def with_random_weights(cls, config: UNetConfig) -> UNetConfig:
        return replace(config, base=config.base and "random")

    @classmethod
    def inference_config(cls, config: UNetConfig, dtype: str | None, folder: Path) -> UNetConfig:
        return cls.with_random_weights(config)  # the weight file includes the trunk

    def to(self, device: torch.device, each: Callable[[nn.Module], Any] = lambda part: None) -> None:
        super().to(device, each)
        self.codec.to(device)


def load_trunk(source: str, net: DualUNet) -> None:
    """Load the trunk from the folder of a run or of an export, or from a shipped model of this name.

    Raises ValueError if it is missing, damaged or of another size.
    """
    try:
        _, file = find_weights(source)
        state = {k.removeprefix("trunk."): v for k, v in load_file(file).items() if k.startswith("trunk.")}
        net.trunk.load_state_dict(state)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"backbone.base = {source} cannot be loaded ({' '.join(str(error).split())[:200]}): give the folder of a "
            "run with backbone.train=trunk and the same trunk_width and trunk_depth"
        ) from None
