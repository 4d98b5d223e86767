"""Inference with networks larger than GPU memory, using diffusers' group offloading.

Blocks stay in host memory and are copied to the device when needed, prefetching one block on a GPU.
"""

from __future__ import annotations

import torch
from torch import nn

from teasr.util.optional import needed_for


def offload_blocks(network: nn.Module, device: torch.device) -> None:
    """Add hooks to a network in host memory so that it computes on `device`.

    The blocks in its module list are moved one at a time, all other modules as one group. On a GPU the next block is
    copied while the current one computes.
    """
    with needed_for("offloading"):
        from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        network,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )
