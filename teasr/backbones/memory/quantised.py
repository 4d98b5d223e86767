"""Frozen Linear layers stored in 8 or 4 bits and dequantised to the compute dtype for each matrix product.

The backward pass dequantises again instead of keeping the dequantised copy, with or without activation checkpointing.
The packed weights are buffers, not parameters: they are not trained, are in no optimiser or checkpoint, and ZeRO-3 does
not shard them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teasr.util.optional import needed_for


class QuantisedLinear(nn.Module):
    """A frozen Linear [in] -> [out]; subclasses define how the weight is stored."""

    moves = False  # the weight is readable only while its block computes (swapping.py)
    stored: tuple[str, ...] = ("packed",)  # names of the buffers that hold the weight
    keeps = False  # the dequantised weight is kept until the end of `expanded_once`
    kept: Tensor | None = None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantised weight [out, in] in this dtype, without the factors of `out_scale`."""
        raise NotImplementedError

    def out_scale(self, dtype: torch.dtype) -> Tensor | None:
        """Return a factor for each output channel [out] that product and bias are multiplied by, or None."""
        return None

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return `weight_in(dtype)`, which is computed once within `expanded_once`."""
        if not self.keeps:
            return self.weight_in(dtype)
        if self.kept is None or self.kept.dtype != dtype:
            self.kept = self.weight_in(dtype)
        return self.kept

    def rebind(self, tensors: dict[str, Tensor]) -> None:
        """Read the weight from these tensors from now on; they are copies of the buffers named by `stored`."""
        self._buffers.update(tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the same as a Linear; only the input receives a gradient."""
        return _Product.apply(x, self)


@contextlib.contextmanager
def expanded_once(module: nn.Module) -> Iterator[None]:
    """Context in which each quantised weight of a module is dequantised once, however often it is used."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]
    for layer in layers:
        layer.keeps = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keeps, layer.kept = False, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        if layer.moves:
            ctx.save_for_backward(x.new_empty(0))
        weight, bias, scale = layer.expanded(x.dtype), layer.bias, layer.out_scale(x.dtype)
        if scale is None:
            return F.linear(x, weight, bias)
        return F.linear(x, weight, bias).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # In a checkpointed block, reading any saved tensor first recomputes the block, which fetches its weights again.
        # Without a saved tensor, this product could come before the recomputation.
        _ = ctx.saved_tensors
        weight, scale = ctx.layer.expanded(gradient.dtype), ctx.layer.out_scale(gradient.dtype)
        return (gradient if scale is None else gradient * scale) @ weight, None


class FullLinear(QuantisedLinear):
    """Weight in its own dtype."""

    stored = ("weight",)

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.register_buffer("weight", linear.weight.detach(), persistent=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class Fp8Linear(QuantisedLinear):
    """Weight in float8 (e4m3, 3 mantissa bits) with a power-of-two scale per output channel.

    The scale preserves the precision of small weights. It multiplies the output, which is smaller than the weight; as a
    power of two, it changes no bit there. 8 bits per weight; rounding error of 2 to 3 % rms, independent of the
    magnitude of the weights.
    """

    stored = ("packed", "unscale")

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1, keepdim=True).clamp(min=1e-30)
        scale = torch.exp2(torch.floor(torch.log2(torch.finfo(torch.float8_e4m3fn).max / largest)))
        self.register_buffer("packed", (weight * scale).to(torch.float8_e4m3fn), persistent=False)
        self.register_buffer("unscale", (1 / scale)[:, 0].to(linear.weight.dtype), persistent=False)
        if self.bias is not None:
            self.bias = self.bias / self.unscale

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return self.packed.to(dtype)

    def out_scale(self, dtype: torch.dtype) -> Tensor:
        return self.unscale.to(dtype)


class Nf4Linear(QuantisedLinear):
    """Weight in 4-bit NormalFloat (NF4) with blocks of 64 and double quantisation (QLoRA, arXiv 2305.14314).

    4.13 bits per weight; rounding error of about 9 % rms. Raises MissingPackage if bitsandbytes is not installed.
    """

    stored = ("packed", "scales", "scales_of_scales")

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        library = _bitsandbytes()
        if "dynamic" not in library.name2qmap:  # cached on the device of its first use, which must not be meta
            library.name2qmap["dynamic"] = library.create_dynamic_map()
        packed, state = library.quantize_4bit(
            linear.weight.detach().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.state = state
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", state.absmax, persistent=False)  # one 8-bit scale per block
        self.register_buffer("scales_of_scales", state.state2.absmax, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> Nf4Linear:
        super()._apply(fn, recurse)
        self.state.to(self.packed.device)
        self._link()
        return self

    def _link(self) -> None:
        self.state.absmax, self.state.state2.absmax = self.scales, self.scales_of_scales

    def rebind(self, tensors: dict[str, Tensor]) -> None:
        super().rebind(tensors)
        self._link()

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return _bitsandbytes().dequantize_4bit(self.packed, self.state).to(dtype)


def _bitsandbytes():
    with needed_for("backbone.quantise = nf4"):
        import bitsandbytes.functional as functional
    return functional


KINDS: dict[str, type[QuantisedLinear]] = {"fp8": Fp8Linear, "nf4": Nf4Linear}
