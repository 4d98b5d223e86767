"""LoRA that acts on the condition branch alone: which tokens get it is decided at the call site (TEASR sec. 3.4).

Stock peft layers hold the weights; nothing is merged, hooked or switched by global state, so that activation
checkpointing recomputes exactly what the first pass computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """A factor of a LoRA: keeps its weight in fp32, computes in the dtype of its input."""

    def forward(self, x: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """x W^T, or onto + scale x W^T in one product (no tensor of the size of `onto` beside the result)."""
        weight = self.weight.to(x.dtype)
        if onto is None:
            return F.linear(x, weight)
        return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight.T, alpha=scale).view(onto.shape)


def add_branch_lora(net: nn.Module, targets: str, rank: int, alpha: int) -> None:
    """Inject LoRA adapters into the Linears of `net` whose full name matches the regular expression `targets`."""
    inject_adapter_in_model(LoraConfig(**lora_settings(targets, rank, alpha)), net)
    upgrade_lora(net)


def lora_settings(targets: str, rank: int, alpha: int) -> dict:
    """What peft has to know of it."""
    return {"r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}


def upgrade_lora(net: nn.Module) -> None:
    """Make `LoraLinear` of the factors of every LoRA in `net`, whoever injected it."""
    for layer in net.modules():
        if isinstance(layer, BaseTunerLayer):
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = LoraLinear


def base(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer without its LoRA: the path of noise tokens, whatever the adapters hold."""
    return layer.base_layer(x) if isinstance(layer, BaseTunerLayer) else layer(x)


def add_lora(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """y + what the LoRA of `layer` makes of x; y itself where the layer has no active adapter."""
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
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
    if isinstance(layer, BaseTunerLayer) and x.shape[1] > 1:
        y[:, 1] = add_lora(layer, x[:, 1], y[:, 1])
    return y


def replace_linears(net: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put make(linear) in the place of every Linear of `net`, under its LoRA where it has one."""
    for name, child in list(net.named_children()):
        holder, key = (child, "base_layer") if isinstance(child, BaseTunerLayer) else (net, name)
        linear = getattr(holder, key)
        if type(linear) is nn.Linear:
            setattr(holder, key, make(linear))
        elif holder is net:
            replace_linears(child, make)
