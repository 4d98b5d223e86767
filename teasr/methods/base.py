"""What a method is to the rest of teasr: the roles that it trains, their losses, and the sampler that restores with its student.

A method is one paper in one file. The trainer back-propagates each loss as soon as it is yielded and only then asks for the next one, so that
no two graphs are alive at once. All losses of an update are computed with the weights from before it, and all roles step together: for methods
that step their networks in turn, one to one, this is the same trajectory. A method sees models, `flow` and `losses`; never DeepSpeed, MLflow or
a particular backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.data.batch import Batch
from teasr.methods.sampler import Sampler
from teasr.util.randomness import Draws


@dataclass(frozen=True)
class Progress:
    """Where the run is: `update` of `updates`, and which micro-batch of the update (`micro` of `micros`)."""

    update: int
    updates: int
    micro: int = 0
    micros: int = 1


@dataclass
class Loss:
    """A scalar to back-propagate now, the role whose base it is back-propagated through, and numbers to log with it."""

    name: str
    role: str
    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """One paper."""

    cycle = 1  # micro-batches after which the work repeats: an update has a multiple of them

    def __init__(self, config: Any):
        """Cheap: `load` builds what takes long or needs files."""
        self.config = config

    @abstractmethod
    def roles(self) -> tuple[Role, ...]:
        """The networks; the first is the student, which is averaged, previewed, exported and restored with."""

    @abstractmethod
    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        """Yield the losses of one micro-batch in order; each graph is freed before the next loss is asked for.

        In every update each trained role must get a loss, and each of its parameters a gradient.
        """

    @abstractmethod
    def sampler(self) -> Sampler:
        """How the student restores: which numbers of steps, and which dials."""

    @classmethod
    def with_random_weights(cls, config: Any) -> Any:
        """The config of the same work on random weights, for which no file is needed."""
        return config

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        """The factor of each logged loss in the total at this point of the run."""
        return {}

    def load(self) -> None:  # noqa: B027 - most methods hold no networks of their own
        """Build the frozen networks that the method itself holds (a perceptual metric). ValueError when files lack."""

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move them."""

    def memory_groups(self) -> dict[str, list[Tensor]]:
        """Their tensors, by what they are for."""
        return {}

    def check(self, accumulation: int) -> None:
        """Raise ValueError when this method cannot run with so many micro-batches an update."""
        if accumulation % self.cycle:
            raise ValueError(
                f"the method spreads its work over the micro-batches of an update, {accumulation} is not a multiple of "
                f"{self.cycle}: set train.batch and train.micro_batch so that there are {self.cycle}, {2 * self.cycle}, .. "
                "or use method.mode=all"
            )
