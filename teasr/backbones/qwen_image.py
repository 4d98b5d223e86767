"""Qwen-Image (20 B) as a dual-branch restorer: diffusers' own transformer and VAE, LoRA on the condition branch alone.

Weights come from the hub or a local folder of a diffusers model (`transformer/`, `vae/`); the prompt's embedding from the file that
data_prep/cache_prompt.py wrote, so that the text encoder is never loaded here. Two branches, decoupled timesteps: TEASR sec. 3.4.

Shape legend: B batch, C latent channels (16), h w latent pixels, L tokens of 2x2 latent pixels, P = 4 C, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from teasr.backbones.base import Backbone
from teasr.backbones.branch_lora import add_branch_lora
from teasr.backbones.dual_branch import DualBranchTransformer, lora_targets
from teasr.backbones.qwen_vae import QwenCodec
from teasr.prompts import DTYPES, load_part, load_prompt
from teasr.seed import seed_of


@dataclass(frozen=True)
class QwenImageConfig:
    """Which weights, and how the branches are joined."""

    model: str  # local folder of a diffusers Qwen-Image model, or its name on the hub
    prompt: str  # file of the prompt's embedding, by data_prep/cache_prompt.py
    lora_rank: int = 128
    lora_alpha: int = 128
    # independent: condition tokens see condition tokens alone
    cond_attention: Literal["joint", "independent"] = "joint"
    # positions of condition tokens: those of the noise, or a frame on
    rope: Literal["shared", "frame_offset"] = "shared"
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the frozen weights; the LoRA is fp32
    gradient_checkpointing: bool = True
    attention_backend: str | None = None  # one of diffusers'; default: PyTorch's own choice

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ValueError(f"backbone.lora_rank = {self.lora_rank}: must be >= 1")


class QwenNet(nn.Module):
    """The network that is trained: latents and two times -> velocity. Holds the transformer and the prompt."""

    def __init__(self, transformer: DualBranchTransformer, prompt_TD: Tensor, config: QwenImageConfig):
        super().__init__()
        self.transformer, self.config = transformer, config
        self.register_buffer("prompt", prompt_TD, persistent=False)

    def forward(self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor, t_tar: Tensor) -> Tensor:
        """z [B, C, h, w], times [B] fp32 -> v [B, C, h, w]."""
        h, w = z_t.shape[-2] // 2, z_t.shape[-1] // 2
        dtype = self.prompt.dtype
        v = self.transformer(
            pack(z_t).to(dtype),
            t_cur,
            self.prompt.expand(z_t.shape[0], -1, -1),
            (h, w),
            cond=pack(z_lq).to(dtype),
            t_tar=t_tar,
            rope=self.config.rope,
            cond_attention=self.config.cond_attention,
        )
        return unpack(v, h, w)


def pack(z: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, L, P], channel-major inside a token, as diffusers' pipeline has it."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, L, P] of h x w tokens -> [B, C, 2 h, 2 w]."""
    b, _, p = tokens.shape
    z = tokens.reshape(b, h, w, p // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, p // 4, 2 * h, 2 * w)


class QwenImage(Backbone):
    """The backbone: `QwenNet` and the VAE's codec."""

    def __init__(self, config: QwenImageConfig, seed: int = 0):
        """ValueError when weights or prompt are missing, incomplete or do not fit each other."""
        self.config = config
        dtype = DTYPES[config.dtype]
        embeds, mask, _ = load_prompt(Path(config.prompt).expanduser())
        if mask is not None:
            raise ValueError(f"backbone.prompt = {config.prompt} holds a padded prompt: make it again with one prompt")
        transformer = load_part(DualBranchTransformer, "backbone.model", config.model, "transformer", dtype, "weights")
        if embeds.shape[1] != transformer.config.joint_attention_dim:
            raise ValueError(
                f"backbone.prompt = {config.prompt} has {embeds.shape[1]} numbers a token, {config.model} takes "
                f"{transformer.config.joint_attention_dim}: make it with this model by data_prep/cache_prompt.py"
            )
        if config.attention_backend:
            transformer.set_attention_backend(config.attention_backend)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "qwen lora"))
            add_branch_lora(transformer, lora_targets(transformer), config.lora_rank, config.lora_alpha)
        for name, parameter in transformer.named_parameters():
            trained = "lora_" in name
            parameter.requires_grad_(trained)
            if trained:
                parameter.data = parameter.data.float()
        self.net = QwenNet(transformer, embeds[None].to(dtype), config)
        self.codec = QwenCodec.from_pretrained(config.model, dtype)
        self.codec.checkpointing = config.gradient_checkpointing
        self.latent_channels = transformer.config.in_channels // 4
        self.downsample, self.pixel_multiple, self.patch_px = 8, 16, 16

    def encode(self, x: Tensor) -> Tensor:
        self.check_size(*x.shape[-2:])
        return self.codec.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.codec.decode(z)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.codec.to(device)
