"""LoRA inside the encoder of Stable Diffusion's VAE (OSEDiff), and its modulation by the student's time (TADSR).

The VAE keeps its frozen weights, which also encode originals and decode. The adapter belongs to the trained network and
runs the encoder with its own LoRA and, if it is time-aware, with a scale and a shift after the second norm of each
residual block. All of it starts without an effect.
"""

from __future__ import annotations

import math
import re

import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from teasr.backbones.lora import LoraConv, LoraLinear, with_replaced
from teasr.backbones.parts import sinusoid
from teasr.diffusion import sd_times

LAYERS = r"encoder\.(conv_in|conv_out|.*\.(conv1|conv2|conv_shortcut|conv|to_q|to_k|to_v|to_out\.0))|quant_conv"
SINUSOID, EMBEDDING = 128, 256  # widths of the time's sinusoid and of its embedding, as published


class LayerLora(nn.Module):
    """A LoRA beside a frozen Linear or Conv2d, which it does not own."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        if isinstance(layer, nn.Conv2d):
            how = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
            self.lora_A = LoraConv(layer.in_channels, rank, **how, bias=False)
            self.lora_B = LoraConv(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_A = LoraLinear(layer.in_features, rank, bias=False)
            self.lora_B = LoraLinear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y, the layer's output for x, plus that of the LoRA."""
        return self.lora_B(self.lora_A(x), onto=y, scale=self.scale)


class Adapted(nn.Module):
    """A frozen layer with its LoRA, in the place of the layer."""

    def __init__(self, layer: nn.Module, lora: LayerLora):
        super().__init__()
        self.layer, self.lora = layer, lora

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its LoRA."""
        return self.lora(x, self.layer(x))


class Modulated(nn.Module):
    """A norm followed by a scale and a shift [B, 2 C], in the place of the norm."""

    def __init__(self, norm: nn.Module, film: Tensor):
        super().__init__()
        self.norm, self.film = norm, film

    def forward(self, x: Tensor) -> Tensor:
        """Apply the norm, the scale and the shift."""
        scale, shift = self.film.to(x.dtype)[..., None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class EncoderAdapter(nn.Module):
    """The VAE's encoder with the LoRA and the modulation of one role."""

    def __init__(self, codec: nn.Module, rank: int, scale: float, timed: bool):
        """codec: a `KLCodec`. scale: alpha / rank of the LoRA. timed: modulate by the time."""
        super().__init__()
        self._codec = (codec,)  # inside a tuple, so that its frozen weights are no part of the trained network
        vae: AutoencoderKL = codec.vae
        layers = {path: layer for path, layer in vae.named_modules() if re.fullmatch(LAYERS, path)}
        self.lora = nn.ModuleDict({_key(path): LayerLora(layer, rank, scale) for path, layer in layers.items()})
        self.timed = timed
        if timed:
            self.embed = nn.Sequential(nn.Linear(SINUSOID, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
            self.film = nn.ModuleDict({_key(path): _film(block) for path, block in _blocks(vae)})

    def forward(self, patches: Tensor, t: Tensor) -> Tensor:
        """Map LQ images, their 8x8 pixels as channels [B, 192, h, w], and times [B] to latents [B, C, h, w], fp32."""
        codec = self._codec[0]
        vae: AutoencoderKL = codec.vae
        modules = dict(vae.named_modules())
        replaced = {modules[_path(key)]: Adapted(modules[_path(key)], lora) for key, lora in self.lora.items()}
        if self.timed:
            share = sd_times.index_of(t.float()) / sd_times.INDICES
            embedding = F.silu(self.embed(sinusoid(share, SINUSOID)))
            for key, film in self.film.items():
                norm = modules[_path(key)].norm2
                replaced[norm] = Modulated(norm, film(embedding))
        adapted = with_replaced(vae, replaced)
        x = F.pixel_shuffle(patches, codec.downsample).to(vae.dtype)
        mode = adapted.quant_conv(adapted.encoder(x)).chunk(2, dim=1)[0]
        return (mode.float() - codec.shift) * codec.scale


def _blocks(vae: AutoencoderKL) -> list[tuple[str, ResnetBlock2D]]:
    """The residual blocks of the encoder, by name."""
    found = vae.named_modules()
    return [(path, m) for path, m in found if path.startswith("encoder.") and isinstance(m, ResnetBlock2D)]


def _film(block: ResnetBlock2D) -> nn.Linear:
    film = nn.Linear(EMBEDDING, 2 * block.out_channels)
    nn.init.zeros_(film.weight)
    nn.init.zeros_(film.bias)
    return film


def _key(path: str) -> str:
    """Return a layer's name as a key of a ModuleDict, which must not contain dots."""
    return path.replace(".", "/")


def _path(key: str) -> str:
    return key.replace("/", ".")
