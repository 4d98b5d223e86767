"""Interface of a training method: its roles, their losses, and the sampler that restores with its student.

A method implements one paper in one file. The trainer back-propagates each loss as soon as it is yielded and only then
requests the next one, so that only one graph is in memory at a time. All losses of an update are computed with the
weights from before the update, and all roles step together. For methods that step their networks alternately, one step
each, this gives the same trajectory. A method uses models, `flow` and `losses`, but never DeepSpeed, MLflow or a
specific backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.data.batch import Batch
from teasr.methods.sampler import Sampler
from teasr.util.randomness import Draws


@dataclass(frozen=True)
class Progress:
    """Position in the run: update `update` of `updates`, and micro-batch `micro` of `micros` within the update."""

    update: int
    updates: int
    micro: int = 0
    micros: int = 1


def require_loss(config: Any, names: Iterable[str]) -> None:
    """Raise ValueError if every `lambda_<name>` of a method's config is 0."""
    if not any(getattr(config, f"lambda_{name}") for name in names):
        raise ValueError("every method.lambda_* is 0: there is nothing to train; set at least one above 0")


@dataclass(frozen=True)
class Ramp:
    """A factor that is zero until `start` and then rises linearly to one over `length`; both are in `unit`."""

    start: Annotated[float, "[0, inf)"]
    length: Annotated[float, "[0, inf)"]
    unit: Literal["updates", "fraction"] = "updates"  # fraction: of the whole run

    def __post_init__(self):
        if self.start < 0 or self.length < 0:
            raise ValueError(f"a ramp needs start >= 0 and length >= 0, got start={self.start} length={self.length}")
        if self.unit == "fraction" and self.start + self.length > 1:
            raise ValueError(
                f"a ramp with unit=fraction ends at {self.start + self.length:g} of the run: "
                "start + length must be <= 1"
            )

    def factor(self, progress: Progress) -> float:
        """Return the factor at `progress`: 0 before the start, 1 after the end."""
        at = progress.update / progress.updates if self.unit == "fraction" else progress.update
        if at < self.start:
            return 0.0
        return min(1.0, (at - self.start) / self.length) if self.length else 1.0


@torch.no_grad()
def latents(model: Model, batch: Batch, hq: bool = True) -> tuple[Tensor | None, Tensor]:
    """Return the latents (z_hq, z_lq) of a batch: cached ones if the batch has them, else the images are encoded.

    hq: false if the HQ latent is not needed; it is then not encoded, and None without a cache. z_lq is what the model's
    encoder adapter takes, if it has one (`Model.encode_lq`).
    """
    if batch.z_hq is not None and batch.z_lq is not None:
        return batch.z_hq, batch.z_lq
    return model.encode(batch.x_hq) if hq else None, model.encode_lq(batch.x_lq)


def with_captions(models: Mapping[str, Model], batch: Batch) -> Mapping[str, Model]:
    """Return the models with the captions of a batch, if it has any, in the place of the backbone's prompt.

    Roles on the base `prior`, which may have other text encoders, keep their prompt.
    """
    if batch.text is None:
        return models
    return {name: m.with_text(batch.text) if m.role.base == "main" else m for name, m in models.items()}


@dataclass
class Loss:
    """A scalar to back-propagate, the role through whose base it is back-propagated, and values to log with it."""

    name: str
    role: str
    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """Base class of training methods, one subclass per paper."""

    by_block = False  # its network calls pass through each block of the network together (`Model.velocities`)
    one_backward = False  # so that each micro-batch has one backward pass, which finishes one block after another
    cycle = 1  # the work repeats after this many micro-batches; an update must have a multiple of it

    def __init__(self, config: Any):
        """Store the config. This must be cheap: work that is slow or needs files belongs in `load`."""
        self.config = config

    @abstractmethod
    def roles(self) -> tuple[Role, ...]:
        """Return the networks. The first is the student, which is averaged, previewed, exported and used to restore."""

    @abstractmethod
    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        """Yield the losses of one micro-batch in order; each graph is freed before the next loss is requested.

        The models have the captions of this batch, if it has any; for a part of it, use `with_captions`.

        In every update, each trained role must get a loss and each of its parameters a gradient.
        """

    @abstractmethod
    def sampler(self) -> Sampler:
        """Return the sampler of the student, which defines the supported step counts and the dials."""

    @classmethod
    def with_random_weights(cls, config: Any) -> Any:
        """Return the config of the same computation with random weights, which needs no files."""
        return config

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        """Return the factor of each logged loss in the total at this point of the run."""
        return {}

    def load(self) -> None:  # noqa: B027 - most methods hold no networks of their own
        """Build the frozen networks that the method itself owns, such as a perceptual metric.

        Raises ValueError when their files are missing.
        """

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move these networks to `device`."""

    def memory_groups(self) -> dict[str, list[Tensor]]:
        """Return the tensors of these networks, grouped by purpose."""
        return {}

    def check_models(self, models: Mapping[str, Model]) -> None:  # noqa: B027 - most methods run on every backbone
        """Raise ValueError when the backbone of a role cannot do what this method needs of it."""

    def check(self, accumulation: int) -> None:
        """Raise ValueError when this method cannot run with `accumulation` micro-batches per update."""
        if accumulation % self.cycle:
            raise ValueError(
                f"the method distributes its losses over {self.cycle} micro-batches, but an update has {accumulation}, "
                f"which is not a multiple of {self.cycle}: set train.batch and train.micro_batch so that each rank has "
                f"{self.cycle}, {2 * self.cycle}, ... micro-batches per update, or set method.mode=all"
            )
