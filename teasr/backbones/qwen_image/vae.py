"""Qwen-Image's VAE converted to 2-D convolutions for single images, with activation checkpointing and without clamping.

For a single frame, only the last temporal tap of a causal 3-D convolution sees the image. Dropping the other taps
leaves a third of the parameters and of the computation, and the same result. The stock `decode` clamps to [-1, 1], and
clamped values have no gradient; this one does not clamp and is differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageResidualBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teasr.backbones.generic.codec import Codec


class LastTap(nn.Module):
    """2-D convolution equivalent to a causal Conv3d on one frame, [B, C, 1, H, W] -> [B, C', 1, H', W'].

    It uses the last temporal tap of the Conv3d's weight.
    """

    def __init__(self, conv: QwenImageCausalConv3d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight.data[:, :, -1].clone()), conv.bias
        self.stride, self.padding = conv.stride[1:], (conv._padding[2], conv._padding[0])

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, 0], self.weight, self.bias, self.stride, self.padding)[:, :, None]


class ResidualBlock(QwenImageResidualBlock):
    """The stock block, recomputed in the backward pass when `checkpointing` is set."""

    checkpointing = False

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


def to_2d(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Convert the VAE to 2-D in place: exact for single frames, unusable for video."""
    for module in list(vae.modules()):
        if hasattr(module, "time_conv"):
            del module.time_conv  # used only for frames after the first
        if isinstance(module, QwenImageResidualBlock):
            module.__class__ = ResidualBlock
        for name, child in list(module.named_children()):
            if isinstance(child, QwenImageCausalConv3d):
                setattr(module, name, LastTap(child))
    return vae


class QwenCodec(Codec):
    """Frozen codec between images and normalised latents."""

    vae_class = AutoencoderKLQwenImage

    def __init__(self, vae: AutoencoderKLQwenImage):
        """Build the codec from a VAE, which is converted to 2-D in place."""
        super().__init__(to_2d(vae))
        self.latent_channels = vae.config.z_dim
        for name in ("latents_mean", "latents_std"):
            self.register_buffer(
                name, torch.tensor(vae.config[name], dtype=torch.float32)[:, None, None], persistent=False
            )

    @property
    def checkpointing(self) -> bool:
        """Whether residual blocks are recomputed in the backward pass instead of storing their activations."""
        return any(m.checkpointing for m in self.vae.modules() if isinstance(m, ResidualBlock))

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for module in self.vae.modules():
            if isinstance(module, ResidualBlock):
                module.checkpointing = on

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> (mode of the posterior - mean) / standard deviation, [B, C, H / 8, W / 8] fp32."""
        moments = self.vae.quant_conv(self.vae.encoder(x[:, :, None].to(self._dtype)))
        return (moments.chunk(2, dim=1)[0][:, :, 0].float() - self.latents_mean) / self.latents_std

    def decode_global(self, z: Tensor) -> Tensor:
        """Run the part of the decoder with attention over the whole picture, [B, C, h, w] -> [B, C', 1, h, w]."""
        z = (z * self.latents_std + self.latents_mean)[:, :, None].to(self._dtype)
        return self.vae.decoder.mid_block(self.vae.decoder.conv_in(self.vae.post_quant_conv(z)))

    def decode_local(self, features: Tensor) -> Tensor:
        """Run the rest, whose layers see their surroundings only, [B, C', 1, h, w] -> [B, 3, 8 h, 8 w] fp32."""
        decoder, x = self.vae.decoder, features
        for block in decoder.up_blocks:
            x = block(x)
        return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))[:, :, 0].float()

    @property
    def decoder_halo(self) -> int:
        """How far `decode_local` sees, in latent pixels, rounded up.

        Its 3x3 convolutions see one pixel each at their own resolution: 2 in each of n + 1 residual blocks, and one at
        each doubling, so 2 (n + 1) (1 + 1/2 + 1/4 + ..) + 1/2 + 1/4 + .. pixels of the latent.
        """
        return 4 * (self.vae.config.num_res_blocks + 1) + 1

    @property
    def _dtype(self) -> torch.dtype:
        return self.vae.post_quant_conv.weight.dtype
