"""Qwen-Image (20 B) as a dual-branch restoration model: diffusers' transformer and VAE, LoRA on the condition branch.

Loading, memory, LoRA files and prompts are those of every backbone on diffusers (backbones/generic/). The two
branches with decoupled timesteps follow TEASR sec. 3.4.

Shape legend: B batch, C latent channels (16), h w latent pixels, L tokens of 2x2 latent pixels, P = 4 C, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from teasr.backbones.generic.config import DiffusersConfig
from teasr.backbones.generic.model import DiffusersModel
from teasr.backbones.generic.network import DiffusersNet
from teasr.backbones.memory.sweeps import Pass, Sweeps, Tokens
from teasr.backbones.qwen_image.modulation import ModulationTable
from teasr.backbones.qwen_image.transformer import DualBranchTransformer, lora_targets
from teasr.backbones.qwen_image.vae import QwenCodec
from teasr.backbones.roles import Adapters, Role


@dataclass(frozen=True)
class QwenImageConfig(DiffusersConfig):
    """Config of the Qwen-Image backbone: its weights and how its branches are joined."""

    # independent: condition tokens attend only to condition tokens
    cond_attention: Literal["joint", "independent"] = "joint"
    # positions of condition tokens: the same as the noise tokens, or those of the next frame
    rope: Literal["shared", "frame_offset"] = "shared"
    # number of steps of the modulation table (in host memory), which replaces a third of the weights; null: no table
    modulation_table: Annotated[int, "[1, 1000000]", "such as 1000, or null for no table"] | None = 1000

    def __post_init__(self):
        super().__post_init__()
        if self.modulation_table is not None and self.modulation_table < 1:
            raise ValueError(
                f"backbone.modulation_table = {self.modulation_table}: must be a number of time steps >= 1, such as "
                "1000, or null for no table"
            )


class QwenNet(DiffusersNet):
    """The network: latents and two times -> velocity. It holds the transformer and the prompt embedding."""

    def run(
        self,
        z_t: Tensor,
        t_cur: Tensor,
        z_lq: Tensor | None,
        t_tar: Tensor | None,
        text_BTD: Tensor,
        adapters: Adapters,
        blocks: int | None = None,
    ) -> Tensor:
        """Return the velocity [B, C, h, w], or the noise tokens [B, L, D] after `blocks` blocks if that is given."""
        out = self.transformer(*self._inputs(z_t, t_cur, z_lq, t_tar, text_BTD, adapters), blocks)
        return unpack(out, z_t.shape[-2] // 2, z_t.shape[-1] // 2) if blocks is None else out

    def begin(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Pass:
        """Return the call of `predict` with these arguments as one that can share its sweep with others."""
        transformer = self.transformer
        inputs = self._inputs(z_t, t_cur, z_lq, t_tar, self._text(text, z_t), role.adapters)
        tokens, others = transformer.begin(*inputs)

        def through(i: int, tokens: Tokens) -> Tokens:
            return transformer.blocks[i].compute(*tokens, **others(i))

        def end(tokens: Tokens) -> Tensor:
            v = unpack(transformer.end(tokens, others), z_t.shape[-2] // 2, z_t.shape[-1] // 2)
            return v if v.dtype == z_t.dtype else v.float()

        return Pass(tokens, through, end)

    def _inputs(self, z_t, t_cur, z_lq, t_tar, text_BTD, adapters: Adapters) -> tuple:
        """Return the arguments of the transformer, in order."""
        grid, dtype = (z_t.shape[-2] // 2, z_t.shape[-1] // 2), text_BTD.dtype
        cond = None if z_lq is None else pack(z_lq).to(dtype)
        settings = self.config.rope, self.config.cond_attention, adapters
        return pack(z_t).to(dtype), t_cur, text_BTD, grid, cond, t_tar, *settings


def pack(z: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, L, P], channel-major within a token, as in diffusers' pipeline."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, L, P] of h x w tokens -> [B, C, 2 h, 2 w]."""
    b, _, p = tokens.shape
    z = tokens.reshape(b, h, w, p // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, p // 4, 2 * h, 2 * w)


class QwenImage(DiffusersModel):
    """The backbone: `QwenNet` and the VAE's codec."""

    transformer_class, codec_class, net_class = DualBranchTransformer, QwenCodec, QwenNet
    lora_seed = "qwen lora"
    described = ("lora_rank", "lora_alpha", "rope", "cond_attention")

    def lora_targets(self, branches: Literal["dual", "single"], blocks: int | None = None) -> str:
        return lora_targets(self.net.transformer, branches, blocks)

    def sweeps(self) -> Sweeps:
        if self.config.compile or not self.config.gradient_checkpointing:
            raise ValueError(
                "method.order = blocks recomputes each block, which must not be compiled: set "
                "backbone.gradient_checkpointing=true and backbone.compile=false, or method.order=losses"
            )
        transformer = self.network.transformer
        return Sweeps(transformer.blocks, self.network.begin, transformer.checkpoints)

    def snap(self, t: Tensor) -> Tensor:
        """Round to the times of the modulation table, so that time embedding and noise level agree."""
        steps = self.config.modulation_table
        return t if steps is None else (t.double() * steps).round().div(steps).to(t.dtype)

    def memory_group(self, name: str) -> str:
        if "_mod." in name:
            return "modulation"
        if any(part in name for part in ("txt_", ".add_", "to_add_out", "norm_added", "prompt")):
            return "text path"
        return "image path"

    def memory_groups(self) -> dict[str, Iterable[Tensor]]:
        groups = super().memory_groups()
        if table := self.net.transformer.modulation:
            groups["host: modulation table"] = [table.image, table.text]
        return groups

    def block_preparation(self, device: torch.device) -> Callable[[int, nn.Module], None]:
        """Tabulate the modulation of each block, if the config asks for it."""
        transformer, steps = self.net.transformer, self.config.modulation_table
        if steps is None:
            return super().block_preparation(device)
        dtype = self.net.prompt.dtype
        table = ModulationTable(steps, len(transformer.blocks), transformer.inner_dim, dtype, device)
        with torch.no_grad():
            temb = transformer.time_embedding(table.times.to(device))
        transformer.modulation = table
        return lambda i, block: table.take(i, block, temb)
