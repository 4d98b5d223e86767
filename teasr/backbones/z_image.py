"""Z-Image (6.2 B): diffusers' single-stream transformer with a condition branch (TEASR sec. 3.4).

All tokens pass through the same Linears as one sequence [noise, text, condition]. Noise and text tokens run at t_cur,
condition tokens at t_tar with the positions of the noise tokens, and a LoRA set acts on the tokens of one stream alone,
never on text. The network's own time is 1 - t, and its output is the negative velocity. A negative time becomes
-(1 - |t|), as in TwinFlow, and 0 counts as positive: otherwise 0, clean, would become 0, which is pure noise here. So
the two signs cannot be told apart at |t| = 1, not at 0 as in other networks.

Noise and text tokens are padded to a multiple of 32 with the model's padding tokens, condition tokens are not.

Shape legend: B batch, C latent channels (16), h w latent pixels, L tokens of 2x2 latent pixels, T text tokens, S tokens
of the sequence, D width, E head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformerBlock
from torch import Tensor, nn

from teasr.backbones.generic.codec import KLCodec
from teasr.backbones.generic.config import DiffusersConfig
from teasr.backbones.generic.model import DiffusersModel
from teasr.backbones.generic.network import Attention, DualBlock, DualBranch, heads, rms
from teasr.backbones.lora import add_lora, base, with_lora
from teasr.backbones.memory.sweeps import Pass, Tokens
from teasr.backbones.roles import STUDENT, Adapters

PATCH = "2-1"  # key of the layers for patches of 2x2 latent pixels of one frame


@dataclass(frozen=True)
class ZImageConfig(DiffusersConfig):
    """Config of Z-Image: its weights, its LoRA, and how much memory they take."""


class Stream(NamedTuple):
    """Consecutive tokens of a sequence with a time and a LoRA set of their own."""

    start: int
    stop: int
    temb_BD: Tensor
    lora: str | None


class DualBranchBlock(DualBlock, ZImageTransformerBlock):
    """One block over the sequence of noise, text and condition tokens."""

    def compute(self, s_BSD: Tensor, *, rope_SE: Tensor, streams: tuple[Stream, ...], last: bool = False) -> Tokens:
        """Return the tokens after the block; with `last`, the condition tokens are left out."""
        mods = [with_lora(self.adaLN_modulation[0], x.temb_BD, x.lora).unsqueeze(1).chunk(4, dim=2) for x in streams]
        attn, y = self.attention, self._scaled(self.attention_norm1(s_BSD), streams, mods, 0)
        k, v = (heads(attn, on_streams(layer, y, streams)) for layer in (attn.to_k, attn.to_v))
        if last:  # condition tokens have keys and values only
            streams, mods = streams[:2], mods[:2]
            s_BSD, y = s_BSD[:, : streams[-1].stop], y[:, : streams[-1].stop]
        q = rotate(rms(attn.norm_q, heads(attn, on_streams(attn.to_q, y, streams))), rope_SE)
        out = attn.processor.attend(q, rotate(rms(attn.norm_k, k), rope_SE), v)
        s_BSD = self._gated(s_BSD, self.attention_norm2(on_streams(attn.to_out[0], out, streams)), streams, mods, 1)
        y, mlp = self._scaled(self.ffn_norm1(s_BSD), streams, mods, 2), self.feed_forward
        y = F.silu(on_streams(mlp.w1, y, streams)) * on_streams(mlp.w3, y, streams)
        return (self._gated(s_BSD, self.ffn_norm2(on_streams(mlp.w2, y, streams)), streams, mods, 3),)

    def _scaled(self, y_BSD: Tensor, streams: tuple[Stream, ...], mods: list, k: int) -> Tensor:
        """Multiply each stream by its scale, number k of its modulation."""
        parts = (y_BSD[:, x.start : x.stop] * (1.0 + mod[k]) for x, mod in zip(streams, mods, strict=True))
        return torch.cat(list(parts), dim=1)

    def _gated(self, s_BSD: Tensor, y_BSD: Tensor, streams: tuple[Stream, ...], mods: list, k: int) -> Tensor:
        """Add y times the gate of each stream, number k of its modulation."""
        parts = (y_BSD[:, x.start : x.stop] * mod[k].tanh() for x, mod in zip(streams, mods, strict=True))
        return s_BSD + torch.cat(list(parts), dim=1)


def on_streams(layer: nn.Module, y_BSD: Tensor, streams: tuple[Stream, ...]) -> Tensor:
    """Apply a Linear to the whole sequence, and each stream's LoRA set to its tokens."""
    out = base(layer, y_BSD)
    parts = [add_lora(layer, y_BSD[:, x.start : x.stop], out[:, x.start : x.stop], x.lora) for x in streams if x.lora]
    if not parts:
        return out
    pieces = [out[:, x.start : x.stop] if not x.lora else parts.pop(0) for x in streams]
    return torch.cat(pieces, dim=1)


def rotate(x_BSHE: Tensor, rope_SE: Tensor) -> Tensor:
    """Apply rotary positions, complex [S, E / 2], to the first tokens they are given for."""
    x = torch.view_as_complex(x_BSHE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x * rope_SE[: x.shape[1], None]).flatten(3).type_as(x_BSHE)


class ZImageTransformer(DualBranch, ZImageTransformer2DModel):
    """The dual-branch transformer; it loads the weights of the stock model unchanged."""

    block_list = "layers"
    _repeated_blocks: ClassVar = ["DualBranchBlock"]
    _no_split_modules: ClassVar = ["DualBranchBlock", "ZImageTransformerBlock"]

    @functools.wraps(ZImageTransformer2DModel.__init__)  # otherwise from_pretrained drops the config
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.upgrade()

    def upgrade(self) -> None:
        for block in (*self.noise_refiner, *self.layers):
            block.__class__, block.attention.processor = DualBranchBlock, Attention()

    @property
    def inner_dim(self) -> int:
        """Width of the tokens."""
        return self.dim

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
        """Return a call up to the first block that noise, text and condition tokens share."""
        text, text_rope = self._text(text_BTD)
        x, rope = self._image(z_BChw, text.shape[1] + 1, adapters.noise)
        x, rope = self._padded(x, rope, self.x_pad_token)
        noise = Stream(0, x.shape[1], self.time_embedding(t_cur, x), adapters.noise)
        n, t = noise.stop, noise.stop + text.shape[1]
        refined, streams = [noise], [noise, Stream(n, t, noise.temb_BD, None)]
        if cond is not None:
            c, c_rope = self._image(cond, text.shape[1] + 1, adapters.condition)
            temb, length = self.time_embedding(t_tar, x), c.shape[1]
            refined.append(Stream(n, n + length, temb, adapters.condition))
            streams.append(Stream(t, t + length, temb, adapters.condition))
            x, rope = torch.cat((x, c), dim=1), torch.cat((rope, c_rope))
        for block in self.noise_refiner:
            (x,) = self.run_block(block, x, rope_SE=rope, streams=tuple(refined))
        s, rope = torch.cat((x[:, :n], text, x[:, n:]), dim=1), torch.cat((rope[:n], text_rope, rope[n:]))
        last, (h, w) = (blocks or len(self.blocks)) - 1, (z_BChw.shape[-2] // 2, z_BChw.shape[-1] // 2)

        def others(i: int) -> dict[str, Any]:
            return {"rope_SE": rope, "streams": tuple(streams), "last": i == last}

        def end(tokens: Tokens) -> Tensor:
            if blocks is not None:
                return tokens[0][:, : h * w]
            out = self.all_final_layer[PATCH](tokens[0], c=noise.temb_BD)[:, : h * w]
            return -out.unflatten(2, (2, 2, -1)).unflatten(1, (h, w)).permute(0, 5, 1, 3, 2, 4).reshape(z_BChw.shape)

        return Pass((s,), others, end)

    def time_embedding(self, t: Tensor, like: Tensor) -> Tensor:
        """Embed times [B] fp32 of either sign: [B, D]."""
        own = torch.where(t < 0, -(1 + t), 1 - t)  # 0 is positive
        return self.t_embedder(own * self.t_scale).type_as(like)

    def _image(self, z_BChw: Tensor, frame: int, lora: str | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of a latent [B, L, D] and their positions; `frame` is the first axis of a position."""
        h, w = z_BChw.shape[-2] // 2, z_BChw.shape[-1] // 2
        patches = z_BChw.unflatten(3, (w, 2)).unflatten(2, (h, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        places = self.create_coordinate_grid((1, h, w), (frame, 0, 0), z_BChw.device).flatten(0, 2)
        return with_lora(self.all_x_embedder[PATCH], patches, lora), self.rope_embedder(places)

    def _text(self, text_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the refined text tokens, padded, and their positions."""
        text = self.cap_embedder(text_BTD)
        missing = -text.shape[1] % SEQ_MULTI_OF
        text = torch.cat((text, self.cap_pad_token.to(text).expand(len(text), missing, -1)), dim=1)
        places = self.create_coordinate_grid((text.shape[1], 1, 1), (1, 0, 0), text.device).flatten(0, 2)
        rope = self.rope_embedder(places)
        for block in self.context_refiner:
            text = self.run_block(block, text, None, rope[None].expand(len(text), -1, -1))
        return text, rope

    def _padded(self, x_BLD: Tensor, rope: Tensor, pad_token: Tensor) -> tuple[Tensor, Tensor]:
        """Append padding tokens at position 0 up to a multiple of 32."""
        missing = -x_BLD.shape[1] % SEQ_MULTI_OF
        origin = self.rope_embedder(torch.zeros(missing, 3, dtype=torch.int32, device=x_BLD.device))
        padding = pad_token.to(x_BLD).expand(len(x_BLD), missing, -1)
        return torch.cat((x_BLD, padding), dim=1), torch.cat((rope, origin))


class ZImage(DiffusersModel):
    """The backbone: `ZImageTransformer`, and AutoencoderKL with its scale and shift."""

    transformer_class, codec_class = ZImageTransformer, KLCodec
    prompt_tokens = 8  # of the chat template around an empty prompt
    published: ClassVar = {
        "vae": {
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
            "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    }  # fmt: skip

    def text_width(self, transformer: ZImageTransformer) -> int:
        return transformer.config.cap_feat_dim

    def lora_targets(self, branches: Literal["dual", "single"], blocks: int | None = None) -> str:
        last = (blocks or len(self.net.transformer.blocks)) - 1
        all_of_it = r"attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0"
        outer = rf"all_x_embedder\.{PATCH}|noise_refiner\.\d+\.({all_of_it})"
        if branches == "single":
            return rf"{outer}|layers\.({'|'.join(map(str, range(last + 1)))})\.({all_of_it})"
        inner = rf"layers\.(?!{last}\.)\d+\.({all_of_it})"
        return rf"{outer}|{inner}|layers\.{last}\.(attention\.(to_k|to_v)|adaLN_modulation\.0)"

    def memory_group(self, name: str) -> str:
        if "adaLN" in name:
            return "modulation"
        return "text path" if any(part in name for part in ("cap_", "context_refiner", "prompt")) else "image path"
