"""Stable Diffusion 2.1 as a one-step restoration model: LoRA sets on the U-Net, and inside the VAE's encoder.

A student starts from the LQ latent in the place of the noised one, as in OSEDiff, D3SR and TADSR. The weights come from
the hub or from the local folder of a diffusers model (`unet/`, `vae/`, `scheduler/`), the prompt embeddings from files
written by `teasr cache-prompt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from teasr.backbones.base import Backbone
from teasr.backbones.generic.codec import KLCodec
from teasr.backbones.generic.config import DiffusersConfig
from teasr.backbones.generic.model import DiffusersModel
from teasr.backbones.prompts import cannot_load, model_name
from teasr.backbones.roles import Role
from teasr.backbones.sd_unet import network
from teasr.backbones.sd_unet.encoder import EncoderAdapter
from teasr.diffusion import sd_times
from teasr.diffusion.flow import per_sample

SCHEDULE = {  # the noise schedule of Stable Diffusion 1 and 2, which sd_times.py maps to times
    "beta_schedule": "scaled_linear",
    "beta_start": sd_times.FIRST_BETA,
    "beta_end": sd_times.LAST_BETA,
    "num_train_timesteps": sd_times.INDICES,
}


@dataclass(frozen=True)
class SdUnetConfig(DiffusersConfig):
    """Config of the Stable Diffusion backbone; of its LoRA, the defaults are those of OSEDiff and TADSR.

    `transformer` has the sizes of the U-Net.
    """

    lora_rank: Annotated[int, "[1, 65536]"] = 4  # also of the LoRA in the encoder
    lora_alpha: Annotated[int, "[1, inf)"] = 8
    # what the U-Net predicts; null: what the model's scheduler/ says (2.1-base: epsilon, 2.1: v_prediction)
    prediction: network.Prediction | None = None

    def __post_init__(self):
        super().__post_init__()
        for key in ("quantise", "swap_blocks", "compile", "host_checkpoints"):
            if getattr(self, key):
                raise ValueError(
                    f"backbone.{key} = {getattr(self, key)}: the backbone sd_unet has no such mode, since its frozen "
                    f"weights take 1.8 GiB: leave backbone.{key} out"
                )


class SdUnet(DiffusersModel):
    """The backbone: `SdNet` and the VAE's codec."""

    dtypes = ("bf16", "fp32")
    devices = ("cpu", "cuda")  # times are looked up in float64, which Apple GPUs do not have
    tile_px = 512  # the size that Stable Diffusion 2.1-base was trained on
    transformer_class = network.BlockedUNet
    codec_class = KLCodec
    network_folder = "unet"
    prompt_tokens = 77
    lora_seed = "sd lora"
    published: ClassVar = {
        "transformer": {
            "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": {
            "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 768,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    }  # fmt: skip

    def _net(self, transformer: network.BlockedUNet, prompt_BTD: Tensor) -> network.SdNet:
        levels = len(transformer.down_blocks)
        self.downsample = self.patch_px = self.codec.downsample
        self.pixel_multiple = self.downsample * 2 ** (levels - 1)
        return network.SdNet(transformer, prompt_BTD, self._prediction(), self._encoder_adapter)

    def _prediction(self) -> network.Prediction:
        """Return what the U-Net predicts. Raises ValueError for a model of another kind or noise schedule."""
        config = self.config
        if config.prediction is not None or config.model == "random":
            return config.prediction or "epsilon"
        try:
            scheduler = DDIMScheduler.load_config(model_name(config.model, "backbone.model"), subfolder="scheduler")
        except (OSError, ValueError) as error:
            raise cannot_load("backbone.model", config.model, error) from error
        found = {key: scheduler.get(key) for key in SCHEDULE}
        prediction = scheduler.get("prediction_type", "epsilon")
        if found != SCHEDULE or scheduler.get("rescale_betas_zero_snr") or prediction == "sample":
            raise ValueError(
                f"backbone.model = {config.model}: its scheduler has {found} and prediction_type {prediction}, but "
                f"sd_unet needs {SCHEDULE} and epsilon or v_prediction: use Stable Diffusion 2.1-base or 2.1"
            )
        return prediction

    def _add_role(self, role: Role) -> None:
        if role.branches == "dual":
            raise ValueError(
                f"role {role.name} has a second branch of tokens for the LQ image, which the U-Net of sd_unet cannot "
                "have: set method.student=single, or use the backbone tiny, unet or qwen_image"
            )
        super()._add_role(role)

    def _encoder_adapter(self, role: Role) -> EncoderAdapter:
        rank = role.rank or self.config.lora_rank
        return EncoderAdapter(self.codec, rank, self.config.lora_alpha / self.config.lora_rank, role.timed)

    def lora_targets(self, branches: Literal["dual", "single"], blocks: int | None = None) -> str:
        return network.lora_targets(self.net.unet, blocks)

    def text_width(self, transformer: network.BlockedUNet) -> int:
        return transformer.config.cross_attention_dim

    def feature_channels(self, role: Role) -> int:
        widths = self.net.unet.config.block_out_channels
        return (*widths, widths[-1])[(role.blocks or 0) - 1]

    def memory_group(self, name: str) -> str:
        return "U-Net"

    def encoder_input(self, x: Tensor) -> Tensor:
        self.check_size(*x.shape[-2:])
        return F.pixel_unshuffle(x, self.downsample)

    @property
    def encoder_channels(self) -> int:
        return 3 * self.downsample**2

    def codec_sha256(self) -> str:
        if any(role.encoder for role in self.roles):
            raise ValueError(
                "data.latents: this method trains the encoder, so that latents of the LQ images cannot be cached: "
                "remove data.latents"
            )
        return super().codec_sha256()

    def start_from(self, z_lq: Tensor, t: Tensor) -> Tensor:
        """Return z_lq / (a + s): the U-Net then sees z_lq itself in the place of a state, as in the papers."""
        return z_lq / per_sample(sd_times.scale_of(t), z_lq).to(z_lq.device)

    def time_at(self, u: Tensor) -> Tensor:
        """Return the times of the indices 1000 u."""
        return sd_times.time_of(sd_times.INDICES * u)

    def snap(self, t: Tensor) -> Tensor:
        """Round to the time of the nearest index; the last one, 999, is at 0.936."""
        return sd_times.time_of(sd_times.index_of(t).round())

    def offload(self, device: torch.device) -> None:
        Backbone.offload(self, device)

    @classmethod
    def inference_config(cls, config: SdUnetConfig, dtype: str | None, folder: Path) -> SdUnetConfig:
        return replace(super().inference_config(config, None, folder), **({} if dtype is None else {"dtype": dtype}))

    def to(self, device: torch.device, each: Callable[[nn.Module], Any] = lambda part: None) -> None:
        """Move to the device; views of the network are made again where it is."""
        self.net.views.clear()
        super().to(device, each)

    def _prepare(self, device: torch.device, each: Callable[[nn.Module], Any]) -> None:
        self._place("vae", self.codec, device)
        self._place("unet", self.net.unet, device, "unet.")
        self.net.to(device)
        self.prepared, self.pending_weights = True, {}
