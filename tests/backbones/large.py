"""Backbones on diffusers at tiny size: how to build and run the stock model, and the same written out in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.util import tensor_file
from teasr.util.seed import seed_of

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 1.5,
    "shift_factor": 0.1,
}  # fmt: skip
SD3 = {
    "sample_size": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "caption_projection_dim": 32, "pooled_projection_dim": 20, "in_channels": 4, "out_channels": 4,
    "pos_embed_max_size": 16, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 4, "dim": 48, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 24, "axes_dims": [8, 8, 8], "axes_lens": [64, 32, 32],
}  # fmt: skip
TEXT_WIDTH, TEXT_TOKENS = 24, 7


@dataclass(frozen=True)
class Case:
    """One backbone: its sizes, the call of the stock model, and the same written out with condition and LoRA."""

    stock: str  # name of diffusers' class
    transformer: dict
    run_stock: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # model, z, t, text -> velocity
    plain: Callable[..., Tensor]  # weights, LoRA factors, adapted stream, z, t, text, z_lq, t_tar -> velocity
    adapted: tuple[int, int]  # number of LoRA layers of a dual and of a single branch

    def save(self, folder: Path) -> Path:
        """Write the folder of a diffusers model with random weights, and a prompt file."""
        import diffusers

        torch.manual_seed(0)
        transformer = getattr(diffusers, self.stock)(**self.transformer)
        for name, p in transformer.named_parameters():
            if p.ndim == 1:  # away from 0 and 1, so that a missing norm or bias is noticed
                nn.init.normal_(p, 0.0 if name.endswith("bias") else 1.0, 0.3)
        transformer.save_pretrained(folder / "transformer")
        diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae")
        told = {"prompt": "", "model": "tiny", "dtype": "fp32", "libraries": {}}
        prompt = {"prompt_embeds": torch.randn(TEXT_TOKENS, TEXT_WIDTH)}
        (folder / "prompt.safetensors").write_bytes(tensor_file.pack(prompt, told))
        return folder


def settings(name: str, folder: Path | None = None, **changes) -> dict:
    """The section `backbone` of a config: the weights in a folder, or random ones of the same size."""
    where = {"model": "random", "prompt": "random", "transformer": CASES[name].transformer, "vae": VAE}
    if folder is not None:
        where = {"model": str(folder), "prompt": str(folder / "prompt.safetensors")}
    return {"name": name, "dtype": "fp32", "lora_rank": 4, "lora_alpha": 4} | where | changes


def give_effect(net: nn.Module) -> None:
    """Fill the second factors of every LoRA, and last layers of heads and adapters, which begin at zero."""
    for name, p in net.named_parameters():
        if "lora_B" in name or (name.startswith("parts.") and name.endswith("last.weight")):
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed_of(name)))


class Plain:
    """Layers written out on a dictionary of weights; adapted ones add (x A^T) B^T."""

    def __init__(self, weights: dict[str, Tensor], lora: dict[str, tuple[Tensor, Tensor]]):
        self.weights, self.lora = weights, lora

    def linear(self, name: str, x: Tensor, adapted: bool = False) -> Tensor:
        """x W^T + b, and with `adapted` the LoRA of this layer if it has one."""
        y = x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)
        if adapted and name in self.lora:
            a, b = self.lora[name]
            y = y + x @ a.T @ b.T
        return y

    def rms(self, name: str, x: Tensor, eps: float) -> Tensor:
        """x / root mean square of x, times the weight."""
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last axis, without weights."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def sinusoid(t: Tensor) -> Tensor:
    """cos and sin of 1000 t x frequencies, [B, 256]."""
    angles = 1000 * t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of [B, L, H, E], to [B, L, H E]."""
    scores = torch.einsum("blhe,bmhe->bhlm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), v).flatten(2)


def plain_sd3(weights, lora, on, z, t, text, z_lq=None, t_tar=None) -> Tensor:
    """SD3 with a condition branch: stream 0 is noise, 1 the condition; stream `on` has the LoRA, the text has none."""
    net, silu = Plain(weights, lora), F.silu
    pooled, text = text[:, 0, :20], net.linear("context_embedder", text[:, 1:])

    def two_layers(name, x):
        return net.linear(f"{name}.linear_2", silu(net.linear(f"{name}.linear_1", x)))

    def tokens(latent):
        h, w = latent.shape[-2] // 2, latent.shape[-1] // 2
        top, left = (16 - h) // 2, (16 - w) // 2
        place = weights["pos_embed.pos_embed"].unflatten(1, (16, 16))[:, top : top + h, left : left + w].flatten(1, 2)
        conv = weights["pos_embed.proj.weight"], weights["pos_embed.proj.bias"]
        return F.conv2d(latent, *conv, stride=2).flatten(2).transpose(1, 2) + place

    streams = [tokens(x) for x in (z, z_lq) if x is not None]
    embedded = two_layers("time_text_embed.text_embedder", pooled)
    times = [
        two_layers("time_text_embed.timestep_embedder", sinusoid(x)) + embedded for x in (t, t_tar) if x is not None
    ]
    for i in range(3):
        p, last = f"transformer_blocks.{i}.", i == 2
        mods = [
            net.linear(f"{p}norm1.linear", silu(e), k == on)[:, None].chunk(6 if last else 9, 2)
            for k, e in enumerate(times)
        ]
        context = net.linear(f"{p}norm1_context.linear", silu(times[0]))[:, None].chunk(2 if last else 6, 2)
        scale, shift = context if last else (context[1], context[0])
        y_text, normed = layer_norm(text) * (1 + scale) + shift, [layer_norm(x) for x in streams]

        def joint(attn, shifts, scales, y_text, p=p, mods=mods, normed=normed):
            q, k, v = [], [], []
            for n, x in enumerate(normed):
                y = x * (1 + mods[n][scales]) + mods[n][shifts]
                for name, to in (("to_q", q), ("to_k", k), ("to_v", v)):
                    to.append(net.linear(f"{p}{attn}.{name}", y, n == on).unflatten(2, (2, 16)))
                q[-1], k[-1] = (net.rms(f"{p}{attn}.norm_{s}", to[-1], 1e-6) for s, to in (("q", q), ("k", k)))
            if y_text is not None:
                for name, to in (("add_q_proj", q), ("add_k_proj", k), ("add_v_proj", v)):
                    to.append(net.linear(f"{p}{attn}.{name}", y_text).unflatten(2, (2, 16)))
                q[-1], k[-1] = (net.rms(f"{p}{attn}.norm_added_{s}", to[-1], 1e-6) for s, to in (("q", q), ("k", k)))
            sizes = [x.shape[1] for x in q]
            return attention(*(torch.cat(x, 1) for x in (q, k, v))).split(sizes, 1)

        outs = joint("attn", 0, 1, y_text)
        more = None if last else joint("attn2", 6, 7, None)
        for n in range(len(streams)):
            mod = mods[n]
            x = streams[n] + mod[2] * net.linear(f"{p}attn.to_out.0", outs[n], n == on)
            if more is not None:
                x = x + mod[8] * net.linear(f"{p}attn2.to_out.0", more[n], n == on)
            y = net.linear(f"{p}ff.net.0.proj", layer_norm(x) * (1 + mod[4]) + mod[3], n == on)
            streams[n] = x + mod[5] * net.linear(f"{p}ff.net.2", F.gelu(y, approximate="tanh"), n == on)
        if not last:
            text = text + context[2] * net.linear(f"{p}attn.to_add_out", outs[-1])
            y = net.linear(f"{p}ff_context.net.0.proj", layer_norm(text) * (1 + context[4]) + context[3])
            text = text + context[5] * net.linear(f"{p}ff_context.net.2", F.gelu(y, approximate="tanh"))
    scale, shift = net.linear("norm_out.linear", silu(times[0]))[:, None].chunk(2, 2)
    out = net.linear("proj_out", layer_norm(streams[0]) * (1 + scale) + shift)
    b, _, h, w = z.shape
    return out.reshape(b, h // 2, w // 2, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(b, 4, h, w)


def stock_sd3(model: nn.Module, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Call diffusers' own forward, which takes the time in thousandths and the pooled text by itself."""
    return model(z, text[:, 1:], text[:, 0, : SD3["pooled_projection_dim"]], 1000 * t, return_dict=False)[0]


def plain_z_image(weights, lora, on, z, t, text, z_lq=None, t_tar=None) -> Tensor:
    """Z-Image with a condition branch: streams noise, text, condition; stream `on` has the LoRA, the text has none.

    Noise and text are padded to 32 tokens; the condition has the positions of the noise and is not padded.
    """
    net, h, w = Plain(weights, lora), z.shape[-2] // 2, z.shape[-1] // 2

    def time(t):
        own = torch.tensor([1 - x if x >= 0 else -(1 + x) for x in t.tolist()])
        return net.linear("t_embedder.mlp.2", F.silu(net.linear("t_embedder.mlp.0", sinusoid(own))))

    def padded(x, token):
        return torch.cat((x, weights[token].expand(len(x), 32 - x.shape[1], -1)), 1)

    def tokens(z, adapted):
        patches = [z[:, :, i : i + 2, j : j + 2] for i in range(0, 2 * h, 2) for j in range(0, 2 * w, 2)]
        flat = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], 1)
        return net.linear("all_x_embedder.2-1", flat, adapted)

    def angles(places):
        axes = [places[:, i : i + 1] * 256.0 ** (-torch.arange(0, 8, 2) / 8) for i in range(3)]
        return torch.cat(axes, 1)[:, None]

    def rotate(x, a):
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()), -1).flatten(-2)

    def block(p, streams):
        """streams: {name: (tokens, angles, time embedding or None)}; returns the tokens by name."""
        mods, q, k, v = {}, [], [], []
        for name, (x, a, temb) in streams.items():
            mods[name] = [torch.ones(1)] * 4
            if temb is not None:
                m = net.linear(f"{p}.adaLN_modulation.0", temb, name == on)[:, None].chunk(4, 2)
                mods[name] = [1 + m[0], m[1].tanh(), 1 + m[2], m[3].tanh()]
            y = net.rms(f"{p}.attention_norm1", x, 1e-5) * mods[name][0]
            made = [
                net.linear(f"{p}.attention.{to}", y, name == on).unflatten(2, (2, 24))
                for to in ("to_q", "to_k", "to_v")
            ]
            q.append(rotate(net.rms(f"{p}.attention.norm_q", made[0], 1e-5), a))
            k.append(rotate(net.rms(f"{p}.attention.norm_k", made[1], 1e-5), a))
            v.append(made[2])
        outs = attention(*(torch.cat(x, 1) for x in (q, k, v))).split([x.shape[1] for x in q], 1)
        found = {}
        for (name, (x, _, _)), out in zip(streams.items(), outs, strict=True):
            adapted = name == on
            out = net.linear(f"{p}.attention.to_out.0", out, adapted)
            x = x + mods[name][1] * net.rms(f"{p}.attention_norm2", out, 1e-5)
            y = net.rms(f"{p}.ffn_norm1", x, 1e-5) * mods[name][2]
            y = F.silu(net.linear(f"{p}.feed_forward.w1", y, adapted)) * net.linear(f"{p}.feed_forward.w3", y, adapted)
            y = net.linear(f"{p}.feed_forward.w2", y, adapted)
            found[name] = x + mods[name][3] * net.rms(f"{p}.ffn_norm2", y, 1e-5)
        return found

    caption = padded(net.linear("cap_embedder.1", net.rms("cap_embedder.0", text, 1e-5)), "cap_pad_token")
    of_text = angles(torch.tensor([[1 + i, 0, 0] for i in range(32)]))
    caption = block("context_refiner.0", {"text": (caption, of_text, None)})["text"]
    grid = [[33, i, j] for i in range(h) for j in range(w)]
    of_noise, of_cond = angles(torch.tensor(grid + [[0, 0, 0]] * (32 - h * w))), angles(torch.tensor(grid))
    streams = {0: (padded(tokens(z, on == 0), "x_pad_token"), of_noise, time(t))}
    if z_lq is not None:
        streams[1] = tokens(z_lq, on == 1), of_cond, time(t_tar)
    for name, x in block("noise_refiner.0", streams).items():
        streams[name] = x, *streams[name][1:]
    streams["text"] = caption, of_text, time(t)
    for i in range(3):
        for name, x in block(f"layers.{i}", streams).items():
            streams[name] = x, *streams[name][1:]
    scale = 1 + net.linear("all_final_layer.2-1.adaLN_modulation.1", F.silu(time(t)))[:, None]
    out = net.linear("all_final_layer.2-1.linear", layer_norm(streams[0][0]) * scale)[:, : h * w]
    return -out.reshape(len(z), h, w, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)


def stock_z_image(model: nn.Module, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Call diffusers' own forward as its pipeline does: its time is 1 - t, and it returns the negative velocity."""
    return -torch.stack(model(list(z[:, :, None]), 1 - t, list(text), return_dict=False)[0])[:, :, 0]


CASES = {
    "z_image": Case(
        "ZImageTransformer2DModel", Z_IMAGE, stock_z_image, plain_z_image, adapted=(1 + 3 * 8 + 3, 1 + 4 * 8)
    ),
    "sd3": Case("SD3Transformer2DModel", SD3, stock_sd3, plain_sd3, adapted=(2 * 11 + 3, 2 * 11 + 7)),
}
