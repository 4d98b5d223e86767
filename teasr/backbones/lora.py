"""LoRA sets on one base: which set acts on which tokens is an argument of every product (TEASR sec. 3.4).

Stock peft layers hold the weights of a large model, so that its LoRA loads and saves wherever peft's does; `BranchLora`, with the same names, those
of a small one, which then need not wait for peft's import. Nothing is merged, hooked or switched by global state: activation checkpointing
recomputes exactly what the first pass computed.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.backbones.roles import DEFAULT_SET, Adapters


class LoraLinear(nn.Linear):
    """A factor of a LoRA: keeps its weight in fp32, computes in the dtype of its input."""

    def forward(self, x: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """x W^T, or onto + scale x W^T in one product (no tensor of the size of `onto` beside the result)."""
        weight = self.weight.to(x.dtype)
        if onto is None:
            return F.linear(x, weight)
        return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight.T, alpha=scale).view(onto.shape)


class BranchLora(nn.Module):
    """A Linear and its LoRA sets with the names, the start and the random draws of peft's layer."""

    merged = disable_adapters = False

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base_layer, self.scaling = linear, {}
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    def add_set(self, name: str, rank: int, alpha: float) -> None:
        """A set that does nothing yet: its second factor is zero."""
        linear, self.scaling[name] = self.base_layer, alpha / rank
        self.lora_A[name] = LoraLinear(linear.in_features, rank, bias=False)
        self.lora_B[name] = LoraLinear(rank, linear.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[name].weight)


def add_branch_lora(net: nn.Module, targets: str, rank: int, alpha: float, name: str = DEFAULT_SET) -> None:
    """Add a LoRA set to each Linear of `net` whose full name matches the regular expression `targets`."""
    for path, layer in list(net.named_modules()):
        if re.fullmatch(targets, path):
            if not isinstance(layer, BranchLora):
                layer = BranchLora(layer)
                net.set_submodule(path, layer)
            layer.add_set(name, rank, alpha)


def inject_peft_lora(net: nn.Module, targets: str, rank: int, alpha: float, name: str = DEFAULT_SET) -> None:
    """The same with peft's layers."""
    from peft import LoraConfig, inject_adapter_in_model  # takes 5 s: transformers, bitsandbytes

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several sets are meant
        inject_adapter_in_model(LoraConfig(**lora_settings(targets, rank, alpha)), net, name)
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
    """The layer without its LoRA."""
    return layer.base_layer(x) if has_lora(layer) else layer(x)


def add_lora(layer: nn.Module, x: Tensor, y: Tensor, name: str | None) -> Tensor:
    """y + what the LoRA set `name` of `layer` makes of x; y itself where the layer has no such set, or `name` is None."""
    if name is None or not has_lora(layer) or name not in layer.lora_A or layer.disable_adapters:
        return y
    if layer.merged:
        raise RuntimeError("a LoRA was fused into weights that other tokens use without it: unmerge it")
    return layer.lora_B[name](layer.lora_A[name](x), onto=y, scale=layer.scaling[name])


def with_lora(layer: nn.Module, x: Tensor, name: str | None) -> Tensor:
    """The layer with this LoRA set, for tokens that come on their own."""
    return add_lora(layer, x, base(layer, x), name)


def branch(layer: nn.Module, x: Tensor, adapters: Adapters) -> Tensor:
    """The layer for all branches, x [B, K, ...] with the noise branch at index 0 and the condition branch, if there is one, at 1.

    One base product serves both; each branch then gets the delta of its own LoRA set.
    """
    y = base(layer, x)
    if has_lora(layer):
        for k, name in enumerate((adapters.noise, adapters.condition)[: x.shape[1]]):
            if name in layer.lora_A:
                y[:, k] = add_lora(layer, x[:, k], y[:, k], name)
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
