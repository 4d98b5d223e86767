"""LoRA that acts on the condition branch alone: which tokens get it is decided at the call site (TEASR sec. 3.4).

Stock peft layers hold the weights of a large model, so that its LoRA loads and saves wherever peft's does; `BranchLora`, of the same names, those of a
small one, which need not wait for peft's import. Nothing is merged, hooked or switched by global state, so that activation checkpointing recomputes
exactly what the first pass computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """A factor of a LoRA: keeps its weight in fp32, computes in the dtype of its input."""

    def forward(self, x: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """x W^T, or onto + scale x W^T in one product (no tensor of the size of `onto` beside the result)."""
        weight = self.weight.to(x.dtype)
        if onto is None:
            return F.linear(x, weight)
        return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight.T, alpha=scale).view(onto.shape)


class BranchLora(nn.Module):
    """A Linear and its LoRA with the names, the start and the random draws of peft's layer."""

    merged = disable_adapters = False
    active_adapters = ("default",)

    def __init__(self, linear: nn.Linear, rank: int, alpha: int):
        super().__init__()
        self.base_layer, self.scaling = linear, {"default": alpha / rank}
        self.lora_A = nn.ModuleDict({"default": LoraLinear(linear.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": LoraLinear(rank, linear.out_features, bias=False)})
        nn.init.kaiming_uniform_(self.lora_A["default"].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B["default"].weight)


def add_branch_lora(net: nn.Module, targets: str, rank: int, alpha: int) -> None:
    """Put a `BranchLora` in the place of each Linear of `net` whose full name matches the regular expression `targets`."""
    for name, layer in list(net.named_modules()):
        if re.fullmatch(targets, name):
            net.set_submodule(name, BranchLora(layer, rank, alpha))


def inject_peft_lora(net: nn.Module, targets: str, rank: int, alpha: int) -> None:
    """The same with peft's layers."""
    from peft import LoraConfig, inject_adapter_in_model  # takes 5 s: transformers, bitsandbytes

    inject_adapter_in_model(LoraConfig(**lora_settings(targets, rank, alpha)), net)
    upgrade_lora(net)


def lora_settings(targets: str, rank: int, alpha: int) -> dict:
    """What peft has to know of it."""
    return {"r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}


def has_lora(layer: nn.Module) -> bool:
    """Whether it is a `BranchLora` or peft's LoRA layer."""
    return "lora_A" in layer._modules


def upgrade_lora(net: nn.Module) -> None:
    """Make `LoraLinear` of the factors of every LoRA in `net`, whoever injected it."""
    for layer in net.modules():
        if has_lora(layer):
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = LoraLinear


def base(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer without its LoRA: the path of noise tokens, whatever the adapters hold."""
    return layer.base_layer(x) if has_lora(layer) else layer(x)


def add_lora(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """y + what the LoRA of `layer` makes of x; y itself where the layer has no active adapter."""
    if not has_lora(layer) or layer.disable_adapters:
        return y
    if layer.merged:
        raise RuntimeError("the LoRA of the condition branch was fused into weights that noise tokens use: unmerge it")
    for a in layer.active_adapters:
        if a in layer.lora_A:
            y = layer.lora_B[a](layer.lora_A[a](x), onto=y, scale=layer.scaling[a])
    return y


def with_lora(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer with its LoRA: the path of condition tokens, where they come on their own."""
    return add_lora(layer, x, base(layer, x))


def branch(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer for both branches, x [B, 2, ...] with the noise branch at index 0 and the condition branch at 1; [B, 1, ...]: noise alone.

    One base product serves both; the LoRA delta is added on the condition branch.
    """
    y = base(layer, x)
    if has_lora(layer) and x.shape[1] > 1:
        y[:, 1] = add_lora(layer, x[:, 1], y[:, 1])
    return y


def replace_linears(net: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put make(linear) in the place of every Linear of `net`, under its LoRA where it has one."""
    for name, child in list(net.named_children()):
        holder, key = (child, "base_layer") if has_lora(child) else (net, name)
        linear = getattr(holder, key)
        if type(linear) is nn.Linear:
            setattr(holder, key, make(linear))
        elif holder is net:
            replace_linears(child, make)
