"""Latents of whole frames that may be larger than memory: they lie in temporary files (`util.scratch`).

A sampler computes with them as with any tensor. It stays a pure loop that knows nothing of files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from teasr.imaging.bands import spans
from teasr.util.scratch import Scratch

DRAWN = 2**22  # random numbers drawn at once; a multiple of 16, since PyTorch draws in blocks of 16


class Large(Tensor):
    """A tensor [1, C, h, w] of `plain`, whose data lie in a temporary file.

    A pointwise operation is computed in bands of rows, and its result is another such tensor. All other operations see
    the plain tensor, and their results lie in memory.
    """

    plain: Tensor
    scratch: Scratch

    @staticmethod
    def __new__(cls, plain: Tensor, scratch: Scratch):
        made = Tensor._make_wrapper_subclass(cls, plain.shape, strides=plain.stride(), dtype=plain.dtype)
        made.plain, made.scratch = plain, scratch
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Large))
        args, kwargs = tree_map_only(Large, lambda x: x.plain, (args, kwargs))
        if torch.Tag.pointwise in func.tags and not func._schema.is_mutable:
            return first._in_bands(lambda part: func(*part(args), **part(kwargs)))
        return func(*args, **kwargs)

    def _in_bands(self, act: Callable[[Callable], Tensor]) -> Tensor:
        height, out = self.shape[-2], None
        for top, bottom in spans(height, self.plain.itemsize * self.plain[..., 0, :].numel()):

            def part(arguments, top=top, bottom=bottom):
                return tree_map_only(Tensor, lambda x: x[..., top:bottom, :] if _rows(x) == height else x, arguments)

            made = act(part)
            if out is None:
                out = zeros((*made.shape[:-2], height, made.shape[-1]), self.scratch, made.dtype)
            plain(out)[..., top:bottom, :] = made
            self.scratch.release()
        return out


def zeros(shape: tuple[int, ...], scratch: Scratch, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return latents of zeros: a plain tensor if it is small, a `Large` one otherwise."""
    if scratch.in_memory(shape, dtype.itemsize):
        return torch.zeros(shape, dtype=dtype)
    data = torch.from_numpy(scratch.zeros((dtype.itemsize * torch.Size(shape).numel(),), "u1"))
    return Large(data.view(dtype).view(shape), scratch)


def plain(z: Tensor) -> Tensor:
    """Return the plain tensor of the same memory; reading all of it takes as much memory as it has bytes."""
    return z.plain if isinstance(z, Large) else z


def noise(shape: tuple[int, ...], generator: torch.Generator, scratch: Scratch) -> Tensor:
    """Draw what `torch.randn` draws, on the CPU in parts if it is large."""
    if generator.device.type != "cpu":
        return torch.randn(shape, generator=generator, device=generator.device).cpu()
    eps = zeros(shape, scratch)
    flat = plain(eps).view(-1)
    for start, stop in itertools.pairwise([*range(0, max(1, len(flat) - 16), DRAWN), len(flat)]):
        flat[start:stop].normal_(generator=generator)
        scratch.release()
    return eps


def _rows(x: Tensor) -> int:
    return x.shape[-2] if x.dim() > 1 else 0
