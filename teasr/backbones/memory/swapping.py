"""Block swap: frozen blocks stay in host memory and are copied into a small ring of slots on the GPU when they compute.

Weights only travel from the host to the GPU; they are frozen, so nothing is written back. A block asks for its weights
at the start of its own function (`Ring.need`), in the first forward pass and when activation checkpointing recomputes
it, and the block that follows in the same direction is copied meanwhile. No hooks are involved: a hook at the end of a
forward pass would release a slot that the backward pass still reads.

Three things guard against wrong results without an error: a weight can be read only while its block is the one that was
asked for last; a slot is refilled only after all work that was queued before the refill; slots are allocated once and
never freed while the network lives.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from teasr.backbones.lora import replace_linears
from teasr.backbones.memory.quantised import QuantisedLinear

PAGE = 4096  # bytes; the unit in which host memory is locked
ALIGNMENT = 256  # bytes, of every tensor in a slot, as PyTorch's own allocator gives at least


class HostArena:
    """Host memory that a GPU copies from at full speed: page-locked, and no larger than what is asked for.

    PyTorch rounds pinned allocations up to a power of two, which wastes up to half of them. Here ordinary memory is
    allocated and then registered with CUDA. It is unregistered when the arena is deleted. For other devices the arena
    gives ordinary memory.
    """

    locked_bytes: ClassVar[int] = 0  # by all arenas of this process

    def __init__(self, device: torch.device):
        self.device = device
        self._regions: list[Tensor] = []
        weakref.finalize(self, _unregister, self._regions, device).atexit = False

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in host memory (on the meta device if that is the arena's device).

        Raises ValueError naming a cure if the memory cannot be locked.
        """
        if self.device.type != "cuda":
            place = "meta" if self.device.type == "meta" else "cpu"
            return torch.empty(*shape, dtype=dtype, device=place)
        n = math.prod(shape) * dtype.itemsize
        return self._locked(n)[:n].view(dtype).view(*shape)

    def _locked(self, n: int) -> Tensor:
        """Return at least n locked bytes that share no page with other allocations."""
        size = -(-n // PAGE) * PAGE
        whole = torch.empty(size + PAGE, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE
        region = whole[start : start + size]
        error = _register(region)
        if not error:
            self._regions.append(region)
            HostArena.locked_bytes += size
            return region
        del whole, region
        _clear_error(self.device)
        warnings.warn(
            f"{n / 1e9:.2f} GB of host memory could not be registered (CUDA error {error}); PyTorch's pinned memory is "
            "used instead, which may take twice as much: a higher `ulimit -l` may help",
            stacklevel=2,
        )
        try:
            pinned = torch.empty(n, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as failed:
            raise ValueError(
                f"{n / 1e9:.2f} GB of host memory could not be locked ({str(failed).splitlines()[0]}): raise the limit "
                "(`ulimit -l unlimited`, in Docker --ulimit memlock=-1), free host memory, lower backbone.swap_blocks "
                "or set backbone.quantise"
            ) from None
        HostArena.locked_bytes += 1 << (n - 1).bit_length()
        return pinned


def _register(region: Tensor) -> int:
    """Lock the pages of a tensor; returns CUDA's error code, 0 if it succeeded."""
    return int(torch.cuda.cudart().cudaHostRegister(region.data_ptr(), region.nbytes, 0))


def _clear_error(device: torch.device) -> None:
    """Take the error of a failed call from CUDA, which would otherwise report it for the next kernel."""
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError:
        pass


def _unregister(regions: list[Tensor], device: torch.device) -> None:
    if regions:
        torch.cuda.synchronize(device)
    for region in regions:
        torch.cuda.cudart().cudaHostUnregister(region.data_ptr())
        HostArena.locked_bytes -= region.nbytes
    regions.clear()


class Copier:
    """Everything that concerns streams and events: copies into slots beside the computation.

    On a CPU and on the meta device every copy is done at once. `copies` and `bytes` count what was copied.
    """

    def __init__(self, device: torch.device):
        self.device, self.copies, self.bytes = device, 0, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def slot(self, nbytes: int) -> Tensor:
        """Allocate a slot of so many bytes."""
        slot = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.keep(slot)
        return slot

    def keep(self, x: Tensor) -> None:
        """Let the memory of a tensor on the device be reused only after its last copy, whenever it is freed."""
        if self.stream is not None:
            x.record_stream(self.stream)

    def start(self, slot: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Begin to copy, once the work queued so far is done. Returns what `wait` takes.

        Copies are made in the order in which they were begun.
        """
        self.copies += 1
        self.bytes += source.nbytes
        if self.stream is None:
            self._copy(slot, source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._copy(slot, source)
            return self.stream.record_event()

    def wait(self, copy: torch.cuda.Event | None) -> None:
        """Let the work queued from now on begin only after this copy is done; the host does not wait."""
        if copy is not None:
            torch.cuda.current_stream(self.device).wait_event(copy)

    @torch.no_grad()
    def _copy(self, slot: Tensor, source: Tensor) -> None:
        slot[: source.numel()].copy_(source, non_blocking=True)


class SwappedLinear(QuantisedLinear):
    """A frozen Linear, quantised or not, whose weight lives in host memory and is readable while its block computes.

    The weight is neither a parameter nor a buffer, so moving the module, ZeRO and state dicts do not touch it. The bias
    stays on the device.
    """

    moves = True

    def __init__(self, linear: nn.Linear, kind: type[QuantisedLinear]):
        super().__init__(linear)
        self.__dict__["layer"] = kind(linear)  # not a submodule; it reads its weight wherever `rebind` says
        self.bias, self.layer.bias = self.layer.bias, None
        self.block: Block | None = None

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in]. Raises RuntimeError unless the layer's block was the last to be asked for."""
        if self.block is None or not self.block.readable:
            raise RuntimeError("the weights of a swapped block were read while they are not on the device")
        return self.layer.weight_in(dtype)

    def out_scale(self, dtype: torch.dtype) -> Tensor | None:
        return self.layer.out_scale(dtype)


@dataclass(eq=False)
class Block:
    """The weights of one swapped block: their copy in host memory and the layers that read them."""

    layers: list[SwappedLinear]
    source: Tensor  # uint8: all weights, one after another
    places: list[tuple[int, torch.dtype, torch.Size]]  # of each layer's tensors: first byte, dtype, shape
    readable: bool = False
    bound: int | None = None  # slot that the layers read
    views: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)  # slot -> tensors of each layer

    @classmethod
    def take(cls, layers: list[SwappedLinear], arena: HostArena) -> Block:
        """Move the weights of these layers into the arena."""
        tensors = [layer.layer._buffers[name] for layer in layers for name in layer.layer.stored]
        places, end = [], 0
        for x in tensors:
            places.append((end, x.dtype, x.shape))
            end += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        block = cls(layers, arena.empty((end,), torch.uint8), places)
        for layer, views in zip(layers, block.tensors_in(block.source), strict=True):
            for name, view in views.items():
                view.copy_(layer.layer._buffers[name])
            layer.layer.rebind(views)
            layer.block = block
        return block

    def tensors_in(self, memory: Tensor) -> list[dict[str, Tensor]]:
        """Return each layer's tensors as views of `memory`, which is laid out like `source`."""
        places = iter(self.places)
        return [{name: _view(memory, *next(places)) for name in layer.layer.stored} for layer in self.layers]

    def bind(self, number: int, slot: Tensor) -> None:
        """Let the layers read this slot."""
        if self.bound == number:
            return
        if number not in self.views:
            self.views[number] = self.tensors_in(slot)
        for layer, tensors in zip(self.layers, self.views[number], strict=True):
            layer.layer.rebind(tensors)
        self.bound = number


def _view(memory: Tensor, start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class Ring:
    """Swapped blocks and the slots on the device that they take turns in."""

    def __init__(self, size: int, device: torch.device, copier: Copier | None = None):
        """`size`: the number of slots. With one slot nothing is copied ahead."""
        self.size, self.device = size, device
        self.copier = Copier(device) if copier is None else copier
        self.arena, self.blocks = HostArena(device), []
        self.slots: list[Tensor] = []
        self.held: list[int | None] = []  # block in each slot
        self.copies: list = []  # the last copy into each slot, as `Copier.start` returned it
        self.now: int | None = None  # the block that may be read
        self.step = 1  # direction in which the blocks are visited

    def take(self, module: nn.Module, kind: type[QuantisedLinear]) -> Callable[[], None]:
        """Move the Linears of the next block to host memory, stored as `kind`.

        Returns the function that the block must call at the start of its own.
        """
        replace_linears(module, functools.partial(SwappedLinear, kind=kind))
        layers = [layer for layer in module.modules() if isinstance(layer, SwappedLinear)]
        self.blocks.append(Block.take(layers, self.arena))
        return functools.partial(self.need, len(self.blocks) - 1)

    def allocate(self) -> None:
        """Allocate the slots, once all blocks have been taken."""
        largest, n = max(block.source.nbytes for block in self.blocks), min(self.size, len(self.blocks))
        self.slots = [self.copier.slot(largest) for _ in range(n)]
        self.held, self.copies = [None] * n, [None] * n

    def need(self, i: int) -> None:
        """Make the weights of block i readable, and begin to copy the blocks that will probably follow.

        Called when all work of the block that was needed before has been queued, its backward pass included: in one
        backward pass, a block is recomputed only after the backward pass of all later blocks.
        """
        if self.now is not None:
            self.blocks[self.now].readable = False
        following = self._following(i)
        slot = self._fetch(i, following)
        self.copier.wait(self.copies[slot])
        self.blocks[i].bind(slot, self.slots[slot])
        self.blocks[i].readable, self.now = True, i
        for other in following[1:]:
            self._fetch(other, following)

    def _following(self, i: int) -> list[int]:
        """Return block i and the blocks expected after it, one for each slot at most.

        At the last block a pass that keeps no graph is over, and the next one begins at block 0. With a graph the
        backward pass follows, in the opposite direction; what it needs first is still there.
        """
        n = len(self.blocks)
        if i in (0, n - 1):
            self.step = 1 if i == 0 else -1
        elif self.now is not None:
            self.step = -self.step if i == self.now else (1 if i > self.now else -1)
        if i == n - 1 and not torch.is_grad_enabled():
            return [(i + k) % n for k in range(len(self.slots))]
        return [j for j in range(i, i + self.step * len(self.slots), self.step) if 0 <= j < n]

    def _fetch(self, i: int, keep: list[int]) -> int:
        """Return the slot of block i; unless it is there already, copy it into a slot that holds none of `keep`."""
        if i in self.held:
            return self.held.index(i)
        slot = next(s for s, held in enumerate(self.held) if held not in keep)
        self.held[slot] = i
        self.copies[slot] = self.copier.start(self.slots[slot], self.blocks[i].source)
        return slot


def spaced(swapped: int, blocks: int) -> list[int]:
    """Return which of the blocks are swapped: so many, evenly spaced."""
    return [(2 * i + 1) * blocks // (2 * swapped) for i in range(swapped)]
