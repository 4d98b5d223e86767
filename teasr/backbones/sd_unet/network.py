"""Stable Diffusion's U-Net as a network of velocities, for several roles with LoRA sets of their own.

At index i of its schedule the U-Net knows states a z0 + s eps with a = sqrt(alpha_bar_i), s = sqrt(1 - alpha_bar_i).
Divided by a + s they lie on the straight path of a rectified flow at t = s / (a + s), where each prediction gives a
velocity:

    epsilon       v = (eps - z_t) / (1 - t)
    v_prediction  v = (2 t - 1) (a + s)^2 z_t + (a + s) u      from the U-Net's own velocity u = a eps - s z0

Shape legend: B batch, C latent channels, h w latent pixels, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from teasr.backbones.lora import view
from teasr.backbones.parts import RoleNet
from teasr.backbones.roles import Role
from teasr.diffusion import sd_times
from teasr.diffusion.flow import per_sample

Prediction = Literal["epsilon", "v_prediction"]


class BlockedUNet(UNet2DConditionModel):
    """diffusers' U-Net; its blocks, for roles that end early, are those of the way down and then the middle one."""

    checkpoints = None  # the inputs of recomputed blocks stay on the device

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that a role may end after, in order."""
        return [*self.down_blocks, self.mid_block]

    @property
    def inner_dim(self) -> int:
        """Width of the first block."""
        return self.config.block_out_channels[0]

    def keep(self, blocks: int) -> None:
        """Remove what is after the first `blocks` blocks, which no role uses."""
        self.down_blocks, self.up_blocks = self.down_blocks[:blocks], nn.ModuleList()
        self.conv_norm_out, self.conv_out = None, nn.Identity()


class SdNet(RoleNet):
    """The network: latents and a time -> velocity. It holds the U-Net and the prompt embeddings."""

    def __init__(
        self,
        unet: BlockedUNet,
        prompt_BTD: Tensor,
        prediction: Prediction,
        adapter: Callable[[Role], nn.Module],
    ):
        """adapter: builds the encoder adapter of a role."""
        super().__init__()
        self.unet, self.prediction, self.adapter = unet, prediction, adapter
        self.register_buffer("prompt", prompt_BTD, persistent=False)
        self.register_buffer("null_prompt", None, persistent=False)
        self.views: dict[str | None, BlockedUNet] = {}

    @property
    def transformer(self) -> BlockedUNet:
        """The U-Net, under the name that backbones on diffusers have for their network."""
        return self.unet

    def view_of(self, role: Role) -> BlockedUNet:
        """Return the U-Net with this role's LoRA set."""
        if role.adapter_set not in self.views:
            self.views[role.adapter_set] = view(self.unet, role.adapter_set)
        return self.views[role.adapter_set]

    def encoder_adapter(self, role: Role, latent_channels: int) -> nn.Module:
        return self.adapter(role)

    def predict(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Tensor:
        """Map latents [B, C, h, w] and times [B] fp32 to the velocity; times count as those of the nearest index."""
        index, t, x = self._inputs(z_t, t_cur)
        out = self.view_of(role)(x, index, self._text(text, z_t), return_dict=False)[0].to(z_t.dtype)
        if self.prediction == "epsilon":
            return (out - z_t) / (1 - t)
        scale = sd_times.scale_of(t)
        return (2 * t - 1) * scale.square() * z_t + scale * out

    def features(self, z_t: Tensor, t_cur: Tensor, text: Tensor | None, role: Role) -> Tensor:
        """Return a feature map [B, D, h', w'] after block `role.blocks`: those of the way down, then the middle one."""
        unet, (index, _, x), text = self.view_of(role), self._inputs(z_t, t_cur), self._text(text, z_t)
        last = role.blocks or len(unet.blocks)
        temb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=index))
        x = unet.conv_in(x)
        for block in unet.blocks[:last]:
            crossed = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            x = block(hidden_states=x, temb=temb, **crossed)
            x = x[0] if isinstance(x, tuple) else x  # blocks of the way down return what they pass to the way up, too
        return x

    def _inputs(self, z_t: Tensor, t_cur: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest indices [B], their times [B, 1, 1, 1], and the states in the scale of the U-Net."""
        index = sd_times.index_of(t_cur.float()).round().long()
        t = per_sample(sd_times.time_of(index.float()), z_t).to(z_t.dtype)
        return index, t, (z_t * sd_times.scale_of(t)).to(self.prompt.dtype)

    def _text(self, text: Tensor | None, z_t: Tensor) -> Tensor:
        text = self.prompt if text is None else text.to(self.prompt.dtype)
        return text.expand(len(z_t), -1, -1)


LAYERS = (
    r"attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out|conv1|conv2|conv_shortcut"
    r"|(down|up)samplers\.0\.conv"
)


def lora_targets(unet: BlockedUNet, blocks: int | None = None) -> str:
    """Return a regular expression that matches the layers to adapt, as OSEDiff: attention, convolutions, feed-forward.

    blocks: those that the first `blocks` blocks use (default: all, with the way up).

    Deviation: OSEDiff trains the whole first convolution besides; here it has a LoRA like the others, because roles on
    one base share its weights.
    """
    if blocks is None:
        return rf"conv_in|conv_out|(down_blocks|mid_block|up_blocks)\..*\.({LAYERS})"
    down = "|".join(str(i) for i in range(min(blocks, len(unet.down_blocks))))
    middle = rf"|mid_block\..*\.({LAYERS})" if blocks == len(unet.blocks) else ""
    return rf"conv_in|down_blocks\.({down})\..*\.({LAYERS}){middle}"
