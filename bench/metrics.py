"""Compare PSNR, SSIM and the Frechet distance with pyiqa: agreement and speed.

    python bench/metrics.py [--side 512] [--samples 100]

Needs the package: pip install pyiqa. Both sides get the same arrays in memory, on one thread, and alternate;
times are medians of five rounds (one for the Frechet distance).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyiqa
import torch
from pyiqa.archs.fid_arch import frechet_distance as their_frechet

from teasr.imaging.exact_metrics import frechet_distance, psnr, ssim

ROUNDS = 5


def compare(name: str, ours, theirs, rounds: int = ROUNDS) -> None:
    """Print both values, their difference, both times and the ratio of the times."""
    times, values = {"ours": [], "theirs": []}, {}
    for _ in range(rounds):
        for side, act in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            values[side] = float(act())
            times[side].append(time.perf_counter() - began)
    a, b = (statistics.median(times[side]) for side in ("ours", "theirs"))
    gap = abs(values["ours"] - values["theirs"])
    print(
        f"{name:22s} {values['ours']:12.6f} {values['theirs']:12.6f} {gap:10.1e} "
        f"{a * 1e3:10.2f} {b * 1e3:10.2f} {b / a:8.1f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="side of the images in pixels (default: 512)")
    parser.add_argument(
        "--samples", type=int, default=100, help="samples per set for the Frechet distance (default: 100)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 256, (options.side // 8, options.side // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    noisy = (base + rng.normal(0, 12, base.shape)).clip(0, 255).round().astype(np.uint8)
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255 for x in (base, noisy))
    print(f"{'':22s} {'ours':>12s} {'pyiqa':>12s} {'difference':>10s} {'ours ms':>10s} {'pyiqa ms':>10s} {'ratio':>8s}")
    for name, act in (("psnr", psnr), ("ssim", ssim)):
        metric = pyiqa.create_metric(name, test_y_channel=True, color_space="ycbcr", device=torch.device("cpu"))
        compare(
            f"{name}, {options.side} px", lambda act=act: act(noisy, base), lambda metric=metric: metric(b, a).item()
        )
    mix = rng.normal(size=(2048, 2048)) / 2048**0.5
    x, y = rng.normal(size=(options.samples, 2048)) @ mix, rng.normal(size=(options.samples, 2048)) @ mix * 1.2 + 0.05

    def theirs() -> float:
        return their_frechet(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))

    compare(f"Frechet, {options.samples} x 2048", lambda: frechet_distance(x, y), theirs, rounds=1)


if __name__ == "__main__":
    main()
