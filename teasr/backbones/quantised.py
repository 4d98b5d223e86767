"""Frozen Linears in 8 or 4 bits: kept small, expanded to the compute dtype for the moment of a product.

The backward pass expands them again instead of keeping the expanded copy, with or without activation checkpointing. The packed weights are
buffers, not parameters: nothing trains them, no optimiser or checkpoint holds them, and ZeRO-3 leaves them whole on every rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantisedLinear(nn.Module):
    """A frozen Linear [in] -> [out]; its children say how the weight is kept."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in this dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """As a Linear; only the input gets a gradient."""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight_in(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight_in(gradient.dtype), None


class Fp8Linear(QuantisedLinear):
    """float8 (e4m3, 3 bits of mantissa) with a power of two for each output channel, so that small weights keep their bits.

    8 bits a weight; rounding error of 2 to 3 % rms, whatever the size of the weights.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1, keepdim=True).clamp(min=1e-30)
        scale = torch.exp2(torch.floor(torch.log2(torch.finfo(torch.float8_e4m3fn).max / largest)))
        self.register_buffer("packed", (weight * scale).to(torch.float8_e4m3fn), persistent=False)
        self.register_buffer("unscale", 1 / scale, persistent=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return self.packed.to(dtype) * self.unscale.to(dtype)


class Nf4Linear(QuantisedLinear):
    """NormalFloat of 4 bits in blocks of 64 with doubly quantised scales (QLoRA, arXiv 2305.14314): 4.13 bits a weight, about 9 % rms.

    ImportError with the pip line when bitsandbytes is missing.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        library = _bitsandbytes()
        if "dynamic" not in library.name2qmap:  # kept on the device of its first use, which must not be meta
            library.name2qmap["dynamic"] = library.create_dynamic_map()
        packed, state = library.quantize_4bit(
            linear.weight.detach().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.state = state
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", state.absmax, persistent=False)  # of blocks, in 8 bits
        self.register_buffer("scales_of_scales", state.state2.absmax, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> Nf4Linear:
        super()._apply(fn, recurse)
        self.state.to(self.packed.device)
        self.state.absmax, self.state.state2.absmax = self.scales, self.scales_of_scales
        return self

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return _bitsandbytes().dequantize_4bit(self.packed, self.state).to(dtype)


def _bitsandbytes():
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ImportError("backbone.quantise = nf4 needs bitsandbytes: pip install 'teasr[nf4]'") from error
    return functional


KINDS: dict[str, type[QuantisedLinear]] = {"fp8": Fp8Linear, "nf4": Nf4Linear}
