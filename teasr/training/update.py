"""One update: the losses of all micro-batches, checks for non-finite values, clipping, and a step of every engine.

The trainer, the dry run, the benchmarks and the tests all use `backpropagate`. All backward passes of an update run
inside one `coalesce_grad_reduction` block of each engine; without it, ZeRO-1 and ZeRO-2 keep the gradients of the last
backward pass only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from teasr.backbones.model import Model
from teasr.backbones.roles import Role, places
from teasr.config.settings import TrainConfig
from teasr.data.batch import Batch
from teasr.methods.base import Method, Progress, with_captions
from teasr.training.engine import Departure, forget_update, set_rate
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
    """Backpropagate every loss of every micro-batch, with one graph alive at a time.

    `backward(role, value)` receives each loss divided by the number of micro-batches; `freed(name)` is called once its
    graph has been freed. `ranks`: this rank and the number of ranks. Every rank must produce the same losses in the
    same order. Returns the means of the logged values on this rank.
    """
    sums: dict[str, list[Tensor]] = {}
    rank, world = ranks
    for i, batch in enumerate(batches):
        b = len(batch.keys)
        samples = tuple((i * b + j) * world + rank for j in range(b))
        draws = Draws(seed, progress.update, samples, batch.x_hq.device)
        told, at = with_captions(models, batch), replace(progress, micro=i, micros=len(batches))
        for loss in method.losses(told, batch, draws, at):
            backward(loss.role, loss.value / len(batches))
            for name, value in loss.logs.items():
                sums.setdefault(name, []).append(value.detach())
            name = loss.name
            del loss
            freed(name)
    return {name: torch.stack(values).mean() for name, values in sums.items()}


class Update:
    """The update of a run with DeepSpeed engines, one for each trained base."""

    def __init__(self, method: Method, networks: Networks, engines: dict, train: TrainConfig, seed: int, world: World):
        """`engines`: by place, with the keys of `networks.trained_bases`."""
        self.method, self.networks, self.engines = method, networks, engines
        self.train, self.seed, self.world = train, seed, world
        self.parameters = {role.name: networks.base(role.name).trained(role.name) for role in networks.trained_roles}
        # roles that share an engine are clipped here; DeepSpeed clips the only role of an engine
        by_engine = places(networks.trained_roles).values()
        self.clipped = [role for roles in by_engine if len(roles) > 1 for role in roles]
        self.alone = {roles[0].place: roles[0].name for roles in by_engine if len(roles) == 1}
        self.departures: list[Departure] = []  # of this update

    def __call__(
        self,
        update: int,
        batches: Sequence[Batch],
        flags: Mapping[str, float],
        note: Callable[[str], None] = lambda text: None,
        freed: Callable[[str], None] = lambda name: None,
    ) -> dict[str, float]:
        """Backpropagate all losses of all micro-batches, then do one optimiser step of every role.

        Returns the values to log, as means over all ranks. If a loss or a gradient is not finite on any rank, all ranks
        skip the step, and `note` is called with a description on the ranks where it happened. `flags`: numbers of this
        rank to average as well. Raises ValueError when a trained parameter has no gradient.
        """
        progress = Progress(update, self.train.updates)
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.coalesce_grad_reduction())
            self._let_gradients_leave(len(batches))
            ranks = (self.world.rank, self.world.size)
            models = self.networks.models
            means = backpropagate(self.method, models, batches, self.seed, progress, self._backward, ranks, freed)
            for departure in self.departures:
                departure.finish()
            wrong = self._not_finite(means)
            averaged = dict(flags) | {"skipped": bool(wrong)}
            logs = self.world.mean(means | {name: torch.tensor(float(value)) for name, value in averaged.items()})
            skipped = logs["skipped"] > 0
            if skipped:
                self._clear_gradients()
            norms = {} if skipped else {role.name: self._clip(role) for role in self.clipped}
        if skipped:
            if wrong:
                keys = ", ".join(key for batch in batches for key in batch.keys[:4])
                note(f"{', '.join(wrong)} not finite, update skipped (samples {keys})")
            for engine in self.engines.values():
                forget_update(engine)
            return {name: logs[name] for name in flags} | {"skipped": 1.0}
        rate = self.train.rate(update)
        for place, engine in self.engines.items():
            set_rate(engine, rate)
            engine.step()
            if place in self.alone:
                norms[self.alone[place]] = float(engine.get_global_grad_norm())
        weights = self.method.loss_weights(progress)
        loss = sum(weight * logs.get(name, 0.0) for name, weight in weights.items())
        by_role = {f"grad_norm/{name}": norm for name, norm in norms.items()} if len(norms) > 1 else {}
        step_logs = {"grad_norm": math.hypot(*norms.values())} | by_role | {"learning_rate": rate}
        return {"loss": loss} | logs | {"skipped": 0.0} | step_logs

    def _backward(self, role: str, value: Tensor) -> None:
        self.engines[self.networks.roles[role].place].backward(value)

    def _let_gradients_leave(self, micros: int) -> None:
        """Let gradients leave the GPU block by block if one backward pass of this update completes them."""
        self.departures = []
        for place, engine in self.engines.items():
            taking = micros == 1 and self.method.one_backward and engine.takes_gradients
            if taking:
                self.departures.append(Departure(engine))
            self.networks.bases[place].block_finished = self.departures[-1].take if taking else None

    def _gradients(self) -> list[Tensor]:
        """Gradients of this update that are still on this rank. Raises ValueError when a trained parameter had none."""
        gone = {p for departure in self.departures for p in departure.gone}
        found = [p.grad for own in self.parameters.values() for p in own.values() if p.grad is not None]
        if len(found) + len(gone) < sum(map(len, self.parameters.values())):
            role, name = next(
                (r, n) for r, own in self.parameters.items() for n, p in own.items() if p.grad is None and p not in gone
            )
            raise ValueError(
                f"role {role}: no loss of this update reached its parameter {name}. DeepSpeed would use the gradient "
                "of an earlier update instead; every trained parameter needs a gradient in every update: check that "
                "not all loss weights of the role are zero"
            )
        return found

    def _not_finite(self, means: dict[str, Tensor]) -> list[str]:
        """Names of logged values that are not finite on this rank, and "gradient" if a gradient is not."""
        wrong = [name for name, value in means.items() if not bool(torch.isfinite(value))]
        here, norms = self._gradients(), [norm for departure in self.departures for norm in departure.norms]
        norms += torch._foreach_norm(here) if here else []
        return wrong if bool(torch.isfinite(torch.stack(norms)).all()) else [*wrong, "gradient"]

    def _clear_gradients(self) -> None:
        """Set gradients to zero rather than None: with None, ZeRO-3 would use those of an earlier update."""
        for gradient in self._gradients():
            gradient.zero_()

    def _clip(self, role: Role) -> float:
        """Clip the gradient of one of several roles on an engine; return its norm before clipping.

        DeepSpeed only clips the joint norm, so the gradients are averaged over the ranks here first. The engine
        averages them again, which does not change equal values. This doubles the communication, but only for LoRA
        parameters.
        """
        gradients = [p.grad for p in self.parameters[role.name].values()]
        if self.world.size > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            torch.distributed.all_reduce(flat)
            flat /= self.world.size
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        max_norm = self.train.clip_norm if role.clip_norm is None else role.clip_norm
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)
