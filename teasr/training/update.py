"""One update: the losses of all micro-batches one after another, checks, clipping, and the step of every engine.

The trainer, the dry run, the benchmarks and the tests all go through `backpropagate`. All backward passes of an update run inside one
`coalesce_grad_reduction` block of each engine: without it ZeRO-1 and ZeRO-2 drop all but the last of several backward passes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.config.settings import TrainConfig
from teasr.data.batch import Batch
from teasr.methods.base import Method, Progress
from teasr.training.engine import set_rate
from teasr.training.networks import Networks
from teasr.util.distributed import World
from teasr.util.randomness import Draws


def backpropagate(
    method: Method,
    models: Mapping[str, Model],
    batches: Sequence[Batch],
    seed: int,
    progress: Progress,
    backward: Callable[[str, Tensor], None],
    ranks: tuple[int, int] = (0, 1),
    freed: Callable[[str], None] = lambda name: None,
) -> dict[str, Tensor]:
    """Every loss of every micro-batch, one graph alive at a time; returns the means of what the losses log on this rank.

    backward(role, value) gets each loss divided by the number of micro-batches; freed(name) is called once its graph is gone. ranks: this
    one and how many there are. Every rank must make the same losses in the same order.
    """
    sums: dict[str, list[Tensor]] = {}
    rank, world = ranks
    for i, batch in enumerate(batches):
        b = len(batch.keys)
        samples = tuple((i * b + j) * world + rank for j in range(b))
        draws = Draws(seed, progress.update, samples, batch.x_hq.device)
        for loss in method.losses(models, batch, draws, replace(progress, micro=i, micros=len(batches))):
            backward(loss.role, loss.value / len(batches))
            for name, value in loss.logs.items():
                sums.setdefault(name, []).append(value.detach())
            name = loss.name
            del loss
            freed(name)
    return {name: torch.stack(values).mean() for name, values in sums.items()}


class Update:
    """The update of a run with DeepSpeed engines, one a trained base."""

    def __init__(self, method: Method, networks: Networks, engines: dict, train: TrainConfig, seed: int, world: World):
        """engines: by place, as `networks.trained_bases`."""
        self.method, self.networks, self.engines = method, networks, engines
        self.train, self.seed, self.world = train, seed, world
        self.parameters = {role.name: networks.base(role.name).trained(role.name) for role in networks.trained_roles}
        shared = [place for place, base in networks.trained_bases.items() if len(self._trained_on(base.roles)) > 1]
        self.clipped = [role for role in networks.trained_roles if role.place in shared]

    def _trained_on(self, roles: Sequence[Role]) -> list[Role]:
        return [role for role in roles if role.trains != "nothing"]

    def __call__(
        self,
        update: int,
        batches: Sequence[Batch],
        flags: Mapping[str, float],
        note: Callable[[str], None] = lambda text: None,
        freed: Callable[[str], None] = lambda name: None,
    ) -> dict[str, float]:
        """All losses of all micro-batches, then one optimiser step of every role; returns what to log, means over all ranks.

        Where a loss or a gradient of any rank is not finite, all ranks leave the weights as they are, and `note` is told what it was.
        flags: numbers of this rank that are averaged with the rest. ValueError when a trained parameter got no gradient.
        """
        progress = Progress(update, self.train.updates)
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.coalesce_grad_reduction())
            ranks = (self.world.rank, self.world.size)
            models = self.networks.models
            means = backpropagate(self.method, models, batches, self.seed, progress, self._backward, ranks, freed)
            wrong = self._not_finite(means)
            told = dict(flags) | {"skipped": bool(wrong)}
            logs = self.world.mean(means | {name: torch.tensor(float(value)) for name, value in told.items()})
            skipped = logs["skipped"] > 0
            if skipped:
                self._clear_gradients()
            norms = {} if skipped else {role.name: self._clip(role) for role in self.clipped}
        if skipped:
            if wrong:
                keys = ", ".join(key for batch in batches for key in batch.keys[:4])
                note(f"{', '.join(wrong)} not finite, update skipped (samples {keys})")
            return {name: logs[name] for name in flags} | {"skipped": 1.0}
        rate = self.train.rate(update)
        for place, engine in self.engines.items():
            set_rate(engine, rate)
            engine.step()
            if not any(role.place == place for role in self.clipped):
                (role,) = self._trained_on(self.networks.bases[place].roles)
                norms[role.name] = float(engine.get_global_grad_norm())
        weights = self.method.loss_weights(progress)
        loss = sum(weight * logs.get(name, 0.0) for name, weight in weights.items())
        by_role = {f"grad_norm/{name}": norm for name, norm in norms.items()} if len(norms) > 1 else {}
        whole = {"grad_norm": math.hypot(*norms.values())} | by_role | {"learning_rate": rate}
        return {"loss": loss} | logs | {"skipped": 0.0} | whole

    def _backward(self, role: str, value: Tensor) -> None:
        self.engines[self.networks.roles[role].place].backward(value)

    def _gradients(self) -> list[Tensor]:
        """What the backward passes of this update have left on this rank; ValueError where a trained parameter has none."""
        found = [p.grad for own in self.parameters.values() for p in own.values() if p.grad is not None]
        if len(found) < sum(map(len, self.parameters.values())):
            role, name = next((r, n) for r, own in self.parameters.items() for n, p in own.items() if p.grad is None)
            raise ValueError(
                f"role {role}: no loss of this update reached its parameter {name}. DeepSpeed would take the gradient of an earlier update in "
                "its place; every trained parameter needs a gradient in every update (are all loss weights of the role zero?)"
            )
        return found

    def _not_finite(self, means: dict[str, Tensor]) -> list[str]:
        """Names of what is not finite on this rank."""
        wrong = [name for name, value in means.items() if not bool(torch.isfinite(value))]
        norms = torch._foreach_norm(self._gradients())
        return wrong if bool(torch.isfinite(torch.stack(norms)).all()) else [*wrong, "gradient"]

    def _clear_gradients(self) -> None:
        """To zero, and not away: ZeRO-3 would take those of an earlier update in their place."""
        for gradient in self._gradients():
            gradient.zero_()

    def _clip(self, role: Role) -> float:
        """Clip the gradient of one of several roles on an engine, and return its norm before.

        DeepSpeed only clips the joint norm, so this averages over the ranks itself; the engine's own average of equal numbers is then a
        no-op. Twice the communication, of LoRA sets alone.
        """
        gradients = [p.grad for p in self.parameters[role.name].values()]
        if self.world.size > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            torch.distributed.all_reduce(flat)
            flat /= self.world.size
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        most = self.train.clip_norm if role.clip_norm is None else role.clip_norm
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)
