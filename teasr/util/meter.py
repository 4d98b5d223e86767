"""Measure bytes and FLOPs of PyTorch code on any device, including the meta device, and query free memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

CGROUP = Path("/sys/fs/cgroup")


class Work(NamedTuple):
    """What one call of a kernel costs: floating-point operations, and bytes read and written."""

    flops: int
    bytes: int


class Meter(TorchDispatchMode):
    """Context manager that counts `flops`, and the `peak` bytes of new tensors alive at once on one type of device.

    `kernels` counts the calls that compute, by their work, and `views` those that only return another view.

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
        self._shapes: dict[tuple, Any] = {}  # results of functions on the meta device, as `_Shape`
        self.kernels: Counter[Work] = Counter()
        self.views = 0
        self._kinds: dict[Any, str] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Do not count these existing tensors, whose views may appear as outputs."""
        for x in tensors:
            self._ignored[x.untyped_storage()._cdata] = x.untyped_storage()

    def now(self) -> int:
        """Bytes of the tensors alive now."""
        self._forget(list(self._live))
        return self.bytes

    def _forget(self, keys: Iterable[int]) -> None:
        """Take those of the tensors that have been freed out of the sum."""
        for key in keys:
            storage, size = self._live[key]
            if storage.expired():
                del self._live[key]
                self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = self._kinds.get(func) or self._kinds.setdefault(func, _kind(func))
        if kind == "new" and self.device_type == "meta":
            out, work = self._call_on_meta(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
            work = None if kind == "view" else _work(func, args, kwargs, out)
        if work is None:
            self.views += 1
        else:
            self.flops += work.flops
            self.kernels[work] += 1
        for x in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == self.device_type:
                self._add(x.untyped_storage())
        return out

    def _call_on_meta(self, func, args: tuple, kwargs: dict) -> tuple[Any, Work]:
        """Call a function whose tensors have no memory; its result is computed once for arguments of each shape.

        PyTorch derives these shapes in Python, which takes most of the time of a dry run.
        """
        key = (func, *map(_key, args), *((name, _key(value)) for name, value in kwargs.items()))
        known = self._shapes.get(key)
        if known is None:
            out = func(*args, **kwargs)
            shapes = tree_map_only(torch.Tensor, lambda x: _Shape(x.shape, x.stride(), x.dtype), out)
            self._shapes[key] = shapes, _work(func, args, kwargs, out)
            return out, self._shapes[key][1]
        shapes, work = known
        return (_empty(shapes) if isinstance(shapes, _Shape) else tree_map_only(_Shape, _empty, shapes)), work

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
            self._forget(list(islice(reversed(self._live), 32)))  # most tensors are freed soon
            if self.bytes > self.peak * (1 + self.slack):
                self.peak = max(self.peak, self.now())


@dataclass(frozen=True)
class _Shape:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _empty(shape: _Shape) -> torch.Tensor:
    return torch.empty_strided(shape.shape, shape.stride, dtype=shape.dtype, device="meta")


def _kind(func) -> str:
    """Return whether a function returns a `new` tensor, a `view`, or works `in place`."""
    schema = func._schema
    if schema.is_mutable:
        return "in place"
    return "new" if all(value.alias_info is None for value in schema.returns) else "view"


def _work(func, args: tuple, kwargs: dict, out: Any) -> Work:
    """Return the FLOPs of a call, and the bytes of its inputs and outputs."""
    formula = flop_registry.get(func._overloadpacket)
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
    tensors = [] if "empty" in func._overloadpacket.__name__ else tree_leaves((args, kwargs, out))
    return Work(flops, sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)))


def _key(value: Any) -> Any:
    """Return a hashable description of an argument: of a tensor its shape, of anything else its type and value."""
    if isinstance(value, torch.Tensor):
        return _Shape(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


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
