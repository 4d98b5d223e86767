"""Losses of decoded images, such as MSE and LPIPS (TEASR eqs. 12-13), for every method whose student makes an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from teasr.backbones.model import Model
from teasr.diffusion import losses, perceptual
from teasr.methods.base import Method

Distance = Callable[[Tensor, Tensor], Tensor]


class WithMetrics(Method):
    """A method that owns frozen LPIPS and DISTS networks for its losses.

    Its config has lambda_lpips, lpips_net and lpips_weights and, if it can use DISTS, `uses_dists` and dists_weights.
    """

    def __init__(self, config: Any, lpips: nn.Module | None = None, dists: nn.Module | None = None):
        """`lpips`, `dists`: the metric networks; `load` builds those that are needed and None."""
        super().__init__(config)
        self.lpips, self.dists = lpips, dists

    def load(self) -> None:
        if self.config.lambda_lpips and self.lpips is None:
            self.lpips = perceptual.load_lpips(self.config.lpips_net, self.config.lpips_weights == "pretrained")
        if getattr(self.config, "uses_dists", False) and self.dists is None:
            self.dists = perceptual.load_dists(self.config.dists_weights == "pretrained")

    @classmethod
    def with_random_weights(cls, config: Any) -> Any:
        dists = {"dists_weights": "random"} if hasattr(config, "dists_weights") else {}
        return replace(config, lpips_weights="random", **dists)

    def to(self, device: torch.device) -> None:
        for network in (self.lpips, self.dists):
            if network is not None:
                network.to(device)

    def memory_groups(self) -> dict[str, list[Tensor]]:
        networks = {"LPIPS": self.lpips, "DISTS": self.dists}
        return {name: [*n.parameters(), *n.buffers()] for name, n in networks.items() if n is not None}


def of_rows(distance: Distance | None, rows: slice, factors: Tensor | None) -> Distance:
    """Return the distance of some of the images, times their factors (`data.perceptual`) if there are any."""

    def distances(x: Tensor, y: Tensor) -> Tensor:
        found = distance(x[rows], y[rows]).flatten()
        return found if factors is None else found * factors[rows]

    return distances


def pixel_gradient(
    student: Model,
    z_hat: Tensor,
    x_hq: Tensor,
    weight: Mapping[str, float],
    lpips: Distance | None,
    others: Mapping[str, Distance] | None = None,
    mse: Distance = losses.mse,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the weighted pixel losses at an estimate of the clean latent, their gradient, and values to log.

    weight: factors of `mse`, `lpips` and of the names in `others`; a loss with factor 0 is not computed. lpips and
    others: distances of (x_hat, x_hq), [B] each. mse(x_hat, x_hq): a scalar, of the pictures themselves or blurred. The
    decoder's graph is freed before this returns.
    """
    logs: dict[str, Tensor] = {}

    def pixel_losses(z: Tensor) -> Tensor:
        x_hat, total = student.decode(z), torch.zeros((), device=z.device)
        logs["checkerboard"] = losses.checkerboard_energy(x_hat.detach(), student.patch_px)
        if weight["mse"]:
            loss = mse(x_hat, x_hq)
            logs["mse"], total = loss.detach(), total + weight["mse"] * loss
        for name, distance in {"lpips": lpips, **(others or {})}.items():
            if weight[name]:
                loss = distance(x_hat, x_hq).mean()
                logs[name], total = loss.detach(), total + weight[name] * loss
        return total

    return *losses.gradient_through(pixel_losses, z_hat), logs
