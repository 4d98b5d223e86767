"""Check block swap on a GPU against networks that are resident there, and measure both; random weights, no files.

    python bench/swap_check.py                        # 4 full-size blocks of Qwen-Image at 512 px; about 7 GB free
    python bench/swap_check.py --kinds bf16 --rings 2
    python bench/swap_check.py --device cpu --tiny    # rehearsal

One JSON line per case; a case that fails prints its error, and the others go on. Besides swapped blocks there are
activation checkpoints in host memory, and both together in an update of TEASR in block-major order. `output` and
`gradient` are the largest differences from the resident network, relative to the largest value; `noise` is what two
runs of the resident network differ by (output, gradient). `late copies` and `late compute` repeat the comparison with
one of the two streams held back before each copy or after each wait, so that a missing event shows. `control` leaves
out the waiting and must differ: otherwise this check would see nothing. Seconds are of one forward pass, one pass
without a graph and one backward pass.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its start; needed for equal bits

import torch
from torch import Tensor, nn

from teasr.backbones.memory.swapping import Copier, HostArena
from teasr.backbones.model import Condition, Model
from teasr.backbones.qwen_image.backbone import QwenImage, QwenImageConfig
from teasr.data.batch import Batch
from teasr.methods.base import Progress
from teasr.methods.teasr import Teasr, TeasrConfig
from teasr.util.randomness import Draws

DELAY_CYCLES = 20_000_000  # of the GPU's clock: about 10 ms, as long as a copy
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 48, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip


class Delayed(Copier):
    """Holds back the copies, or the computation after each wait; or does not let the computation wait at all."""

    held_back = ""

    def _copy(self, slot: Tensor, source: Tensor) -> None:
        if self.held_back in ("copies", "control"):
            torch.cuda._sleep(DELAY_CYCLES)
        super()._copy(slot, source)

    def wait(self, copy: torch.cuda.Event | None) -> None:
        if self.held_back != "control":
            super().wait(copy)
        if self.held_back == "compute":
            torch.cuda._sleep(DELAY_CYCLES)


class Check:
    """The cases; each method prints the lines of one."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.cuda = self.device.type == "cuda"

    def link(self) -> dict:
        """Locking memory, and copies from locked and ordinary memory."""
        blocks = 1_000_000 if self.options.tiny else 453_000_000
        started = self.now()
        arena = HostArena(self.device)
        locked = arena.empty((blocks,), torch.uint8)
        row = {"lock_seconds": self.now() - started, "locked": self.cuda and locked.is_pinned()}
        ordinary, slot = (
            torch.zeros(blocks, dtype=torch.uint8),
            torch.empty(blocks, dtype=torch.uint8, device=self.device),
        )
        locked.fill_(1)
        for name, source in (("locked", locked), ("ordinary", ordinary)):
            seconds = self.median(lambda source=source: slot.copy_(source, non_blocking=True), 5)
            row[f"{name}_gb_per_s"] = blocks / seconds / 1e9
        memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        return row | {"ulimit_l": memlock, "device": name, "torch": torch.__version__}

    def build(self, kind: str, swap: int = 0, ring: int = 2, hosted: bool = False) -> QwenImage:
        """A network with a LoRA that has an effect."""
        tiny = self.options.tiny
        config = QwenImageConfig(
            "random", "random", dtype="bf16", quantise=None if kind == "bf16" else kind, swap_blocks=swap,
            swap_ring=ring, lora_rank=2 if tiny else 128, lora_alpha=2 if tiny else 128,
            modulation_table=20 if tiny else 1000, host_checkpoints=hosted,
            transformer={"num_layers": self.options.blocks} | (TINY if tiny else {}),
            vae={"base_dim": 16, "num_res_blocks": 1},
        )  # fmt: skip
        network = QwenImage(config)
        network.to(self.device)
        for name, p in network.net.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, 0, 0.02, generator=torch.Generator(self.device).manual_seed(len(name)))
        if network.ring:
            network.ring.copier = Delayed(self.device)
        if hosted:
            network.net.transformer.checkpoints.copier = Delayed(self.device)
        return network

    def run(self, network: QwenImage) -> list[Tensor]:
        """Outputs of a pass with a graph and of one without, and the gradients of every LoRA weight."""
        side = 4 if self.options.tiny else self.options.size // 8
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, network.latent_channels, side, side)
        z, z_lq = (torch.randn(shape, device=self.device, generator=generator) for _ in range(2))
        t, model = torch.tensor([0.7], device=self.device), Model(network)
        for p in network.net.parameters():
            p.grad = None
        v = model.velocity(z, t, Condition(z_lq, -t))
        with torch.no_grad():
            w = model.velocity(z_lq, t, Condition(z, t))
        (v - w).square().mean().backward()
        return [v.detach(), w] + [p.grad for p in network.net.parameters() if p.requires_grad]

    def resident(self, kind: str, found: list) -> dict:
        """The row of the resident network; its results and their noise are added to `found`."""
        network = self.build(kind)
        with deterministic():
            results, again = self.run(network), self.run(network)
        row = {"noise": differences(again, results)} | self.measure(network)
        found += [results, row["noise"]]
        return row | {"ok": all(bool(torch.isfinite(x).all()) for x in results)}

    def swapped(self, kind: str, ring: int, wanted: list[Tensor], noise: list[float]) -> dict:
        """The row of a network with all blocks swapped."""
        network = self.build(kind, self.options.blocks, ring)
        copier, row = network.ring.copier, self.compared(network, network.ring.copier, wanted, noise)
        block = network.ring.blocks[0].source
        copy = self.median(lambda: copier.wait(copier.start(network.ring.slots[0], block)), 5)
        network.ring.held[0] = None  # its content was overwritten
        row |= self.measure(network) | {"block_mb": block.nbytes / 1e6, "copy_gb_per_s": block.nbytes / copy / 1e9}
        before = copier.copies
        self.run(network)
        return row | {"copies": copier.copies - before}

    def hosted(self, kind: str, wanted: list[Tensor], noise: list[float]) -> dict:
        """The row of a network whose activation checkpoints are in host memory between the passes."""
        network = self.build(kind, hosted=True)
        store = network.net.transformer.checkpoints
        return self.compared(network, store.copier, wanted, noise) | self.measure(network)

    def by_block(self, kind: str) -> dict:
        """Gradients of an update of TEASR by blocks, with swap and host checkpoints, against a resident network's.

        They differ by rounding, because calls without a graph have other batches.
        """
        orders = (("losses", {}), ("losses", {}), ("blocks", {"swap": self.options.blocks, "hosted": True}))
        with deterministic():
            wanted, again, found = (self.update(self.build(kind, **how), order) for order, how in orders)
        row = {"noise": far(again, wanted), "gradient": far(found, wanted)}
        return row | {"ok": row["gradient"] <= max(4 * row["noise"], 0.1)}

    def update(self, network: QwenImage, order: str) -> Tensor:
        """All gradients of an update, one after another."""
        side = 32 if self.options.tiny else self.options.size
        generator = torch.Generator(self.device).manual_seed(0)
        x, y = (torch.rand(1, 3, side, side, device=self.device, generator=generator) * 2 - 1 for _ in range(2))
        method = Teasr(TeasrConfig(lambda_lpips=0.0, ramps={}, order=order))
        draws = Draws(0, 0, (0,), self.device)
        for loss in method.losses({"student": Model(network)}, Batch(x, y, [""]), draws, Progress(4, 5)):
            loss.value.backward()
            del loss
        return torch.cat([p.grad.flatten() for p in network.net.parameters() if p.requires_grad])

    def compared(self, network: QwenImage, copier: Delayed, wanted: list[Tensor], noise: list[float]) -> dict:
        """The largest differences from the resident network, also with one of the streams held back."""
        row = {}
        with deterministic():
            for held_back in ("", "copies", "compute", "control") if self.cuda else ("",):
                copier.held_back = held_back
                found = [differences(self.run(network), wanted) for _ in range(2)]
                torch.cuda.synchronize() if self.cuda else None
                both = [max(pair) for pair in zip(*found, strict=True)]
                if not held_back:
                    row |= {"output": both[0], "gradient": both[1]}
                else:
                    row["control" if held_back == "control" else f"late {held_back}"] = both
        copier.held_back = ""
        checked = [[row["output"], row["gradient"]], *(row[name] for name in row if name.startswith("late"))]
        row["ok"] = all(found <= 4 * level for pair in checked for found, level in zip(pair, noise, strict=True))
        row["ok"] &= "control" not in row or max(row["control"]) > max(4 * max(noise), 1e-6)
        return row

    def measure(self, network: QwenImage) -> dict:
        """Median seconds, and the peak of allocated bytes."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.median(lambda: self.run(network), 5)
        return {"seconds": seconds} | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if self.cuda else {})

    def median(self, work: Callable, times: int) -> float:
        work()
        found = []
        for _ in range(times):
            started = self.now()
            work()
            found.append(self.now() - started)
        return statistics.median(found)

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class deterministic:
    """Context in which PyTorch prefers algorithms that give equal bits."""

    def __enter__(self):
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error):
        torch.use_deterministic_algorithms(False)


def differences(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Largest relative difference of the two outputs and of the gradients; NaN counts as infinite."""
    each = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, wanted, strict=True)]
    each = [x if x == x else float("inf") for x in each]
    return [max(each[:2]), max(each[2:])]


def far(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference relative to that of the wanted tensor; NaN counts as infinite."""
    x = float((found - wanted).norm() / wanted.norm())
    return x if x == x else float("inf")


def case(name: str, work: Callable[[], dict]) -> bool:
    """Run a case and print its line; returns whether it succeeded."""
    started = time.perf_counter()
    try:
        row = work()
    except Exception as error:
        traceback.print_exc()
        row = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps({"case": name} | row | {"took": round(time.perf_counter() - started, 2)}), flush=True)
    gc.collect()
    return row.get("ok", True)


def main(arguments: list[str] | None = None) -> int:
    """Run all cases; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny blocks and images")
    parser.add_argument("--kinds", nargs="+", choices=("bf16", "fp8", "nf4"), default=["bf16", "fp8", "nf4"])
    parser.add_argument("--rings", nargs="+", type=int, default=[2, 3], help="numbers of slots (default: 2 3)")
    parser.add_argument("--blocks", type=int, default=4, help="number of blocks, all swapped (default: 4)")
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="side of the images (default: 512)")
    options = parser.parse_args(arguments)
    check, good = Check(options), []
    good.append(case("link", check.link))
    for kind in options.kinds:
        found: list = []  # the results of the resident network, and their noise
        good.append(case(f"resident {kind}", functools.partial(check.resident, kind, found)))
        for ring in options.rings if found else ():
            good.append(case(f"swap {kind} ring {ring}", functools.partial(check.swapped, kind, ring, *found)))
        if found and kind == options.kinds[0]:
            good.append(case(f"host checkpoints {kind}", functools.partial(check.hosted, kind, *found)))
            good.append(case(f"block-major {kind}", functools.partial(check.by_block, kind)))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
