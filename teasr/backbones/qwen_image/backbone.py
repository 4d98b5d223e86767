"""Qwen-Image (20 B) as a dual-branch restoration model: diffusers' transformer and VAE, LoRA on the condition branch.

Loading, memory, LoRA files and prompts are those of every backbone on diffusers (backbones/generic/). The two
branches with decoupled timesteps follow TEASR sec. 3.4.
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
from teasr.backbones.qwen_image.modulation import ModulationTable
from teasr.backbones.qwen_image.transformer import DualBranchTransformer, lora_targets
from teasr.backbones.qwen_image.vae import QwenCodec


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


class QwenImage(DiffusersModel):
    """The backbone: `DualBranchTransformer` and the VAE's codec."""

    transformer_class, codec_class = DualBranchTransformer, QwenCodec
    lora_seed = "qwen lora"
    described = ("lora_rank", "lora_alpha", "rope", "cond_attention")

    def lora_targets(self, branches: Literal["dual", "single"], blocks: int | None = None) -> str:
        return lora_targets(self.net.transformer, branches, blocks)

    def _net(self, transformer: DualBranchTransformer, prompt_BTD: Tensor) -> DiffusersNet:
        transformer.rope, transformer.cond_attention = self.config.rope, self.config.cond_attention
        return super()._net(transformer, prompt_BTD)

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
