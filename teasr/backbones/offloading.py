"""Networks larger than a GPU's memory, for restoring: blocks lie in host memory and come one ahead of their turn (diffusers' group offloading)."""

from __future__ import annotations

import torch
from torch import nn


def offload_blocks(network: nn.Module, device: torch.device) -> None:
    """Hook a network that lies in host memory so that it computes on `device`: its list of blocks one by one, the rest as one group.

    On a GPU the next block is copied while one computes.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        network,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )
