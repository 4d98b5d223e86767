"""Activation checkpoints in host memory: the inputs of recomputed blocks, kept there between the passes.

Each is copied to locked host memory beside the computation and comes back when its block is recomputed. Copies to the
host use the direction of the link that swapped weights leave free.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from teasr.backbones.memory.swapping import HostArena


class HostCheckpoints:
    """Tensors in host memory. Buffers are reused, so that memory is locked once for each size."""

    def __init__(self, device: torch.device):
        """`device`: where the tensors come from and return to."""
        self.device, self.arena = device, HostArena(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self.host_bytes = 0  # of all buffers
        self.copied_bytes = 0  # back to the device, so far

    def put(self, x: Tensor) -> Kept:
        """Begin to copy a tensor to the host, once the work queued so far is done."""
        free = self.free[x.shape, x.dtype]
        if free:
            buffer = free.pop()
        else:
            buffer = None if self.device.type == "meta" else self.arena.empty(x.shape, x.dtype)
            self.host_bytes += x.nbytes
        kept = Kept(self, x.shape, x.dtype, buffer)
        if self.stream is None:
            if buffer is not None:
                buffer.copy_(x.detach())
            return kept
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(x.detach(), non_blocking=True)
            kept.written = self.stream.record_event()
        x.record_stream(self.stream)  # its memory is reused after the copy
        return kept

    def get(self, kept: Kept) -> Tensor:
        """Return a copy of the tensor on the device."""
        x = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        self.copied_bytes += x.nbytes
        if kept.written is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.written)
        return x if kept.buffer is None else x.copy_(kept.buffer, non_blocking=True)

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Context in which `torch.utils.checkpoint` keeps the inputs of the functions that it recomputes here."""
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: self.put(x) if x.numel() else x, lambda kept: self.get(kept) if isinstance(kept, Kept) else kept
        )


class Kept:
    """One tensor in host memory, whose buffer is used again when this object is deleted."""

    def __init__(self, store: HostCheckpoints, shape: torch.Size, dtype: torch.dtype, buffer: Tensor | None):
        self.store, self.shape, self.dtype, self.buffer = store, shape, dtype, buffer
        self.written: torch.cuda.Event | None = None  # once the tensor is in the buffer

    def __del__(self):
        self.store.free[self.shape, self.dtype].append(self.buffer)
