"""Frozen image codecs from diffusers' VAEs: what they share, and AutoencoderKL, which most image models use.

A codec normalises latents with the numbers of the VAE's config: AutoencoderKL has a scale and a shift for all channels
(Stable Diffusion 3 and Z-Image have both, Stable Diffusion 2 only the scale), Qwen-Image's VAE a mean and a standard
deviation for each (qwen_image/vae.py).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from teasr.backbones.prompts import load_part, vae_folder


class Codec(nn.Module):
    """Frozen codec between images [B, 3, H, W] in [-1, 1] and normalised latents [B, C, h, w], fp32.

    The buffers of a subclass are the numbers of its normalisation.
    """

    vae_class: ClassVar[type]  # diffusers' class
    downsample = 8  # image pixels per latent pixel, along each side
    decoder_halo: int | None = None  # as in `Backbone`

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, model: str, dtype: torch.dtype, key: str = "backbone.model") -> Self:
        """Load from a hub name, or from the local folder of a VAE or of a model with a VAE in vae/.

        `key`: the config key that names it. Raises ValueError if it is missing or incomplete.
        """
        return cls(load_part(cls.vae_class, key, model, vae_folder(model, key), dtype, "VAE"))

    def sha256(self) -> str:
        """Hash of the weights, rounded to bf16 so that it does not depend on the dtype, and of the normalisation."""
        tensors = {name: x.bfloat16() for name, x in self.vae.state_dict().items()}
        tensors |= dict(self.named_buffers(recurse=False))
        sha256 = hashlib.sha256()
        for name, x in sorted(tensors.items()):
            sha256.update(f"{name} {list(x.shape)}".encode())
            sha256.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return sha256.hexdigest()

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> the normalised mode of the posterior, [B, C, h, w] fp32."""

    def decode(self, z: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] fp32, differentiable and not clamped."""
        return self.decode_local(self.decode_global(z))

    def decode_global(self, z: Tensor) -> Tensor:
        """Run the part of the decoder that sees the whole picture."""
        return z

    @abstractmethod
    def decode_local(self, features: Tensor) -> Tensor:
        """Run the rest of the decoder, [..] -> [B, 3, H, W] fp32."""


class KLCodec(Codec):
    """AutoencoderKL: z = (mode of the posterior - shift) x scale.

    Its group norms see the whole picture, so that parts of a picture cannot be decoded by themselves.
    """

    vae_class = AutoencoderKL

    def __init__(self, vae: AutoencoderKL):
        super().__init__(vae)
        self.register_buffer(
            "scale", torch.tensor(float(vae.config.scaling_factor), dtype=torch.float32), persistent=False
        )
        self.register_buffer(
            "shift", torch.tensor(float(vae.config.shift_factor or 0), dtype=torch.float32), persistent=False
        )
        self.latent_channels = vae.config.latent_channels
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass instead of storing their activations."""
        return self.vae.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.vae.enable_gradient_checkpointing() if on else self.vae.disable_gradient_checkpointing()

    def encode(self, x: Tensor) -> Tensor:
        mode = self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.shift) * self.scale

    def decode_local(self, features: Tensor) -> Tensor:
        return self.vae.decode((features / self.scale + self.shift).to(self.vae.dtype)).sample.float()
