"""Qwen-Image's transformer with two image branches and decoupled timesteps (TEASR sec. 3.4), on diffusers' own classes.

The modules and state-dict keys are those of the stock model, with no additional parameters. Noise and text tokens run
at t_cur, and optional condition tokens at t_tar of either sign; all tokens attend to one another. The LoRA sets for
noise and for condition tokens are passed to every block as an argument (`Adapters`). There are no masks, hooks or
global state, so activation checkpointing recomputes exactly what the first forward pass computed.

Shape legend: B batch, C latent channels (16), h w latent pixels, L noise tokens of 2x2 latent pixels (and equally many
condition tokens), P = 4 C, T text tokens, D width, H heads, E head width.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn

from teasr.backbones.generic.network import Attention, DualBlock, DualBranch, heads, rms
from teasr.backbones.lora import add_lora, base, with_lora
from teasr.backbones.memory.sweeps import Pass, Tokens
from teasr.backbones.qwen_image.modulation import ModulationTable, Rows
from teasr.backbones.roles import STUDENT, Adapters


class DualBranchAttention(Attention, QwenDoubleStreamAttnProcessor2_0):
    """Joint attention over [text, noise, condition] tokens through diffusers' attention dispatcher."""

    def __call__(
        self,
        attn: nn.Module,
        x_BLD: Tensor,
        text_BTD: Tensor,
        cond_BLD: Tensor | None,
        rope: Tensor,
        independent: bool,
        last: bool,
        adapters: Adapters,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the attention outputs of noise, text and condition tokens.

        rope: complex [T + 2 L, E / 2], for text, noise and condition tokens. The text and condition outputs are None
        in the last block.
        """
        split = functools.partial(heads, attn)
        lx, lc = adapters.noise, adapters.condition
        q = [rms(attn.norm_added_q, split(attn.add_q_proj(text_BTD)))]
        k = [rms(attn.norm_added_k, split(attn.add_k_proj(text_BTD)))]
        v = [split(attn.add_v_proj(text_BTD))]
        for tokens, name in ((x_BLD, lx), (cond_BLD, lc)):
            if tokens is not None:
                k.append(rms(attn.norm_k, split(with_lora(attn.to_k, tokens, name))))
                v.append(split(with_lora(attn.to_v, tokens, name)))
                if tokens is x_BLD or not last:
                    q.append(rms(attn.norm_q, split(with_lora(attn.to_q, tokens, name))))
        q, k, v = torch.cat(q, 1), torch.cat(k, 1), torch.cat(v, 1)
        q, k = (apply_rotary_emb_qwen(y, rope[: y.shape[1]], use_real=False) for y in (q, k))
        t, n = text_BTD.shape[1], text_BTD.shape[1] + x_BLD.shape[1]
        has_cond = q.shape[1] > n
        if has_cond and independent:
            out, out_c = self.attend(q[:, :n], k, v), self.attend(q[:, n:], k[:, n:], v[:, n:])
        else:
            out = self.attend(q, k, v)
            out_c = out[:, n:].contiguous()
        out_x = with_lora(attn.to_out[0], out[:, t:n].contiguous(), lx)
        if last:
            return out_x, None, None
        out_t = attn.to_add_out(out[:, :t].contiguous())
        return out_x, out_t, with_lora(attn.to_out[0], out_c, lc) if has_cond else None


class DualBranchBlock(DualBlock, QwenImageTransformerBlock):
    """One block over noise, text and condition tokens."""

    def compute(
        self,
        x_BLD: Tensor,
        text_BTD: Tensor,
        cond_BLD: Tensor | None,
        *,
        temb_cur_BD: Tensor,
        temb_tar_BD: Tensor | None,
        rope: Tensor,
        independent: bool,
        rows: Rows | None,
        adapters: Adapters,
        last: bool,
    ) -> Tokens:
        """Return the noise, text and condition tokens after the block.

        rows: the block's modulation, if it comes from a table. last: only the resulting noise tokens will be used, so
        the computation of the others is skipped and they are returned unchanged.
        """
        lx, lc = adapters.noise, adapters.condition
        if rows is None:
            y_cur = F.silu(temb_cur_BD)
            mod_c = None if cond_BLD is None else base(self.img_mod[1], F.silu(temb_tar_BD))
            rows = base(self.img_mod[1], y_cur), self.txt_mod[1](y_cur), mod_c
        mod_x = rows[0] if lx is None else add_lora(self.img_mod[1], F.silu(temb_cur_BD), rows[0], lx)
        mod_x1, mod_x2 = mod_x.chunk(2, dim=-1)
        mod_t1, mod_t2 = rows[1].chunk(2, dim=-1)
        y_x, gate_x = self._modulate(self.img_norm1(x_BLD), mod_x1)
        y_t, gate_t = self._modulate(self.txt_norm1(text_BTD), mod_t1)
        y_c = None
        if cond_BLD is not None:
            mod_c1, mod_c2 = add_lora(self.img_mod[1], F.silu(temb_tar_BD), rows[2], lc).chunk(2, dim=-1)
            y_c, gate_c = self._modulate(self.img_norm1(cond_BLD), mod_c1)
        out_x, out_t, out_c = self.attn.processor(self.attn, y_x, y_t, y_c, rope, independent, last, adapters)
        x_BLD = x_BLD + gate_x * out_x
        y_x, gate_x = self._modulate(self.img_norm2(x_BLD), mod_x2)
        x_BLD = x_BLD + gate_x * self._mlp(y_x, lx)
        if last:
            return x_BLD, text_BTD, cond_BLD
        text_BTD = text_BTD + gate_t * out_t
        y_t, gate_t = self._modulate(self.txt_norm2(text_BTD), mod_t2)
        text_BTD = text_BTD + gate_t * self.txt_mlp(y_t)
        if cond_BLD is not None:
            cond_BLD = cond_BLD + gate_c * out_c
            y_c, gate_c = self._modulate(self.img_norm2(cond_BLD), mod_c2)
            cond_BLD = cond_BLD + gate_c * self._mlp(y_c, lc)
        return x_BLD, text_BTD, cond_BLD

    def _mlp(self, y_BLD: Tensor, name: str | None) -> Tensor:
        """Apply the image MLP with this LoRA set."""
        first, _, second = self.img_mlp.net
        return with_lora(second, F.gelu(with_lora(first.proj, y_BLD, name), approximate="tanh"), name)


class DualBranchTransformer(DualBranch, QwenImageTransformer2DModel):
    """The dual-branch transformer; it loads the weights of the stock model unchanged."""

    _repeated_blocks: ClassVar = ["DualBranchBlock"]
    _no_split_modules: ClassVar = ["DualBranchBlock"]
    modulation: ModulationTable | None = None  # replaces the blocks' own modulation layers if set
    # positions of condition tokens: those of the noise tokens, or of the next frame
    rope: Literal["shared", "frame_offset"] = "shared"
    # independent: condition tokens attend only to each other; all others attend to them as well
    cond_attention: Literal["joint", "independent"] = "joint"

    @functools.wraps(QwenImageTransformer2DModel.__init__)  # otherwise from_pretrained drops the config
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.upgrade()

    def upgrade(self) -> None:
        for block in self.transformer_blocks:
            block.__class__ = DualBranchBlock
            processor = DualBranchAttention()
            processor._attention_backend = block.attn.processor._attention_backend
            block.attn.processor = processor

    def time_embedding(self, t: Tensor) -> Tensor:
        """Embed times [B] fp32 of either sign: [B, D].

        The sinusoid is computed in fp32; diffusers would round t to the network's dtype first.
        """
        embed = self.time_text_embed
        return embed.timestep_embedder(embed.time_proj(t.float()).to(self.proj_out.weight.dtype))

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
        """Return a call up to the first block."""
        x, c = with_lora(self.img_in, pack(z_BChw), adapters.noise), None
        text, temb_cur, temb_tar = self.txt_in(self.txt_norm(text_BTD)), self.time_embedding(t_cur), None
        if cond is not None:
            c, temb_tar = with_lora(self.img_in, pack(cond), adapters.condition), self.time_embedding(t_tar)
        h, w = z_BChw.shape[-2] // 2, z_BChw.shape[-1] // 2
        rope, last = self._rope(h, w, text.shape[1], x.device), (blocks or len(self.blocks)) - 1
        tabulated = self.modulation.rows(t_cur, t_tar) if self.modulation else [None] * len(self.blocks)
        independent = self.cond_attention == "independent"

        def others(i: int) -> dict[str, Any]:
            return {
                "temb_cur_BD": temb_cur, "temb_tar_BD": temb_tar, "rope": rope, "rows": tabulated[i],
                "independent": independent, "adapters": adapters, "last": i == last,
            }  # fmt: skip

        def end(tokens: Tokens) -> Tensor:
            if blocks is not None:
                return tokens[0]
            return unpack(self.proj_out(self.norm_out(tokens[0], temb_cur)), h, w)

        return Pass((x, text, c), others, end)

    def _rope(self, h: int, w: int, text: int, device: torch.device) -> Tensor:
        """Return the rotary positions of so many text tokens, and of h x w noise and condition tokens."""
        frames = [(1, h, w)] * (2 if self.rope == "frame_offset" else 1)
        image_rope, text_rope = self.pos_embed([frames], max_txt_seq_len=text, device=device)
        return torch.cat((text_rope, image_rope[: h * w], image_rope[-h * w :]))


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


def lora_targets(
    model: QwenImageTransformer2DModel, branches: Literal["dual", "single"] = "dual", blocks: int | None = None
) -> str:
    """Return a regular expression that matches the Linears to adapt: all whose output for the adapted tokens is used.

    dual: the adapted tokens are the condition tokens; in the last block only their keys and values are used. single:
    they are the noise tokens, through the first `blocks` blocks (default: all).
    """
    last = len(model.transformer_blocks) - 1 if blocks is None else blocks - 1
    all_of_it = r"attn\.(to_q|to_k|to_v|to_out\.0)|img_mlp\.net\.(0\.proj|2)|img_mod\.1"
    if branches == "single":
        return rf"img_in|transformer_blocks\.({'|'.join(map(str, range(last + 1)))})\.({all_of_it})"
    inner = rf"transformer_blocks\.(?!{last}\.)\d+\.({all_of_it})"
    return rf"img_in|{inner}|transformer_blocks\.{last}\.(attn\.(to_k|to_v)|img_mod\.1)"
