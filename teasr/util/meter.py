"""Measure bytes and FLOPs of PyTorch code on any device, including the meta device, and query free memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CGROUP = Path("/sys/fs/cgroup")


class Meter(TorchDispatchMode):
    """Context manager that counts `flops`, and the `peak` bytes of new tensors alive at once on one type of device.

    Freed tensors are only looked for when the sum exceeds the peak by a fraction `slack`, so the peak may be too low by
    up to this fraction.
    """

    slack = 1 / 256

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Override of a PyTorch switch.

        By default PyTorch imports the compiler for such a mode, which is never compiled: 4 s before the first image.
        """
        return False

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.bytes = self.peak = self.flops = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._ignored: dict[int, torch.UntypedStorage] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Do not count these existing tensors, whose views may appear as outputs."""
        for x in tensors:
            self._ignored[x.untyped_storage()._cdata] = x.untyped_storage()

    def now(self) -> int:
        """Bytes of the tensors alive now."""
        for key in [k for k, (storage, _) in self._live.items() if storage.expired()]:
            self.bytes -= self._live.pop(key)[1]
        return self.bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for x in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == self.device_type:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._ignored:
            return
        old = self._live.get(storage._cdata)
        if old is not None:
            if not old[0].expired():
                return
            self.bytes -= old[1]
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes += storage.nbytes()
        if self.bytes > self.peak * (1 + self.slack):
            self.peak = max(self.peak, self.now())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated.

    For a GPU this includes memory that PyTorch has reserved but does not use; for the host it respects the limit of the
    control group.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        limit = CGROUP.joinpath("memory.max").read_text().strip()
        if limit != "max":
            used = int(CGROUP.joinpath("memory.current").read_text())
            cached = dict(line.split() for line in CGROUP.joinpath("memory.stat").read_text().splitlines())
            free = min(free, int(limit) - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control groups here
    return max(0, free)
