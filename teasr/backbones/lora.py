"""Several LoRA sets on one base; each call names the set to apply to each group of tokens (TEASR sec. 3.4).

Large models use peft's own layers, so that their LoRA loads and saves like any peft LoRA. Small models use
`BranchLora`, which has the same parameter names and avoids the slow import of peft. Nothing is merged, hooked or
controlled by global state, so activation checkpointing recomputes exactly what the first forward pass computed.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.backbones.roles import DEFAULT_SET, Adapters
from teasr.util.optional import needed_for


class LoraLinear(nn.Linear):
    """One factor of a LoRA: its weight is stored in fp32, and the product is computed in the dtype of the input."""

    def forward(self, x: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return x W^T, or onto + scale x W^T as one fused operation, without a temporary tensor of that size."""
        weight = self.weight.to(x.dtype)
        if onto is None:
            return F.linear(x, weight)
        return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight.T, alpha=scale).view(onto.shape)


class LoraConv(nn.Conv2d):
    """One factor of a LoRA on a convolution, with the storage and the interface of `LoraLinear`."""

    def forward(self, x: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return the convolution of x, or onto + scale times it."""
        y = self._conv_forward(x, self.weight.to(x.dtype), None)
        return y if onto is None else torch.add(onto, y, alpha=scale)


class BranchLora(nn.Module):
    """A Linear and its LoRA sets, with the same names, initialisation and random draws as peft's layer."""

    merged = disable_adapters = False

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base_layer, self.scaling = linear, {}
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    def add_set(self, name: str, rank: int, alpha: float) -> None:
        """Add a set that has no effect yet, because its second factor is initialised to zero."""
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
    """Do the same as `add_branch_lora` with peft's layers."""
    with needed_for("LoRA"):
        from peft import LoraConfig, inject_adapter_in_model  # takes 5 s, as it imports transformers and bitsandbytes

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several sets are intended
        inject_adapter_in_model(LoraConfig(**lora_settings(targets, rank, alpha)), net, name)
    upgrade_lora(net)


def lora_settings(targets: str, rank: int, alpha: int) -> dict:
    """Return the arguments of peft's `LoraConfig`."""
    return {"r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}


def has_lora(layer: nn.Module) -> bool:
    """Whether the layer is a `BranchLora` or a LoRA layer of peft."""
    return "lora_A" in layer._modules


def upgrade_lora(net: nn.Module) -> None:
    """Convert the factors of every LoRA in `net` to `LoraLinear` or `LoraConv` in place, whoever added them."""
    for layer in net.modules():
        if has_lora(layer):
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = LoraConv if isinstance(factor, nn.Conv2d) else LoraLinear


def base(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply the layer without its LoRA."""
    return layer.base_layer(x) if has_lora(layer) else layer(x)


def add_lora(layer: nn.Module, x: Tensor, y: Tensor, name: str | None) -> Tensor:
    """Return y plus the output of the LoRA set `name` for x.

    Returns y itself if `name` is None, or if the layer has no such set. Raises RuntimeError if the LoRA was merged into
    the base weights.
    """
    if name is None or not has_lora(layer) or name not in layer.lora_A or layer.disable_adapters:
        return y
    if layer.merged:
        raise RuntimeError("the LoRA is merged into base weights that other tokens use without it: unmerge it first")
    return layer.lora_B[name](layer.lora_A[name](x), onto=y, scale=layer.scaling[name])


def with_lora(layer: nn.Module, x: Tensor, name: str | None) -> Tensor:
    """Apply the layer with this LoRA set to the tokens of a single branch."""
    return add_lora(layer, x, base(layer, x), name)


def branch(layer: nn.Module, x: Tensor, adapters: Adapters) -> Tensor:
    """Apply the layer to all branches, x [B, K, ...]: the noise branch at index 0, an optional condition branch at 1.

    The base product is computed once for both branches, then each branch adds the output of its own LoRA set.
    """
    y = base(layer, x)
    if has_lora(layer):
        for k, name in enumerate((adapters.noise, adapters.condition)[: x.shape[1]]):
            if name in layer.lora_A:
                y[:, k] = add_lora(layer, x[:, k], y[:, k], name)
    return y


class WithSet(nn.Module):
    """A layer with one of its LoRA sets, as a module that takes the layer's place in a `view`."""

    def __init__(self, layer: nn.Module, name: str):
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with the set."""
        return with_lora(self.layer, x, self.name)


def view(net: nn.Module, name: str | None) -> nn.Module:
    """Return the network with one LoRA set (None: none), for stock code that cannot pass the set down as an argument.

    It shares every layer and parameter with `net`. Other views of `net` do not change it, so that recomputed
    activations see the set of their own pass.
    """
    layers = [layer for layer in net.modules() if has_lora(layer)]
    return with_replaced(net, {x: WithSet(x, name) if name in x.lora_A else x.base_layer for x in layers})


def with_replaced(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return the module with some of those inside it replaced; what does not contain them is shared, not copied.

    Hooks of a copied module stay with the original: those of ZeRO-3 that fetch weights are on the shared layers.
    """
    if module in replaced:
        return replaced[module]
    children = {name: child and with_replaced(child, replaced) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    made = copy.copy(module)
    made._modules = children
    made.__dict__ |= {key: OrderedDict() for key in vars(made) if key.endswith("_hooks")}
    return made


def replace_linears(net: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every Linear of `net` by make(linear), keeping the LoRA around it if it has one."""
    for name, child in list(net.named_children()):
        holder, key = (child, "base_layer") if has_lora(child) else (net, name)
        linear = getattr(holder, key)
        if type(linear) is nn.Linear:
            setattr(holder, key, make(linear))
        elif holder is net:
            replace_linears(child, make)
