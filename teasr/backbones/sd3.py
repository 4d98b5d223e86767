"""Stable Diffusion 3.5-medium (2.2 B) and 3-medium: diffusers' transformer with a condition branch (TEASR sec. 3.4).

Condition tokens are a second set of image tokens with the positions of the noise tokens and their own time; they join
the noise tokens in both attentions of a block (3.5 has a second one, over image tokens alone, in its first half). The
network multiplies times by 1000 and embeds them in fp32, so times of either sign are exact.

A prompt embedding is one tensor [1 + T, width]: the first row is the pooled embedding of the two CLIP encoders, padded
with zeros, the others are the tokens of CLIP and of T5.

Deviation: the patch embedding is a convolution and has no LoRA; TSD-SR adapts it, and text layers, too.

Shape legend: B batch, C latent channels (16), h w latent pixels, L tokens of 2x2 latent pixels, T text tokens, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from teasr.backbones.generic.codec import KLCodec
from teasr.backbones.generic.config import DiffusersConfig
from teasr.backbones.generic.model import DiffusersModel
from teasr.backbones.generic.network import Attention, DualBlock, DualBranch, heads, rms
from teasr.backbones.lora import with_lora
from teasr.backbones.memory.sweeps import Pass, Tokens
from teasr.backbones.roles import STUDENT, Adapters


@dataclass(frozen=True)
class SD3Config(DiffusersConfig):
    """Config of Stable Diffusion 3.5-medium, or 3-medium: its weights, its LoRA, and how much memory they take."""


class JointAttention(Attention):
    """Attention over [noise, text, condition] tokens, or [noise, condition] without text."""

    def __call__(
        self,
        attn: nn.Module,
        x_BLD: Tensor,
        text_BTD: Tensor | None,
        cond_BLD: Tensor | None,
        adapters: Adapters,
        last: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the outputs of noise, text and condition tokens; the latter two are None in the last block."""
        split, parts = functools.partial(heads, attn), []
        for tokens, name in ((x_BLD, adapters.noise), (cond_BLD, adapters.condition)):
            if tokens is not None:
                q = None if last and tokens is cond_BLD else rms(attn.norm_q, split(with_lora(attn.to_q, tokens, name)))
                k = rms(attn.norm_k, split(with_lora(attn.to_k, tokens, name)))
                parts.append((q, k, split(with_lora(attn.to_v, tokens, name))))
        if text_BTD is not None:
            q = rms(attn.norm_added_q, split(attn.add_q_proj(text_BTD)))
            k = rms(attn.norm_added_k, split(attn.add_k_proj(text_BTD)))
            parts.insert(1, (q, k, split(attn.add_v_proj(text_BTD))))
        q, k, v = (torch.cat([y for y in group if y is not None], dim=1) for group in zip(*parts, strict=True))
        n, t = x_BLD.shape[1], 0 if text_BTD is None else text_BTD.shape[1]
        out = self.attend(q, k, v)
        out_x = with_lora(attn.to_out[0], out[:, :n].contiguous(), adapters.noise)
        if last:
            return out_x, None, None
        out_t = attn.to_add_out(out[:, n : n + t].contiguous()) if t else None
        if cond_BLD is None:
            return out_x, out_t, None
        return out_x, out_t, with_lora(attn.to_out[0], out[:, n + t :].contiguous(), adapters.condition)


class DualBranchBlock(DualBlock, JointTransformerBlock):
    """One block over noise, text and condition tokens."""

    def compute(
        self,
        x_BLD: Tensor,
        text_BTD: Tensor,
        cond_BLD: Tensor | None,
        *,
        temb_cur_BD: Tensor,
        temb_tar_BD: Tensor | None,
        adapters: Adapters,
        last: bool,
    ) -> Tokens:
        """Return the noise, text and condition tokens after the block.

        last: only the resulting noise tokens will be used; the others are returned unchanged.
        """
        streams = {"x": (x_BLD, temb_cur_BD, adapters.noise), "c": (cond_BLD, temb_tar_BD, adapters.condition)}
        mod = {key: self._modulation(temb, name) for key, (y, temb, name) in streams.items() if y is not None}
        normed = {key: self.norm1.norm(streams[key][0]) for key in mod}
        if self.context_pre_only:  # the last block of the stock model
            text, gates = self.norm1_context(text_BTD, temb_cur_BD), ()
        else:
            text, *gates = self.norm1_context(text_BTD, emb=temb_cur_BD)
        first = {key: normed[key] * (1 + m[1]) + m[0] for key, m in mod.items()}
        out_x, out_t, out_c = self.attn.processor(self.attn, first["x"], text, first.get("c"), adapters, last)
        x, c = x_BLD + mod["x"][2] * out_x, cond_BLD
        if out_c is not None:
            c = cond_BLD + mod["c"][2] * out_c
        if self.attn2 is not None:
            second = {key: normed[key] * (1 + m[7]) + m[6] for key, m in mod.items()}
            out_x, _, out_c = self.attn2.processor(self.attn2, second["x"], None, second.get("c"), adapters, last)
            x = x + mod["x"][8] * out_x
            c = c if out_c is None else c + mod["c"][8] * out_c
        x = self._feed_forward(x, mod["x"], adapters.noise)
        if last:
            return x, text_BTD, cond_BLD
        if c is not None:
            c = self._feed_forward(c, mod["c"], adapters.condition)
        return x, self._text(text_BTD, out_t, *gates), c

    def _modulation(self, temb_BD: Tensor, name: str | None) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of attention and of the MLP, and of the second attention, each [B, 1, D]."""
        mod = with_lora(self.norm1.linear, F.silu(temb_BD), name)
        return mod.unsqueeze(1).chunk(9 if self.use_dual_attention else 6, dim=2)

    def _feed_forward(self, x_BLD: Tensor, mod: tuple[Tensor, ...], name: str | None) -> Tensor:
        """Add the output of the image MLP with this LoRA set."""
        up, _, down = self.ff.net
        y = self.norm2(x_BLD) * (1 + mod[4]) + mod[3]
        return x_BLD + mod[5] * with_lora(down, F.gelu(with_lora(up.proj, y, name), approximate="tanh"), name)

    def _text(self, text: Tensor, out: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor) -> Tensor:
        """Add the outputs of attention and of the text MLP to the text tokens."""
        text = text + gate.unsqueeze(1) * out
        y = self.norm2_context(text) * (1 + scale[:, None]) + shift[:, None]
        return text + gate_mlp.unsqueeze(1) * self.ff_context(y)


class SD3Transformer(DualBranch, SD3Transformer2DModel):
    """The dual-branch transformer; it loads the weights of the stock model unchanged."""

    _repeated_blocks: ClassVar = ["DualBranchBlock"]
    _no_split_modules: ClassVar = ["DualBranchBlock"]

    @functools.wraps(SD3Transformer2DModel.__init__)  # otherwise from_pretrained drops the config
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.upgrade()

    def upgrade(self) -> None:
        for block in self.transformer_blocks:
            block.__class__ = DualBranchBlock
            for attn in filter(None, (block.attn, block.attn2)):
                attn.processor = JointAttention()

    def begin(
        self,
        z_BChw: Tensor,
        t_cur: Tensor,
        text_BTD: Tensor,
        cond: Tensor | None = None,
        t_tar: Tensor | None = None,
        adapters: Adapters = STUDENT.adapters,
        blocks: int | None = None,
    ) -> Pass:
        """Return a call up to the first block.

        text_BTD: the pooled embedding, padded, as the first row, and the tokens.
        """
        pooled = text_BTD[:, 0, : self.config.pooled_projection_dim]
        text = self.context_embedder(text_BTD[:, 1:])
        x, temb_cur = self.pos_embed(z_BChw).contiguous(), self.time_embedding(t_cur, pooled)
        c = None if cond is None else self.pos_embed(cond).contiguous()
        temb_tar = None if cond is None else self.time_embedding(t_tar, pooled)
        last = (blocks or len(self.blocks)) - 1
        h, w, p = z_BChw.shape[-2] // 2, z_BChw.shape[-1] // 2, self.config.patch_size

        def others(i: int) -> dict[str, Any]:
            return {"temb_cur_BD": temb_cur, "temb_tar_BD": temb_tar, "adapters": adapters, "last": i == last}

        def end(tokens: Tokens) -> Tensor:
            if blocks is not None:
                return tokens[0]
            out = self.proj_out(self.norm_out(tokens[0], temb_cur)).unflatten(2, (p, p, -1)).unflatten(1, (h, w))
            return torch.einsum("nhwpqc->nchpwq", out).reshape(len(out), -1, h * p, w * p)

        return Pass((x, text, c), others, end)

    def time_embedding(self, t: Tensor, pooled_BP: Tensor) -> Tensor:
        """Embed times [B] fp32 of either sign, with the pooled text: [B, D]."""
        embed = self.time_text_embed
        time = embed.timestep_embedder(embed.time_proj(1000 * t.float()).to(pooled_BP.dtype))
        return time + embed.text_embedder(pooled_BP)


class SD3(DiffusersModel):
    """The backbone: `SD3Transformer`, and AutoencoderKL with its scale and shift."""

    transformer_class, codec_class = SD3Transformer, KLCodec
    prompt_tokens = 1 + 77 + 256  # pooled, CLIP, T5
    published: ClassVar = {
        "transformer": {  # stabilityai/stable-diffusion-3.5-medium
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        "vae": {
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
            "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    }  # fmt: skip

    def lora_targets(self, branches: Literal["dual", "single"], blocks: int | None = None) -> str:
        last = (blocks or len(self.net.transformer.blocks)) - 1
        all_of_it = r"attn2?\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm1\.linear"
        if branches == "single":
            return rf"transformer_blocks\.({'|'.join(map(str, range(last + 1)))})\.({all_of_it})"
        inner = rf"transformer_blocks\.(?!{last}\.)\d+\.({all_of_it})"
        return rf"{inner}|transformer_blocks\.{last}\.(attn2?\.(to_k|to_v)|norm1\.linear)"

    def memory_group(self, name: str) -> str:
        if ".norm1" in name:
            return "modulation"
        text = ("add_", "_context", "context_embedder", "text_embedder", "prompt")
        return "text path" if any(part in name for part in text) else "image path"
