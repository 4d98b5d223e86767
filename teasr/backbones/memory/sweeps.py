"""Block-major order: several calls of a network pass through each block together, forwards and backwards.

Swapped weights are then copied, and quantised weights expanded, once for all calls that are in the block. In a forward
sweep nothing but the inputs of the blocks is kept. The backward sweep goes through the blocks once in reverse and
recomputes each of them for one call after another, so only one block of one call has a graph at a time. Known as L2L
(arXiv 2002.05645) and as vertical scheduling (GreedySnake, arXiv 2512.17570).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from teasr.backbones.memory.checkpoints import HostCheckpoints
from teasr.backbones.memory.quantised import expanded_once

Tokens = tuple[Tensor | None, ...]


@dataclass(eq=False)
class Pass:
    """One call of a network on its way through the blocks."""

    tokens: Tokens  # before the first block; they may carry a graph
    others: Callable[[int], dict[str, Any]]  # the arguments of block i besides the tokens; they carry no graph
    end: Callable[[Tokens], Tensor]  # from the tokens after the last block to the output
    # whether a gradient goes back through the call
    graph: bool = field(default_factory=torch.is_grad_enabled)
    inputs: list[tuple] = field(default_factory=list)  # of each block, as `Sweeps` keeps them
    leaves: Tokens = ()  # the tokens after the last block, on which the graph of `end` and of the losses begins
    gradients: Tokens = ()  # with respect to the tokens that the backward sweep has arrived at


class Sweeps:
    """The sweeps of one loss: forward sweeps with `run`, then one backward sweep through all of their calls.

    a, b = sweeps.run([first, second])
    (c,) = sweeps.run([third_which_depends_on(a)])
    sweeps.joined(loss(a, b, c)).backward()
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        begin: Callable[..., Pass],
        checkpoints: HostCheckpoints | None = None,
        finished: Callable[[nn.Module], None] | None = None,
    ):
        """blocks: each has a function `compute` of a call's tokens and other arguments, and a swapped one a function
        `fetch` (swapping.py), which is called once a visit.

        begin: takes the arguments of `RoleNet.predict` and returns the call as a `Pass`. checkpoints: where the inputs
        of the blocks are kept; None: on the device. finished: called in the backward sweep with each block whose
        gradients are complete.
        """
        self.blocks, self.begin, self.checkpoints, self.finished = blocks, begin, checkpoints, finished
        self.passes: list[Pass] = []  # those with a graph
        self.loss: Tensor | None = None

    def run(self, passes: Sequence[Pass]) -> list[Tensor]:
        """Sweep forwards with these calls; return their outputs.

        An output of a call with a graph can be differentiated by the loss that `joined` gets, but it leads no further
        back: a later call must not depend on it through a graph.
        """
        tokens = [tuple(None if x is None else x.detach() for x in p.tokens) for p in passes]
        with torch.no_grad():
            for i in range(len(self.blocks)):
                with self._visit(i):
                    for k, p in enumerate(passes):
                        if p.graph:
                            p.inputs.append(self._keep(tokens[k]))
                        tokens[k] = self.blocks[i].compute(*tokens[k], **p.others(i))
        self.passes += [p for p in passes if p.graph]
        return [self._output(p, last) for p, last in zip(passes, tokens, strict=True)]

    @staticmethod
    def _output(p: Pass, tokens: Tokens) -> Tensor:
        if not p.graph:
            with torch.no_grad():
                return p.end(tokens)
        p.leaves = tuple(None if x is None else x.detach().requires_grad_() for x in tokens)
        return p.end(p.leaves)

    def _keep(self, tokens: Tokens) -> tuple:
        keep = self.checkpoints
        return tokens if keep is None else tuple(None if x is None else keep.put(x) for x in tokens)

    def _kept(self, kept: tuple) -> Tokens:
        keep = self.checkpoints
        return kept if keep is None else tuple(None if x is None else keep.get(x) for x in kept)

    def _fetch(self, p: Pass) -> None:
        """Begin to copy back the inputs that will be needed next."""
        if self.checkpoints is not None and p.inputs:
            for kept in p.inputs[-1]:
                if kept is not None:
                    self.checkpoints.fetch(kept)

    def joined(self, loss: Tensor) -> Tensor:
        """Return a scalar with the value of `loss`, whose backward pass is the backward sweep."""
        self.loss = loss
        return _BackwardSweep.apply(loss.detach().requires_grad_(), self)

    @contextlib.contextmanager
    def _visit(self, i: int) -> Iterator[None]:
        """Context in which the weights of block i are there."""
        block = self.blocks[i]
        if block.fetch is not None:
            block.fetch()
        with expanded_once(block):
            yield

    def backward(self, gradient: Tensor) -> None:
        """Add the gradient of the joined loss, times `gradient`, to that of every parameter of the network."""
        leaves = [x for p in self.passes for x in p.leaves if x is not None]
        found = iter(torch.autograd.grad(self.loss, leaves, gradient, allow_unused=True))
        self.loss = None
        for p in self.passes:
            p.gradients, p.leaves = tuple(None if x is None else next(found) for x in p.leaves), ()
        with torch.enable_grad():
            for i in reversed(range(len(self.blocks))):
                with self._visit(i):
                    for k, p in enumerate(self.passes):
                        inputs = self._kept(p.inputs.pop())
                        self._fetch(self.passes[(k + 1) % len(self.passes)])
                        p.gradients = self._through(p, i, inputs)
                if self.finished is not None:
                    self.finished(self.blocks[i])
        for p in self.passes:
            _backward(p.tokens, p.gradients)
        self.passes = []

    def _through(self, p: Pass, i: int, inputs: Tokens) -> Tokens:
        """Recompute block i for one call, and return the gradients of its inputs from those of its outputs."""
        inputs = tuple(
            # from the first block on, all tokens depend on parameters
            None if x is None else x.detach().requires_grad_(i > 0 or first.requires_grad)
            for x, first in zip(inputs, p.tokens, strict=True)
        )
        _backward(self.blocks[i].compute(*inputs, **p.others(i)), p.gradients)
        return tuple(None if x is None else x.grad for x in inputs)


def _backward(tokens: Tokens, gradients: Tokens) -> None:
    """Go back from those tokens that have a graph and a gradient."""
    pairs = [(x, g) for x, g in zip(tokens, gradients, strict=True) if g is not None and x.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))


class _BackwardSweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, sweeps: Sweeps) -> Tensor:
        ctx.sweeps = sweeps
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        ctx.sweeps.backward(gradient)
        return None, None
