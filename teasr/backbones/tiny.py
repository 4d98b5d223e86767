"""A dual-branch diffusion transformer of about a million parameters, which runs the whole method on a laptop.

No pretrained weights are needed. It mirrors the 20B backbone: noise tokens run through the base weights at t_cur,
condition tokens through base weights plus LoRA at t_tar of either sign, and both attend to each other at shared
positions (TEASR sec. 3.4). Its codec is linear (PCA of 8x8 patches, fitted to the shards), and its output is
preconditioned so that it starts at the LQ image.

Shape legend: B batch, K branches (0 noise, 1 condition; a prior has only the noise branch), L tokens of one branch,
D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from teasr.backbones.base import Backbone, find_weights
from teasr.backbones.lora import add_branch_lora, branch, with_lora
from teasr.backbones.parts import RoleNet, sinusoid
from teasr.backbones.roles import DEFAULT_SET, STUDENT, Adapters, Role, blocks_seen
from teasr.diffusion.flow import per_sample
from teasr.util.seed import seed_of

PATCH_PX = 8  # side of a codec patch in pixels; one patch is one latent pixel and one token
ROPE_BASE = 20.0  # the lowest frequency has a period of about 90 tokens = 700 px
PLAIN_ATTENTION = 512**2  # bf16 on a CPU avoids the fused attention kernel up to this many queries x keys


@dataclass(frozen=True)
class TinyConfig:
    """Config of the tiny backbone.

    conditional: false omits the condition branch: an unconditional prior, trained with L_flow only, in the role that
    Qwen-Image has in the paper.
    base: the prior to start from: a folder (of a run, a checkpoint or `teasr export`), the name of a shipped prior,
    or `random` for explicitly random weights.
    codec: a prior, named as for `base`, whose codec is used instead of fitting a new one, so that the latents of both
    models are the same.
    train: `full` trains the base (both branches) and the LoRA of the condition branch; `lora` freezes the base.
    """

    latent_channels: int = 48  # number of principal components kept, out of 8x8x3 = 192
    width: Annotated[int, "[1, 65536]"] = 128
    depth: Annotated[int, "[1, 1024]"] = 4
    heads: Annotated[int, "[1, 1024]"] = 4
    mlp_ratio: Annotated[int, "[1, 64]"] = 4
    lora_rank: Annotated[int, "[1, 65536]"] = 16
    lora_alpha: Annotated[int, "[1, inf)"] = 16
    train: Literal["full", "lora"] = "full"
    base: str | None = None
    codec: str | None = None
    decoupled_timestep: bool = True  # false: both branches share the sum of both time embeddings (Table 3, row 1)
    output_skip: bool = True  # start at the LQ image; false: at the prior's mean
    conditional: bool = True
    # initial weight of a learned skip from each condition token's value to the noise token at the same position, added
    # to the attention output; null: none
    pair: float | None = None
    # exponent of the per-component scaling: 1 = unit variance each, 0 = one common scale
    whiten: Annotated[float, "[0, 1]"] = 0.5
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if not 1 <= self.latent_channels <= PATCH_PX * PATCH_PX * 3:
            raise ValueError(f"backbone.latent_channels = {self.latent_channels}: allowed are 1 to {PATCH_PX**2 * 3}")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"backbone.width = {self.width} and backbone.heads = {self.heads}: width / heads must be a whole "
                "number divisible by 4 (for rotary positions along two axes); try backbone.width=128 backbone.heads=4"
            )
        if self.train == "lora" and self.base is None:
            raise ValueError(
                "backbone.train = lora freezes the base, but backbone.base is not set: set it to the folder of a "
                "prior, or to random for an experiment without a prior"
            )
        if self.codec is not None and self.base not in (None, "random"):
            raise ValueError("a prior (backbone.base) has its own codec: remove backbone.codec")
        if not self.conditional and (
            self.train == "lora" or self.base not in (None, "random") or self.pair is not None
        ):
            raise ValueError(
                "backbone.conditional = false trains a prior from scratch: leave backbone.base, backbone.pair and "
                "backbone.train=lora out"
            )


class PCACodec(nn.Module):
    """Linear image codec: principal components of 8x8x3 patches, scaled to approximately unit variance."""

    def __init__(self, channels: int, whiten: float):
        super().__init__()
        self.channels, self.whiten = channels, whiten
        self.register_buffer("mean", torch.zeros(192))
        self.register_buffer("basis", torch.zeros(channels, 192))  # orthonormal rows
        self.register_buffer("scale", torch.zeros(channels))  # zero until fitted
        self.register_buffer("spread", torch.ones(channels))  # rms of z_hq
        self.register_buffer("residual", torch.ones(channels))  # rms of z_hq - z_lq, for the output skip

    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]], residual_only: bool = False) -> None:
        """Fit basis, scales and the HQ-LQ residual in float64 on pairs of images [3, H, W] in [-1, 1].

        residual_only: fit only the HQ-LQ residual and keep the rest, which comes from a prior trained without LQ
        images. Raises ValueError for fewer than 384 patches.
        """
        hq, lq = [], []
        for x_hq, x_lq in pairs:
            hq.append(_patches(x_hq[None]).flatten(0, 2).double())
            lq.append(_patches(x_lq[None]).flatten(0, 2).double())
        if not hq:
            raise ValueError("the codec cannot be fitted: the shards contain no images; check the shard folder")
        hq, lq = torch.cat(hq), torch.cat(lq)
        if len(hq) < 2 * 192:
            raise ValueError(
                f"the codec needs at least 384 patches of 8x8 px to be fitted, got {len(hq)}: make more shards"
            )
        if residual_only:
            self.residual.copy_(
                ((hq - lq) @ self.basis.T.double() / self.scale).square().mean(0).sqrt().clamp(min=1e-2)
            )
            return
        mean = hq.mean(0)
        variance, vectors = torch.linalg.eigh((hq - mean).T @ (hq - mean) / len(hq))
        basis = vectors.flip(1).T[: self.channels]
        basis = basis * torch.where(basis.sum(1, keepdim=True) < 0, -1.0, 1.0)  # fix the sign, which depends on LAPACK
        std = variance.flip(0)[: self.channels].clamp(min=1e-8).sqrt()
        scale = std**self.whiten
        scale = scale * ((std / scale).square().mean().sqrt())  # overall variance 1
        residual = (((hq - lq) @ basis.T) / scale).square().mean(0).sqrt().clamp(min=1e-2)
        fitted = {"mean": mean, "basis": basis, "scale": scale, "spread": std / scale, "residual": residual}
        for name, value in fitted.items():
            getattr(self, name).copy_(value)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, H/8, W/8]."""
        z = (_patches(x) - self.mean.to(x)) @ self.basis.to(x).T / self.scale.to(x)
        return z.permute(0, 3, 1, 2).contiguous()

    def decode(self, z: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, 8h, 8w]."""
        patches = (z.permute(0, 2, 3, 1) * self.scale.to(z)) @ self.basis.to(z) + self.mean.to(z)
        b, h, w, _ = patches.shape
        patches = patches.reshape(b, h, w, 3, PATCH_PX, PATCH_PX)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h * PATCH_PX, w * PATCH_PX)


def _patches(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H/8, W/8, 192]."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // PATCH_PX, PATCH_PX, w // PATCH_PX, PATCH_PX)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3)


def rotary_angles(h: int, w: int, head_width: int, device: torch.device) -> Tensor:
    """Angles [h w, head_width / 2] of two-axis rotary positions: the first half for rows, the second for columns."""
    n = head_width // 4
    freqs = ROPE_BASE ** (-torch.arange(n, device=device) / n)
    rows, cols = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.cat((rows.reshape(-1, 1) * freqs, cols.reshape(-1, 1) * freqs), dim=1)


def rotate(x_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions: rotate each pair (i, i + E/2) by its angle."""
    a, b = x_BHLE.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor) -> Tensor:
    """Softmax attention, using PyTorch's fused kernel except for small inputs in bf16 on a CPU.

    There the backward pass of the fused kernel is 6 times slower than two matrix products (docs/log.md).
    """
    small = q_BHLE.shape[-2] * k_BHLE.shape[-2] <= PLAIN_ATTENTION
    low = q_BHLE.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if q_BHLE.device.type == "cpu" and low and small:
        scores = q_BHLE @ k_BHLE.transpose(-1, -2) * q_BHLE.shape[-1] ** -0.5
        return scores.softmax(-1) @ v_BHLE
    return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE)


class DualBlock(nn.Module):
    """Transformer block over one or two token streams with separate modulation and one joint attention."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, pair: float | None = None):
        super().__init__()
        self.heads = heads
        self.mod = nn.Linear(width, 6 * width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)
        self.pair = None if pair is None else nn.Parameter(torch.full((heads, 1, 1), pair))

    def forward(
        self, x_BKLD: Tensor, temb_BKD: Tensor, cos: Tensor, sin: Tensor, adapters: Adapters, last: bool
    ) -> Tensor:
        """Map [B, K, L, D] to the same shape; with `last`, compute and return only the noise branch, [B, L, D]."""
        mod = branch(self.mod, F.silu(temb_BKD), adapters)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unsqueeze(2).chunk(6, dim=-1)
        y = modulate(x_BKLD, shift1, scale1)
        k, v = (self._heads(branch(layer, y, adapters).flatten(1, 2)) for layer in (self.to_k, self.to_v))
        noise = adapters.noise
        q = with_lora(self.to_q, y[:, 0], noise) if last else branch(self.to_q, y, adapters).flatten(1, 2)
        q, k = self.norm_q(self._heads(q)), self.norm_k(k)
        positions = cos.shape[0]
        q = rotate(q, cos[: q.shape[2]], sin[: q.shape[2]])
        k = rotate(k, cos[:positions], sin[:positions])
        attended = attend(q, k, v)
        if self.pair is not None and x_BKLD.shape[1] > 1:
            # A prior was not trained to attend to a second image, and learning this takes thousands of updates.
            n_tokens = x_BKLD.shape[2]
            condition = self.pair * v[:, :, n_tokens:]
            attended = attended + F.pad(condition, (0, 0, 0, attended.shape[2] - n_tokens))
        attended = attended.transpose(1, 2).flatten(2)
        if last:  # the condition tokens are no longer used: skip computations that would never receive a gradient
            x = x_BKLD[:, 0] + gate1[:, 0] * with_lora(self.to_out, attended, noise)
            y = modulate(x, shift2[:, 0], scale2[:, 0])
            hidden = F.gelu(with_lora(self.fc1, y, noise), approximate="tanh")
            return x + gate2[:, 0] * with_lora(self.fc2, hidden, noise)
        x = x_BKLD + gate1 * branch(self.to_out, attended.unflatten(1, (x_BKLD.shape[1], -1)), adapters)
        y = modulate(x, shift2, scale2)
        hidden = F.gelu(branch(self.fc1, y, adapters), approximate="tanh")
        return x + gate2 * branch(self.fc2, hidden, adapters)

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(2, (self.heads, -1)).transpose(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive LayerNorm: normalise the last axis, then scale and shift."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class TinyDiT(RoleNet):
    """The network: latents [B, C, h, w] and two times [B] -> velocity [B, C, h, w]."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        c, d = config.latent_channels, config.width
        self.img_in = nn.Linear(c, d)
        self.time_in, self.time_out = nn.Linear(d, d), nn.Linear(d, d)
        self.blocks = nn.ModuleList(
            DualBlock(d, config.heads, config.mlp_ratio, config.pair) for _ in range(config.depth)
        )
        self.norm_out, self.proj_out = nn.Linear(d, 2 * d), nn.Linear(d, c)
        for name in ("residual", "spread"):  # copies of the codec's buffers: the network is self-contained
            self.register_buffer(name, torch.ones(c))
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier initialisation, with gates near 1, non-zero modulation weights and a zero output layer.

        The zero output makes the network start at the LQ image. Gates start near 1, because with both gates and output
        at zero no block would receive a gradient for many updates. The modulation depends on time from the start: with
        zero modulation both branches start identical, and learning to distinguish the condition from the noise took
        twice as long. Queries and keys start with a large common bias, which rotary positions turn into attention to
        the same position in both branches; with random initialisation the network needs thousands of updates to find
        the condition (docs/log.md).
        """
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
                if name.endswith(".mod"):
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                if name in ("norm_out", "proj_out"):
                    nn.init.zeros_(layer.weight)
        for block in self.blocks:
            gate1, gate2 = block.mod.bias.data.chunk(6)[2::3]
            gate1.fill_(1.0)
            gate2.fill_(1.0)
            for layer in (block.to_q, block.to_k):
                layer.weight.data.mul_(0.3)
                layer.bias.data.unflatten(0, (block.heads, 2, -1))[:, 0].fill_(4.0)
            for norm in (block.norm_q, block.norm_k):
                norm.weight.data.fill_(3.0)

    def lora_targets(self, role: Role) -> str:
        """Return a regular expression that matches the Linears to adapt: all whose output for adapted tokens is used.

        Dual-branch roles adapt the condition tokens; in the last block only their keys and values are used.
        Single-branch roles adapt the noise tokens, in the blocks that the role uses.
        """
        last = (role.blocks or self.config.depth) - 1
        all_of_it = "(mod|to_q|to_k|to_v|to_out|fc1|fc2)"
        if role.branches == "single":
            return rf"img_in|blocks\.({'|'.join(map(str, range(last + 1)))})\.{all_of_it}"
        return rf"img_in|blocks\.(?!{last}\.)\d+\.{all_of_it}|blocks\.{last}\.(mod|to_k|to_v)"

    def time_embedding(self, t: Tensor, like: Tensor) -> Tensor:
        """Embed times [B] as [B, D]; the sinusoid is always in fp32, the result in the dtype of `like`."""
        embedding = sinusoid(t.float(), self.config.width).to(like.dtype)
        return self.time_out(F.silu(self.time_in(embedding)))

    def predict(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Tensor:
        """Predict the velocity at z_t; t_cur modulates the noise branch, t_tar (either sign) the condition branch.

        An unconditional network has only the noise branch and uses neither z_lq nor t_tar.
        """
        dual = role.branches == "dual" and self.config.conditional
        x, temb_cur = self._trunk(z_t, t_cur, z_lq if dual else None, t_tar, role.adapters, len(self.blocks))
        shift, scale = self.norm_out(F.silu(temb_cur)).unsqueeze(1).chunk(2, dim=-1)
        out = self.proj_out(modulate(x, shift, scale)).transpose(1, 2).unflatten(2, z_t.shape[-2:])
        if dual and self.config.output_skip:
            return precondition(out, z_t, t_cur, z_lq, self.residual)
        return precondition(out, z_t, t_cur, torch.zeros_like(z_t), self.spread)

    def features(self, z_t: Tensor, t_cur: Tensor, text: Tensor | None, role: Role) -> Tensor:
        """Return a feature map [B, D, h, w]."""
        x, _ = self._trunk(z_t, t_cur, None, None, role.adapters, role.blocks or len(self.blocks))
        return x.transpose(1, 2).unflatten(2, z_t.shape[-2:])

    def _trunk(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, adapters: Adapters, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """Return the noise tokens [B, L, D] after this many blocks, and the embedding of t_cur [B, D]."""
        h, w = z_t.shape[-2:]
        latents = (z_t,) if z_lq is None else (z_t, z_lq)
        times = (t_cur,) if t_tar is None else (t_cur, t_tar)
        embedded = self.time_embedding(torch.cat(times), z_t).chunk(len(times))
        if not self.config.decoupled_timestep:
            embedded = (sum(embedded[1:], embedded[0]),) * len(times)
        temb_BKD = torch.stack(embedded, dim=1)[:, : len(latents)]
        x = branch(self.img_in, torch.stack(latents, dim=1).flatten(3).transpose(2, 3), adapters)
        angles = rotary_angles(h, w, self.config.width // self.config.heads, z_t.device).repeat(len(latents), 1)
        cos, sin = angles.cos().to(z_t.dtype), angles.sin().to(z_t.dtype)
        for i in range(blocks):
            arguments = (self.blocks[i], x, temb_BKD, cos, sin, adapters, i == blocks - 1)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = recompute(*arguments, use_reentrant=False)
            else:
                x = arguments[0](*arguments[1:])
        return x, embedded[0]


def precondition(out: Tensor, z_t: Tensor, t_cur: Tensor, start: Tensor, sigma_C: Tensor) -> Tensor:
    """Precondition the network's output: return the best linear velocity estimate plus the scaled output.

    The estimate is based on z_t and on a first guess `start` of z0 whose error has standard deviation sigma per
    channel. The output is scaled to the remaining standard deviation.
    With d = z0 - start ~ N(0, sigma^2) and y = z_t - (1 - t) start = (1 - t) d + t eps, the posterior mean of
    v = eps - z0 is y (t - (1 - t) sigma^2) / n - start and its variance is sigma^2 / n, where
    n = (1 - t)^2 sigma^2 + t^2. At t = 1 and a zero output, the one-step estimate (TEASR eq. 6) is exactly `start`: the
    LQ image, or the mean of a prior.
    """
    t, sigma2 = per_sample(t_cur.to(z_t.dtype), z_t), per_sample(sigma_C.to(z_t.dtype) ** 2, z_t[0])
    n = (1 - t) ** 2 * sigma2 + t**2
    y = z_t - (1 - t) * start
    return y * (t - (1 - t) * sigma2) / n - start + (sigma2 / n).sqrt() * out


@contextmanager
def loading(setting: str, source: str, cure: str) -> Iterator[None]:
    """Context manager that turns an error of reading weights into a ValueError that names the setting and the cure."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"backbone.{setting} = {source} cannot be loaded ({' '.join(str(error).split())[:200]}): {cure}, or the "
            "name of a prior that ships with teasr"
        ) from None


def load_codec(source: str, codec: PCACodec) -> None:
    """Load the codec of the prior `source`, a folder or the name of a shipped prior.

    Raises ValueError if it is missing, damaged or of another size.
    """
    with loading("codec", source, "give the folder of a model with the same backbone.latent_channels"):
        codec.load_state_dict(load_file(find_weights(source)[0] / "fixed.safetensors"))


def load_prior(source: str, net: TinyDiT, codec: PCACodec) -> None:
    """Load a prior's weights and codec from its folder or from a shipped prior of this name.

    Raises ValueError if they are missing, damaged or of different sizes.
    """
    with loading("base", source, "give the folder of a prior of this size"):
        folder, file = find_weights(source)
        codec.load_state_dict(load_file(folder / "fixed.safetensors"))
        found = net.load_state_dict(load_file(file), strict=False)
    missing = [key for key in found.missing_keys if key not in ("residual", "spread") and not key.endswith(".pair")]
    wrong = [*found.unexpected_keys, *missing]
    if wrong:
        raise ValueError(
            f"backbone.base = {source} is not a prior (a model trained with backbone.conditional=false) of this size: "
            f"tensor {wrong[0]} is unexpected or missing"
        )


class Tiny(Backbone):
    """The tiny backbone: `TinyDiT` and its linear codec."""

    exports_base = True  # a tiny base does not need a separate file
    decoder_halo = 0  # its codec decodes each patch by itself

    def __init__(self, config: TinyConfig, seed: int = 0, roles: Sequence[Role] = (STUDENT,)):
        self.config, self.roles = config, tuple(roles)
        self.trains_base = config.train == "full" and any(role.trains == "adapter" for role in roles)
        self.check_sharing()
        self.codec = PCACodec(config.latent_channels, config.whiten).requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "tiny init"))
            net = TinyDiT(config)
            if config.base == "random":  # a frozen zero output layer would block the LoRA's gradient
                nn.init.xavier_uniform_(net.proj_out.weight)
            elif config.base is not None:
                load_prior(config.base, net, self.codec)
            if config.codec is not None:
                load_codec(config.codec, self.codec)
            if seen := blocks_seen(roles):  # later blocks and the output layer are not used
                net.blocks, net.norm_out, net.proj_out = net.blocks[:seen], None, None
            for name, p in net.named_parameters():
                dual = any(role.branches == "dual" and role.trains == "adapter" for role in roles)
                p.requires_grad_(dual if name.endswith(".pair") else self.trains_base)  # `pair` joins two branches
            for role in roles:
                self._add_role(net, role, seed)
        self.net = net
        self.needs_fit, self.restores = True, config.conditional
        self.has_prior = config.base is not None
        self.latent_channels = config.latent_channels
        self.downsample = self.pixel_multiple = self.patch_px = PATCH_PX
        self.tile_px = 192  # trained on 64 px crops; on a CPU, attention dominates the time for larger tiles

    def _add_role(self, net: TinyDiT, role: Role, seed: int) -> None:
        """Add the role's LoRA set and parts; the student's continue the random number stream of the network."""
        if role.blocks is not None and not 1 <= role.blocks <= self.config.depth:
            raise ValueError(
                f"role {role.name} uses {role.blocks} blocks: this backbone allows 1 to {self.config.depth}"
            )
        if role.adapter_set != DEFAULT_SET:
            torch.manual_seed(seed_of(seed, "role", role.name))
        if role.adapter_set and (self.config.conditional or role.branches == "single"):
            rank = role.rank or self.config.lora_rank
            alpha = self.config.lora_alpha * rank / self.config.lora_rank
            add_branch_lora(net, net.lora_targets(role), rank, alpha, role.adapter_set)
        net.add_parts(role, self.config.latent_channels, self.config.width)

    def encode(self, x: Tensor) -> Tensor:
        self.check_size(*x.shape[-2:])
        return self.codec.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.codec.decode(z)

    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.codec.fit(pairs, residual_only=bool(self.codec.scale.any()))
        self._fitted()

    def _fitted(self) -> None:
        self.net.residual.copy_(self.codec.residual)
        self.net.spread.copy_(self.codec.spread)
        self.needs_fit = False

    def memory_groups(self) -> dict[str, Iterable[Tensor]]:
        return super().memory_groups() | {"codec": [*self.codec.buffers()]}

    @classmethod
    def with_random_weights(cls, config: TinyConfig) -> TinyConfig:
        return replace(config, base=config.base and "random", codec=None)

    def to(self, device: torch.device, each: Callable[[nn.Module], Any] = lambda part: None) -> None:
        super().to(device, each)
        self.codec.to(device)

    @classmethod
    def inference_config(cls, config: TinyConfig, dtype: str | None, folder: Path) -> TinyConfig:
        return cls.with_random_weights(config)  # the export includes the base weights

    def fixed_state(self) -> dict[str, Tensor]:
        return self.codec.state_dict()

    def load_fixed_state(self, state: dict[str, Tensor]) -> None:
        if missing := self.codec.state_dict().keys() - state.keys():
            raise ValueError(f"there is no fitted codec in it ({', '.join(sorted(missing))} are missing)")
        self.codec.load_state_dict(state)
        self._fitted()

    def share_codec(self, other: Backbone) -> None:
        super().share_codec(other)
        if not self.codec.scale.any():
            self.codec.load_state_dict(other.fixed_state())
        elif not all(torch.equal(getattr(self.codec, n), getattr(other.codec, n)) for n in ("mean", "basis", "scale")):
            raise ValueError(
                f"prior.base = {self.config.base} and backbone.base = {other.config.base} were trained with "
                "different codecs, so their latents are not comparable: use a prior that was trained with the codec "
                "of the backbone"
            )
        self._fitted()
