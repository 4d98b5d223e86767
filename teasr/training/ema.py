"""Exponential moving average of weights. Under ZeRO-3 each rank averages only its own partition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from teasr.util.distributed import World


def local(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The data of a parameter on this rank: its ZeRO-3 partition, or the whole tensor."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data


class Ema:
    """Exponential moving average (EMA) of parameters. Each rank averages only the part it holds."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        decay: float,
        world: World,
        device: torch.device | None = None,
    ):
        """`device`: where the average is stored; defaults to the device of the weights."""
        self.decay, self.world, self.parameters = decay, world, parameters
        self.shadow = {
            name: local(p).detach().to(device, torch.float32, copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Update the average with the weights after `update` (0-based).

        The decay is warmed up: it is at most (1 + n) / (10 + n) after update n.
        """
        decay = min(self.decay, (1 + update) / (10 + update))
        for name, parameter in self.parameters.items():
            shadow = self.shadow[name]
            shadow.lerp_(local(parameter).to(shadow), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context manager in which the networks hold the averaged weights."""
        kept = {name: local(p).clone() for name, p in self.parameters.items()}
        self._take(self.shadow)
        try:
            yield
        finally:
            self._take(kept)

    def _take(self, values: dict[str, torch.Tensor]) -> None:
        """Copy `values` into the networks.

        ZeRO-3 keeps full copies of small parameters. They are released first, or they would be used instead.
        """
        whole = [p for p in self.parameters.values() if hasattr(p, "ds_status") and p.ds_status.name == "AVAILABLE"]
        if whole:
            whole[0].partition(whole, has_been_updated=False)
        for name, parameter in self.parameters.items():
            local(parameter).copy_(values[name])

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Load this rank's part of the average from full tensors."""
        for name, shadow in self.shadow.items():
            whole, n = state[name].flatten().float(), shadow.numel()
            if whole.numel() != n:  # a ZeRO-3 partition: the flat tensor is split evenly, the last part is padded
                whole = whole[self.world.rank * n : (self.world.rank + 1) * n]
            shadow.flatten()[: whole.numel()].copy_(whole)
