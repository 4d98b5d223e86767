"""Random numbers as a pure function of (seed, update, sample, purpose), with no global state to save for a resume.

A sample of the global batch gets the same noise on any rank, so the results do not depend on the number of ranks.
Disabling one loss does not change the random numbers of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teasr.util.seed import seed_of


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch. `samples`: position of each row in the global batch of this update."""

    seed: int
    update: int
    samples: tuple[int, ...]
    device: torch.device | str = "cpu"

    def rows(self, part: slice) -> Draws:
        """Return the draws of some of the samples."""
        return replace(self, samples=self.samples[part])

    def _generator(self, sample: int | str, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, self.update, sample, purpose))

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal noise in the shape of `like` [B, ...]: float32 (float64 if `like` is float64)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        rows = [torch.randn(like.shape[1:], generator=self._generator(n, purpose), dtype=dtype) for n in self.samples]
        return torch.stack(rows).to(self.device)

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """One number per sample, uniform in [low, high): float32 [B]."""
        rows = [torch.rand((), generator=self._generator(n, purpose)) for n in self.samples]
        return (low + (high - low) * torch.stack(rows)).to(self.device)

    def shared_uniform(self, purpose: str) -> float:
        """One number, uniform in [0, 1), for the whole update; equal on every rank."""
        return torch.rand((), generator=self._generator("all", purpose)).item()
