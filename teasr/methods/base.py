"""What a method is to the trainer: named networks, and loss terms that come one at a time.

The trainer back-propagates each term as soon as it is yielded and only then asks for the next, so that no two graphs
are alive at once. A method sees backbones, `flow` and `losses`; never DeepSpeed, MLflow or a concrete backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.data.batch import Batch
from teasr.util.randomness import Draws


@dataclass(frozen=True)
class Progress:
    """Where the run is: `update` of `updates`, and which micro-batch of the update (`micro` of `micros`)."""

    update: int
    updates: int
    micro: int = 0
    micros: int = 1


@dataclass
class Term:
    """A scalar to back-propagate now, through the network it names, and what to log with it."""

    name: str
    network: str
    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """One paper."""

    frozen: tuple[str, ...] = ()  # those of `networks` that are never trained
    cycle = 1  # micro-batches after which the work repeats: an update has a multiple of them
    networks: tuple[str, ...]  # the first is the one that is averaged, exported and used for restoring

    @abstractmethod
    def terms(self, networks: dict[str, Backbone], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Term]:
        """Yield the loss terms of one micro-batch in order; each graph may be freed before the next is built."""

    @classmethod
    def weightless(cls, config: Any) -> Any:
        """The config of the same work on random weights, for which no file is needed."""
        return config

    def weights(self, progress: Progress) -> dict[str, float]:
        """Weight of each logged term in the total at this point of the run."""
        return {}

    def to(self, device: torch.device) -> None:  # noqa: B027 - most methods hold no networks of their own
        """Move what the method itself holds (a perceptual metric)."""

    def memory_groups(self) -> dict[str, list[Tensor]]:
        """Frozen tensors that the method itself holds, by what they are for."""
        return {}

    def check(self, accumulation: int) -> None:
        """Raise ValueError when this method cannot run with so many micro-batches an update."""
        if accumulation % self.cycle:
            raise ValueError(
                f"the method spreads its work over the micro-batches of an update, {accumulation} is not a multiple of "
                f"{self.cycle}: set train.batch and train.micro_batch so that there are {self.cycle}, {2 * self.cycle}, .. "
                "or use method.mode=all"
            )
