"""Estimate the memory and FLOPs of one update without running it: `teasr train --dry-run`.

The backbone is built on the meta device, where tensors have shapes but no memory, and the method's losses run forwards
and backwards on it. Every tensor is counted for as long as it is alive; attention is counted as a GPU's fused kernels
store it. Only two numbers are not measured this way: what DeepSpeed keeps per trained parameter (its rules are below)
and an allowance for CUDA itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F

from teasr.backbones.base import Backbone
from teasr.backbones.roles import FIRST
from teasr.data.batch import Batch
from teasr.methods.base import Method, Progress
from teasr.run_config import RunConfig
from teasr.training.engine import check_swap, gradients_leave
from teasr.training.networks import Networks
from teasr.training.update import backpropagate
from teasr.util.meter import Meter, Work

GIB = 2**30
CUDA_BYTES = int(1.5 * GIB)  # context, cuBLAS and NCCL workspaces, fragmentation: assumed
LARGER = "activations or optimiser step (the larger)"
HOST = "host: "  # prefix of tensor groups that stay in host memory
FLASH_HEAD_MAX = 256  # largest head dimension of the flash kernels; larger heads use the memory-efficient kernels


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **ignored):
    """Attention through the operators that a GPU would use.

    On the meta device PyTorch would otherwise materialise the full attention matrix.
    """
    if attn_mask is not None:
        raise ValueError("attention with a mask cannot be counted: only fused kernels without a mask are supported")
    if query.shape[-1] <= FLASH_HEAD_MAX:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    graph = query.requires_grad
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, graph, dropout_p, is_causal)[
        0
    ]


@dataclass
class Calls:
    """The calls of one loss in one update: kernels by their work, views, and the bytes copied from host memory."""

    kernels: Counter[Work] = field(default_factory=Counter)
    views: int = 0
    copied: int = 0


@dataclass
class Footprint:
    """Cost of one update on one rank: bytes by item, on the GPU and in host memory; FLOPs and peak bytes by loss.

    `parameters`: parameter counts of the original model, before modulation tables and quantisation.
    """

    size_px: int
    parameters: dict[str, int] = field(default_factory=dict)
    gpu: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)  # summed over all micro-batches of the update
    peaks: dict[str, int] = field(default_factory=dict)  # of activations and temporary tensors alone
    calls: dict[str, Calls] = field(default_factory=dict)  # by loss, of all micro-batches
    step: int = 0  # bytes that the optimiser's step needs for itself
    trained: int = 0  # trained parameters on this rank
    on_host: bool = False  # whether the optimiser steps in host memory

    @property
    def copied(self) -> int:
        """Bytes of swapped blocks and activation checkpoints copied to the GPU in one update."""
        return sum(calls.copied for calls in self.calls.values())

    @property
    def gpu_total(self) -> int:
        """Peak bytes on the GPU during an update."""
        return sum(self.gpu.values())


def count(config: RunConfig, settings: dict, size_px: int, ranks: int = 1) -> Footprint:
    """Estimate one update of a run on square images of `size_px` pixels.

    `settings`: DeepSpeed's config. Raises ValueError for an unsupported size and for train.dtype = bf16.
    """
    config, meta, zero = config.with_random_weights(), torch.device("meta"), settings["zero_optimization"]
    accumulation = config.train.accumulation(ranks)
    if config.train.dtype == "bf16":
        raise ValueError("autocast (train.dtype = bf16) cannot be counted on the meta device: set train.dtype=fp32")
    method = config.build_method()
    method.check(accumulation)
    method.load()
    method.to(meta)
    networks, result = Networks(config, method), Footprint(size_px)
    for place, base in networks.bases.items():
        if place in networks.trained_bases:
            check_swap(settings, base, method.by_block)
        for group, tensors in base.memory_groups().items():
            _put(result.parameters, group, sum(x.numel() for x in tensors))
        base.to(meta)
        base.check_size(size_px, size_px)
        # a base without an engine is not partitioned: every rank holds all of it
        _add_frozen(result, base, zero if place in networks.trained_bases else {"stage": 0}, ranks)
    trained = {role.name: _numel(networks.base(role.name).trained(role.name)) for role in networks.trained_roles}
    for role, n in trained.items():
        result.parameters["trained" if len(trained) == 1 else f"trained by {role}"] = n
    for group, tensors in method.memory_groups().items():
        _put(result.gpu, group, sum(x.nbytes for x in tensors))
    leaving = accumulation == 1 and method.one_backward and gradients_leave(settings)
    most = _most_gradients(networks) if leaving else sum(trained.values())
    _add_trained(result, sum(trained.values()), zero, ranks, trained[FIRST] if config.train.ema else 0)
    # gradients are not partitioned until all losses are done (coalesce_grad_reduction), unless they leave before
    _put(result.gpu, "gradients of trained weights", most * 4)
    bucket = 4 * int(zero.get("reduce_bucket_size", 500_000_000))
    if zero["stage"] == 3:  # which every engine keeps; those of ZeRO-1/2 have one after another
        bucket *= len(networks.trained_bases)
    if zero["stage"] == 3 or leaving:
        _put(result.gpu, "reduction bucket", bucket)
    _run(result, config, method, networks, accumulation)
    _put(result.host, "activation checkpoints", sum(base.checkpoint_bytes for base in networks.bases.values()))
    result.trained = sum(trained.values()) // ranks
    result.on_host = _offloads(zero, "optimizer")
    # The optimiser step runs when no graph is alive. It needs a flat copy of the gradients, and the ZeRO-1/2 bucket. In
    # host memory it needs no such copy.
    flat = 0 if result.on_host and zero["stage"] < 3 else sum(trained.values()) * 4 // ranks
    result.step = flat + (bucket if zero["stage"] < 3 and not leaving else 0)
    result.gpu[LARGER] = max(result.step, *result.peaks.values())
    result.gpu["CUDA, workspaces, fragmentation (assumed)"] = CUDA_BYTES
    return result


def _numel(parameters: dict[str, torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters.values())


def _most_gradients(networks: Networks) -> int:
    """Return how many gradients are there at once if those of a block leave when the block is finished."""
    found = 0
    for base in networks.trained_bases.values():
        blocks = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in base.sweeps().blocks]
        found += sum(p.numel() for p in base.net.parameters() if p.requires_grad) - sum(blocks) + max(blocks)
    return found


def _add_frozen(result: Footprint, network: Backbone, zero: dict, ranks: int) -> None:
    """Add the frozen tensors of a network. ZeRO-3 partitions its parameters but not its buffers."""
    spread = {p.untyped_storage()._cdata for p in network.net.parameters()} if zero["stage"] == 3 else set()
    for group, tensors in network.memory_groups().items():
        for x in tensors:
            shared = x.untyped_storage()._cdata in spread
            on_host = group.startswith(HOST) or (shared and _offloads(zero, "param"))
            _put(result.host if on_host else result.gpu, group, x.nbytes // (ranks if shared else 1))
    if spread:
        live = int(zero.get("stage3_max_live_parameters", 1_000_000_000))
        parameters = list(network.net.parameters())
        gathered = min(live, sum(p.numel() for p in parameters)) * parameters[0].element_size()
        _put(result.gpu, "weights gathered by ZeRO-3", gathered)


def _add_trained(result: Footprint, trained: int, zero: dict, ranks: int, averaged: int) -> None:
    """Add what DeepSpeed keeps for trained fp32 parameters, and the EMA of the student (`averaged` parameters).

    DeepSpeed keeps the weight, a master copy and two moments of each, besides the gradients.
    """
    share = trained * 4 // ranks
    weights = share if zero["stage"] == 3 else trained * 4
    weights_at = result.host if _offloads(zero, "param") else result.gpu
    states_at = result.host if _offloads(zero, "optimizer") else result.gpu
    _put(weights_at, "trained weights", weights)
    # under ZeRO-3 and with offloaded optimiser states, a partition of the gradients stays allocated as well, and
    # ZeRO-1 and 2 send the offloaded weights back to the GPU from another copy
    copies = 3 + (zero["stage"] == 3 or states_at is result.host) + (zero["stage"] < 3 and states_at is result.host)
    _put(states_at, "fp32 master weights and Adam's moments", share * copies)
    if averaged:
        on_host = _offloads(zero, "param") or _offloads(zero, "optimizer")
        n = averaged * 4 // ranks if zero["stage"] == 3 else averaged * 4
        _put(result.host if on_host else result.gpu, "EMA of the student", n)


def _offloads(zero: dict, what: str) -> bool:
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"


def _put(place: dict[str, int], item: str, n: int) -> None:
    if n:
        item = item.removeprefix(HOST)
        place[item] = place.get(item, 0) + n


def _run(result: Footprint, config: RunConfig, method: Method, networks: Networks, accumulation: int) -> None:
    """Run the losses of an update forwards and backwards on the meta device; record FLOPs and peak bytes of each."""
    b, n = config.train.micro_batch, result.size_px
    image = torch.empty(b, 3, n, n, device="meta")
    meter = Meter("meta")
    for base in networks.bases.values():
        for p in base.net.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        meter.ignore(*base.net.parameters(), *(p.grad for p in base.net.parameters() if p.grad is not None))
    for holder in (*networks.bases.values(), method):
        meter.ignore(*(x for tensors in holder.memory_groups().values() for x in tensors))

    copied = 0

    def freed(name: str) -> None:
        nonlocal copied
        times, before = accumulation // method.cycle, copied
        copied = sum(base.copied_bytes for base in networks.bases.values())
        calls = result.calls.setdefault(name, Calls())
        calls.kernels.update({work: n * times for work, n in meter.kernels.items()})
        calls.views, calls.copied = calls.views + meter.views * times, calls.copied + (copied - before) * times
        result.flops[name] = result.flops.get(name, 0) + meter.flops * times
        result.peaks[name] = max(result.peaks.get(name, 0), meter.peak)
        meter.flops, meter.peak, meter.views = 0, meter.now(), 0
        meter.kernels.clear()

    student, z = networks.student, None
    if config.data.latents is not None:  # then nothing is encoded
        z = torch.empty(b, student.latent_channels, n // student.downsample, n // student.downsample, device="meta")
    batches = [Batch(image, image, [""] * b, z, z)] * method.cycle
    progress = Progress(config.train.updates - 1, config.train.updates)
    with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention), meter:
        backpropagate(
            method, networks.models, batches, config.seed, progress, lambda role, value: value.backward(), freed=freed
        )


def table(result: Footprint) -> str:
    """Format a footprint as text."""
    lines = [
        f"estimate for one update on images of {result.size_px} px, counted on the meta device without running it",
        "",
    ]
    lines += ["parameters"] + [f"  {name:44s}{n / 1e6:12,.1f} M" for name, n in result.parameters.items()]
    for title, items in (("memory of one GPU", result.gpu), ("host memory of one rank", result.host)):
        if items:
            lines += ["", title] + [f"  {name:44s}{n / GIB:12.2f} GiB" for name, n in items.items()]
            lines.append(f"  {'total':44s}{sum(items.values()) / GIB:12.2f} GiB")
    if result.copied:
        lines += ["", f"{'copied from host memory to the GPU in one update':46s}{result.copied / GIB:12.2f} GiB"]
    lines += ["", f"{'loss':46s}{'FLOPs of one update':>20s}{'activations':>16s}"]
    for name, n in result.flops.items():
        lines.append(f"  {name:44s}{n / 1e12:14,.1f} TFLOP{result.peaks[name] / GIB:12.2f} GiB")
    lines.append(f"  {'total':44s}{sum(result.flops.values()) / 1e12:14,.1f} TFLOP")
    return "\n".join(lines)
