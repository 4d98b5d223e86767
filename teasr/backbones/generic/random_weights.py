"""Random weights created where they will be used, so that no copy of a large network is ever held elsewhere."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from teasr.util.seed import seed_of


def fill(
    part: nn.Module, device: torch.device, seed: int, name: str, others: Collection[str] = (), recurse: bool = True
) -> None:
    """Replace the parameters of `part`, which may have no memory yet, by random ones on the device.

    name: of the part, for its seed. others: LoRA sets besides the student's. They have generators of their own, so that
    the draws of the base and of the student do not depend on them. recurse: also the parameters of submodules.
    """
    generator = torch.Generator(device).manual_seed(seed_of(seed, "random weights", name))
    for path, module in part.named_modules() if recurse else [("", part)]:
        last = path.rpartition(".")[2]
        for key, p in module._parameters.items():
            if p is None:
                continue
            value = torch.empty_like(p, device=device)
            if last in others:
                own = seed_of(seed, "random weights", name, last, path)
                _fill_lora(value, "lora_A" in path, torch.Generator(device).manual_seed(own))
            elif p.ndim > 1 and p.numel() > max(p.shape):
                value.normal_(0, p[0].numel() ** -0.5, generator=generator)
            else:  # weight of a norm, or a bias
                value.fill_(0.0 if key == "bias" else 1.0)
            module._parameters[key] = nn.Parameter(value, requires_grad=p.requires_grad)


def _fill_lora(value: Tensor, first: bool, generator: torch.Generator) -> None:
    """Fill a factor of a LoRA, so that the LoRA has no effect yet: the first is random, the second zero."""
    value.normal_(0, value.shape[1] ** -0.5, generator=generator) if first else value.zero_()
