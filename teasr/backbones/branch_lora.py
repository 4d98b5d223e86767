"""LoRA that acts on the condition branch alone: which tokens get it is decided at the call site (TEASR sec. 3.4).

Stock peft layers hold the weights; nothing is merged, hooked or switched by global state, so that activation
checkpointing recomputes exactly what the first pass computed.
"""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def add_branch_lora(net: nn.Module, targets: str, rank: int, alpha: int) -> None:
    """Inject LoRA adapters into the Linears of `net` whose full name matches the regular expression `targets`."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, bias="none")
    inject_adapter_in_model(config, net)


def base(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer without its LoRA: the path of noise tokens, whatever the adapters hold."""
    return layer.base_layer(x) if isinstance(layer, BaseTunerLayer) else layer(x)


def lora_delta(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What LoRA adds to `layer(x)`, or None where the layer has no active adapter."""
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
        return None
    if layer.merged:
        raise RuntimeError("the LoRA of the condition branch was fused into weights that noise tokens use: unmerge it")
    parts = [
        layer.lora_B[a](layer.lora_A[a](x.to(layer.lora_A[a].weight.dtype))) * layer.scaling[a]
        for a in layer.active_adapters
        if a in layer.lora_A
    ]
    return sum(parts) if parts else None


def with_lora(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer with its LoRA: the path of condition tokens, where they come on their own."""
    y, delta = base(layer, x), lora_delta(layer, x)
    return y if delta is None else y + delta.to(y.dtype)


def branch(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer for both branches, x [B, 2, ...] with the noise branch at index 0 and the condition branch at 1.

    One base product serves both; the LoRA delta is added on the condition branch.
    """
    y = base(layer, x)
    delta = lora_delta(layer, x[:, 1])
    if delta is not None:
        y[:, 1] += delta.to(y.dtype)
    return y
