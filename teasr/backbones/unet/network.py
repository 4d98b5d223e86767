"""The network of the small backbone: trunk, dual-branch U-Net, and the preconditioning that joins them.

Everything works on the grid of 4x4 px blocks: 48 channels per block, three colour axes of 16 pixels each. There is no
attention and no normalisation over positions, so that tiles of any size give the same result, and there are no
transposed convolutions: the last layer writes all pixels of a block, and a small convolution at full resolution
follows, so that no group of pixels is made alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.backbones.parts import RoleNet, sinusoid
from teasr.backbones.roles import Role
from teasr.diffusion.flow import per_sample

BLOCK_PX = 4  # side of the pixel block of one latent position
CHANNELS = 3 * BLOCK_PX**2
EMBEDDING = 128  # width of time embeddings
SPREAD = (2.8, 1.9, 1.2)  # standard deviation of clean latents by colour axis, for networks without an LQ image
LOG_SD_RANGE = (-4.0, 1.5)  # of the predicted log standard deviation of the residual, in latent units


class Conv2d(nn.Conv2d):
    """A convolution in channels-last layout, in which a CPU trains this network a quarter faster."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


def conv(inputs: int, outputs: int, kernel: int = 3, zero: bool = False) -> Conv2d:
    """A convolution that keeps the size; `zero`: with zero weights."""
    layer = Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    if zero:
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """x + conv(silu(FiLM(conv(rms_norm(x))))), both 3x3; the second convolution starts at zero."""

    def __init__(self, width: int, film: bool = True):
        super().__init__()
        self.first, self.second = conv(width, width), conv(width, width, zero=True)
        self.norm = nn.Parameter(torch.ones(width, 1, 1)) if film else None
        self.film = nn.Linear(EMBEDDING, 2 * width) if film else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, D, h, w], temb [B, EMBEDDING] -> [B, D, h, w]."""
        if self.film is None:
            return x + self.second(F.silu(self.first(x)))
        y = x * (x.float().square().mean(1, keepdim=True) + 1e-4).rsqrt().to(x.dtype) * self.norm.to(x.dtype)
        scale, shift = self.film(temb)[..., None, None].chunk(2, dim=1)
        return x + self.second(F.silu(self.first(y) * (1 + scale) + shift))


class ToBlocks(nn.Module):
    """Output layer: features [B, D, h, w] -> blocks of pixels [B, 48, h, w], smoothed across their borders.

    Two 3x3 convolutions at full resolution follow. All weights start at zero.
    """

    def __init__(self, width: int):
        super().__init__()
        self.out = conv(width, CHANNELS, zero=True)
        self.tail = nn.Sequential(conv(3, 12), nn.SiLU(), conv(12, 3, zero=True))

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.pixel_shuffle(self.out(x), BLOCK_PX)
        return F.pixel_unshuffle(pixels + self.tail(pixels), BLOCK_PX)


class Trunk(nn.Module):
    """Predict a coarse restoration and the standard deviation of what it misses, from the LQ image alone."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.first = conv(CHANNELS, width)
        self.blocks = nn.ModuleList(Residual(width, film=False) for _ in range(depth))
        self.to_image, self.to_log_sd = ToBlocks(width), conv(width, 3, zero=True)

    def forward(self, z_lq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_lq [B, 48, h, w] -> coarse restoration and log standard deviation [B, 48, h, w], features [B, D, h, w].

        The standard deviation has one value per block and colour axis, interpolated to the pixels.
        """
        x = y = self.first(z_lq)
        for block in self.blocks:
            x = block(x)
        x = x + y
        log_sd = F.interpolate(self.to_log_sd(x).float(), scale_factor=BLOCK_PX, mode="bilinear")
        log_sd = F.pixel_unshuffle(log_sd.clamp(*LOG_SD_RANGE), BLOCK_PX)
        return z_lq + self.to_image(x).to(z_lq.dtype), log_sd, x


class Level(nn.Module):
    """One resolution of both branches: residual blocks with their own times, then an exchange in both directions.

    The noise branch receives the condition at the same position; what it sends back starts at zero. The `last` level
    sends nothing back, because the condition branch ends there.
    """

    def __init__(self, noise: int, condition: int, depth: int, last: bool):
        super().__init__()
        self.noise = nn.ModuleList(Residual(noise) for _ in range(depth))
        self.condition = nn.ModuleList(Residual(condition) for _ in range(depth))
        self.to_noise = conv(condition, noise, 1)
        self.to_condition = None if last else conv(noise, condition, 1, zero=True)

    def forward(
        self, n: Tensor, c: Tensor | None, temb_n: Tensor, temb_c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return both branches, [B, D, h, w] each; the condition is None for a network without an LQ image."""
        if c is not None:
            for block in self.condition:
                c = block(c, temb_c)
            n = n + self.to_noise(c)
        for block in self.noise:
            n = block(n, temb_n)
        return n, c if c is None or self.to_condition is None else c + self.to_condition(n)


class TimeEmbedding(nn.Module):
    """Times [B] in [-1, 1] -> [B, EMBEDDING]; the sign of the time reaches the sine half of the sinusoid."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))

    def forward(self, t: Tensor) -> Tensor:
        return F.silu(self.layers(sinusoid(t.float(), EMBEDDING).to(self.layers[0].weight.dtype)))


class DualUNet(RoleNet):
    """The network: latents [B, 48, h, w] and two times [B] -> velocity [B, 48, h, w]; h and w are multiples of 4."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n, c, depth = config.noise_widths, config.condition_widths, config.depth
        self.trunk = Trunk(config.trunk_width, config.trunk_depth)
        self.time_cur, self.time_tar = TimeEmbedding(), TimeEmbedding()
        self.noise_in, self.condition_in = conv(CHANNELS, n[0]), conv(config.trunk_width, c[0])
        self.levels = nn.ModuleList(Level(n[i], c[i], depth, i == len(n) - 1) for i in range(len(n)))
        self.down = nn.ModuleList(
            nn.ModuleList((conv(4 * n[i], n[i + 1], 1), conv(4 * c[i], c[i + 1], 1))) for i in range(len(n) - 1)
        )
        self.up = nn.ModuleList(conv(n[i + 1], n[i], 1) for i in range(len(n) - 1))
        self.after = nn.ModuleList(nn.ModuleList(Residual(width) for _ in range(depth)) for width in n[:-1])
        self.to_blocks = ToBlocks(n[0])
        self.register_buffer("spread", torch.tensor(SPREAD).repeat_interleave(BLOCK_PX**2), persistent=False)
        self._memo: tuple[Tensor, tuple, tuple[Tensor, Tensor, Tensor]] | None = None

    def coarse(self, z_lq: Tensor) -> Tensor:
        return torch.cat(self._trunk(z_lq)[:2], dim=1)

    def _trunk(self, z_lq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The trunk's output. A frozen trunk is evaluated once per LQ latent: the last result is kept."""
        trained = any(p.requires_grad for p in self.trunk.parameters())
        if trained or z_lq.is_inference() or torch.compiler.is_exporting():
            return self.trunk(z_lq)
        if self._memo is None or self._memo[1] != _identity(z_lq):
            with torch.no_grad():  # keeping z_lq keeps its memory, so that no other latent can have its address
                self._memo = z_lq, _identity(z_lq), self.trunk(z_lq)
        return self._memo[2]

    def predict(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Tensor:
        """Predict the velocity at z_t; t_cur modulates the noise branch, t_tar (either sign) the condition branch."""
        if z_lq is None:
            start, sd, features = torch.zeros_like(z_t), per_sample(self.spread, z_t[0]).expand_as(z_t[0]), None
        else:
            start, log_sd, features = self._trunk(z_lq)
            sd = log_sd.exp()
        y, n = residual_state(z_t, t_cur, start, sd)
        out = self._draw(y / n.sqrt(), t_cur, features, t_tar)
        return velocity_of(out.to(z_t.dtype), y, n, t_cur, start, sd)

    def features(self, z_t: Tensor, t_cur: Tensor, text: Tensor | None, role: Role) -> Tensor:
        """Return the noise branch after level `role.blocks`, [B, D, h', w']; there is no LQ image."""
        y, n = residual_state(z_t, t_cur, torch.zeros_like(z_t), per_sample(self.spread, z_t[0]).expand_as(z_t[0]))
        return self._encode(y / n.sqrt(), None, self.time_cur(t_cur), None, role.blocks or len(self.levels))[-1]

    def _draw(self, x: Tensor, t_cur: Tensor, features: Tensor | None, t_tar: Tensor | None) -> Tensor:
        temb_n, temb_c = self.time_cur(t_cur), None if t_tar is None else self.time_tar(t_tar)
        if temb_c is not None and not self.config.decoupled_timestep:
            temb_n = temb_c = temb_n + temb_c
        condition = None if features is None else self.condition_in(features)
        *skips, x = self._encode(x, condition, temb_n, temb_c, len(self.levels))
        for i in reversed(range(len(skips))):
            x = skips[i] + self.up[i](F.interpolate(x, scale_factor=2, mode="bilinear"))
            for block in self.after[i]:
                x = block(x, temb_n)
        return self.to_blocks(x)

    def _encode(self, x: Tensor, c: Tensor | None, temb_n: Tensor, temb_c: Tensor | None, levels: int) -> list[Tensor]:
        """Return the noise branch after each of the first levels."""
        x, outputs = self.noise_in(x), []
        for i in range(levels):
            if i:
                down_n, down_c = self.down[i - 1]
                x, c = down_n(F.pixel_unshuffle(x, 2)), None if c is None else down_c(F.pixel_unshuffle(c, 2))
            x, c = self.levels[i](x, c, temb_n, temb_c)
            outputs.append(x)
        return outputs


def _identity(z: Tensor) -> tuple:
    """What is equal for two tensors in the same memory that was not written in between."""
    return z.data_ptr(), z.shape, z.stride(), z.dtype, z._version


def residual_state(z_t: Tensor, t_cur: Tensor, start: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = z_t - (1 - t) start, the noised residual, and its variance n = (1 - t)^2 sd^2 + t^2."""
    t = per_sample(t_cur.to(z_t.dtype), z_t)
    return z_t - (1 - t) * start, (1 - t) ** 2 * sd.to(z_t.dtype) ** 2 + t**2


def velocity_of(out: Tensor, y: Tensor, n: Tensor, t_cur: Tensor, start: Tensor, sd: Tensor) -> Tensor:
    """Return the best linear estimate of the velocity plus the scaled output of the network.

    With z0 = start + d, d ~ N(0, sd^2) and y = (1 - t) d + t eps, the posterior mean of v = eps - z0 is
    y (t - (1 - t) sd^2) / n - start and its standard deviation is sd / sqrt(n). At t = 1 and a zero output, the
    one-step estimate (TEASR eq. 6) is exactly `start`. Where sd is small, the result stays near `start` at any noise.
    """
    t, sd = per_sample(t_cur.to(y.dtype), y), sd.to(y.dtype)
    return y * (t - (1 - t) * sd**2) / n - start - sd / n.sqrt() * out
