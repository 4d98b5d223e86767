"""Measure PSNR and sharpness over step counts and fidelity on held-out pairs, and what `--steps auto` chooses.

    python bench/trade.py runs/demo --data runs/demo/shards/heldout [--steps 2 4 8] [--fidelity 0 .25 .5 .75 1]

Sharpness is the root mean square of the luma gradient; the target is the sharpness of the originals. The row `auto`
scores the automatic choice, and the last line gives how often each step count was chosen and the mean steps per image.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from teasr import Upscaler
from teasr.data import pairs as pairs_of
from teasr.imaging.exact_metrics import luma, psnr
from teasr.util.seed import seed_of


def sharpness(x: np.ndarray) -> float:
    """Return the sharpness of an image [H, W, 3] uint8, in grey levels per pixel."""
    y = luma(x)
    return float(np.sqrt(np.mean(np.diff(y, axis=0) ** 2) + np.mean(np.diff(y, axis=1) ** 2)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a run, a checkpoint or an export, or the name of a shipped model")
    parser.add_argument("--data", required=True, help="shard set of held-out pairs")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[2, 4, 8], help="numbers of sampling steps (default: 2 4 8)"
    )
    parser.add_argument(
        "--fidelity",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        help="values of fidelity, each combined with each number of steps (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument("--pictures", type=int, default=24, help="largest number of pairs to use (default: 24)")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    upscaler = Upscaler.from_pretrained(options.model)
    entries = pairs_of.from_shards(options.data)
    pairs = [load() for (_, load), _ in zip(entries, range(options.pictures), strict=False)]

    def show(name: str, images: list[np.ndarray]) -> None:
        mean_psnr = np.mean([psnr(x, pair.hq) for x, pair in zip(images, pairs, strict=True)])
        print(f"{name:24s} {mean_psnr:7.3f} {np.mean([sharpness(x) for x in images]):10.2f}", flush=True)

    def restore(pair, steps, **settings) -> np.ndarray:
        return upscaler(pair.lq, steps, seed_of(0, pair.key), **settings)

    print(f"{f'{len(pairs)} images':24s} {'PSNR-Y':>7s} {'sharpness':>10s}")
    show("original", [pair.hq for pair in pairs])
    show("bicubic", [pair.lq_up for pair in pairs])
    show("1 step", [restore(pair, 1) for pair in pairs])
    for steps in options.steps:
        for fidelity in options.fidelity:
            show(f"{steps} steps, fidelity {fidelity:g}", [restore(pair, steps, fidelity=fidelity) for pair in pairs])
    notes: list[str] = []
    show("auto", [restore(pair, "auto", say=notes.append) for pair in pairs])
    chosen = Counter(int(line.split()[0]) for line in notes)
    mean = sum(n * count for n, count in chosen.items()) / len(pairs)
    counts = ", ".join(f"{n} step{'s' * (n != 1)} for {chosen[n]} images" for n in sorted(chosen))
    print(f"auto chose {counts}; mean {mean:.2f} steps per image")


if __name__ == "__main__":
    main()
