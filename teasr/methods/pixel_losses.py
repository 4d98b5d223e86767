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


class WithLpips(Method):
    """A method that owns a frozen LPIPS network; its config has lambda_lpips, lpips_net and lpips_weights."""

    def __init__(self, config: Any, lpips: nn.Module | None = None):
        """`lpips`: the metric network; if None, `load` builds it when lambda_lpips > 0."""
        super().__init__(config)
        self.lpips = lpips

    def load(self) -> None:
        if self.config.lambda_lpips and self.lpips is None:
            self.lpips = perceptual.load_lpips(self.config.lpips_net, self.config.lpips_weights == "pretrained")

    @classmethod
    def with_random_weights(cls, config: Any) -> Any:
        return replace(config, lpips_weights="random")

    def to(self, device: torch.device) -> None:
        if self.lpips is not None:
            self.lpips.to(device)

    def memory_groups(self) -> dict[str, list[Tensor]]:
        return {} if self.lpips is None else {"LPIPS": [*self.lpips.parameters(), *self.lpips.buffers()]}


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
