"""Activation checkpoints in host memory: the inputs of recomputed blocks, kept there between the passes.

Each is copied to locked host memory beside the computation, which uses the direction of the link that swapped weights
leave free. It comes back one block ahead of its use, beside the computation too. All copies are made on one stream, in
the order in which they were begun, so that a buffer is written only after its last copy to the device.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch import Tensor

from teasr.backbones.memory.swapping import Copier, HostArena


class HostCheckpoints:
    """Tensors in host memory. Buffers are reused, so that memory is locked once for each size."""

    def __init__(self, device: torch.device, copier: Copier | None = None):
        """`device`: where the tensors come from and return to."""
        self.device, self.arena = device, HostArena(device)
        self.copier = Copier(device) if copier is None else copier
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor | None]] = defaultdict(list)
        self.block: list[weakref.ref[Kept]] = []  # the inputs of the last block in `hooks`
        self.host_bytes = 0  # of all buffers
        self.copied_bytes = 0  # back to the device, so far

    def put(self, x: Tensor) -> Kept:
        """Begin to copy a tensor to the host, once the work queued so far is done."""
        free = self.free[x.shape, x.dtype]
        if free:
            buffer = free.pop()
        else:
            buffer = None if self.device.type == "meta" else self.arena.empty((x.numel(),), x.dtype)
            self.host_bytes += x.nbytes
        if buffer is not None:
            source = x.detach().reshape(-1)
            self.copier.start(buffer, source)
            self.copier.keep(source)
        return Kept(self, x.shape, x.dtype, buffer)

    def fetch(self, kept: Kept) -> None:
        """Begin to copy the tensor back, unless it is on its way."""
        if kept.x is not None:
            return
        kept.x = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        self.copied_bytes += kept.x.nbytes
        if kept.buffer is not None:
            self.copier.keep(kept.x)
            kept.copy = self.copier.start(kept.x.view(-1), kept.buffer)

    def get(self, kept: Kept) -> Tensor:
        """Return the tensor on the device, for work that is queued from now on."""
        self.fetch(kept)
        self.copier.wait(kept.copy)
        return kept.x

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Context in which `torch.utils.checkpoint` keeps the inputs of one block, which it recomputes, here.

        When they are needed, those of the block before begin to come back, too.
        """
        before, self.block = self.block, []
        block = self.block

        def pack(x: Tensor) -> Tensor | Kept:
            if not x.numel():
                return x
            kept = self.put(x)
            block.append(weakref.ref(kept))
            return kept

        def unpack(kept: Tensor | Kept) -> Tensor:
            if not isinstance(kept, Kept):
                return kept
            for other in (*block, *before):
                if (found := other()) is not None:
                    self.fetch(found)
            return self.get(kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Kept:
    """One tensor in host memory, whose buffer is used again when this object is deleted."""

    def __init__(self, store: HostCheckpoints, shape: torch.Size, dtype: torch.dtype, buffer: Tensor | None):
        self.store, self.shape, self.dtype, self.buffer = store, shape, dtype, buffer
        self.x: Tensor | None = None  # on the device, once it was asked for
        self.copy = None  # what `Copier.wait` takes

    def __del__(self):
        self.store.free[self.shape, self.dtype].append(self.buffer)
