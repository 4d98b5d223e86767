"""Measure time and memory of restoring by image size, steps and tiles, compared with the plain loop without tiles.

    python bench/upscale.py runs/demo [--sizes 512 1024 2048] [--steps 1 4] [--tiles 256 512] [--plain 1024]

Every row is one image of noise-free gradients and text-like edges, size x size pixels after restoring. `outside` is the
share of time that is not spent in the networks (encoder, transformer, decoder). `peak` is the most memory that tensors
used at once: on a GPU, as its allocator reports it, without the weights; on a CPU, counted over the lifetime of the
tensors, without the input frame and the result. `plain` is `sampler.restore`, which processes the whole image at once
like the pipelines of diffusers.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from teasr import Upscaler
from teasr.imaging import images
from teasr.methods.sampler import restore
from teasr.util.meter import Meter


def picture(side: int) -> np.ndarray:
    """Return an image [side, side, 3] uint8 with smooth and sharp parts."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    waves = np.sin(40 * np.pi * x * y) > 0.3
    return (np.stack((x, y, waves), 2) * 200 + 20).astype(np.uint8)


class Timed:
    """Times the backbone's three networks; on a GPU it waits for their results."""

    def __init__(self, backbone, device: torch.device):
        self.seconds = 0.0
        for name in ("encode", "call", "decode"):
            setattr(backbone, name, self._timed(getattr(backbone, name), device))

    def _timed(self, act, device):
        def timed(*arguments):
            started = time.perf_counter()
            out = act(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
            return out

        return timed


def plain(upscaler: Upscaler, x: torch.Tensor, steps: int) -> np.ndarray:
    """Restore the whole image at once."""
    return images.to_uint8(restore(upscaler.model, upscaler.sampler, x, steps, 0)[0])


def measure(act, clock: Timed, device: torch.device) -> tuple[float, float, float]:
    """Return (seconds, share outside the networks, peak MiB) of a call.

    On a CPU, time and memory are measured in two separate calls.
    """
    act()
    clock.seconds, started = 0.0, time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    act()
    seconds = time.perf_counter() - started
    outside = 1 - clock.seconds / seconds
    if device.type == "cuda":
        return seconds, outside, (torch.cuda.max_memory_allocated() - before) / 2**20
    with Meter("cpu") as meter:
        act()
    return seconds, outside, meter.peak / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a run, a checkpoint or an export, or the name of a shipped model")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[512, 1024, 2048],
        help="sides of the restored images in pixels (default: 512 1024 2048)",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="numbers of sampling steps (default: 1 4)")
    parser.add_argument(
        "--tiles", type=int, nargs="+", help="sides of the tiles in pixels (default: the backbone's own size)"
    )
    parser.add_argument(
        "--plain", type=int, default=1024, help="largest image size for the loop without tiles (default: 1024)"
    )
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    upscaler = Upscaler.from_pretrained(options.model)
    device = next(upscaler.backbone.net.parameters()).device
    clock = Timed(upscaler.backbone, device)
    print(f"{'size':>5s} {'steps':>5s} {'tile':>6s} {'s':>8s} {'outside':>8s} {'peak MiB':>9s}")
    for side in options.sizes:
        lq = picture(side // upscaler.scale)
        x = images.to_tensor(images.upsample(lq, upscaler.scale))[None].to(device)
        for steps in options.steps:
            rows = {
                str(tile): partial(upscaler, lq, steps, tile_px=tile)
                for tile in options.tiles or [upscaler.backbone.tile_px]
            }
            if side <= options.plain:
                rows["plain"] = partial(plain, upscaler, x, steps)
            for name, act in rows.items():
                seconds, outside, peak = measure(act, clock, device)
                print(f"{side:5d} {steps:5d} {name:>6s} {seconds:8.2f} {outside:8.1%} {peak:9.0f}", flush=True)


if __name__ == "__main__":
    main()
