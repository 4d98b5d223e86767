"""Compare dials between fidelity and detail for one step, on held-out pairs, with a model of the backbone `unet`.

    python bench/dial.py small --data SHARDS [--pictures 12] [--only noised line]

Each candidate changes one number of the one-step restoration; `sharpened` is the control: unsharp masking of a result,
which any picture editor does. The columns are means over the pictures: PSNR-Y, LPIPS, DISTS of the central 128 px, and
the energy of high frequencies (root mean square of luma minus its Gaussian blur of 1.5 px, as a share of the
original's).
"""

from __future__ import annotations

import argparse
import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from torch import Tensor

from teasr import Upscaler
from teasr.backbones.model import Condition, Model
from teasr.data import pairs as pairs_of
from teasr.diffusion import flow
from teasr.evaluation.metrics import Scorer
from teasr.imaging import images
from teasr.imaging.exact_metrics import luma
from teasr.util.seed import seed_of

BLUR_PX = 1.5
METRICS = ("psnr", "lpips", "dists")
DISTS_PX = 128  # DISTS of a whole crop takes longer than all else together


class Candidates:
    """The candidates for one picture; each method takes the value of its dial and returns latents."""

    def __init__(self, model: Model, z_lq: Tensor, eps: Tensor):
        self.model, self.z_lq, self.eps = model, z_lq, eps
        self.coarse = model.coarse(z_lq)[0]
        self.one = self.jump(eps, 1.0)

    def jump(self, z_t: Tensor, t: float, r: float = 0.0) -> Tensor:
        """One jump from time t to the image; r: time of the condition branch."""
        times = (torch.full((1,), x) for x in (t, r))
        t, r = (self.model.snap(x) for x in times)
        return flow.z0_from_velocity(z_t, self.model.velocity(z_t, t, Condition(self.z_lq, r)), t)

    def noised(self, t: float) -> Tensor:
        """From the coarse restoration, noised to time t: the dial `strength`, t = 0.15 strength."""
        return self.jump(flow.interpolate(self.coarse, self.eps, torch.tensor([t])), t)

    def noised_lq(self, t: float) -> Tensor:
        """From the latents of the LQ picture, noised to time t."""
        return self.jump(flow.interpolate(self.z_lq, self.eps, torch.tensor([t])), t)

    def target(self, r: float) -> Tensor:
        """From pure noise, with another target time r in the condition branch."""
        return self.jump(self.eps, 1.0, r)

    def scaled(self, k: float) -> Tensor:
        """From k times the noise."""
        return self.jump(k * self.eps, 1.0)

    def line(self, s: float) -> Tensor:
        """On the line from the coarse restoration (0) through the one-step result (1)."""
        return self.coarse + s * (self.one - self.coarse)

    def sharpened(self, a: float) -> Tensor:
        """The one-step result with `a` times the difference to its blur added."""
        x = self.model.decode(self.one)[0].permute(1, 2, 0).numpy()
        x = x + a * (x - cv2.GaussianBlur(x, (0, 0), BLUR_PX))
        return self.model.encode(torch.from_numpy(x).permute(2, 0, 1)[None])

    def two_steps(self, t: float) -> Tensor:
        """The one-step result, noised to time t once more."""
        fresh = torch.randn(self.eps.shape, generator=torch.Generator().manual_seed(1))
        return self.jump(flow.interpolate(self.one, fresh, torch.tensor([t])), t)


VALUES = {
    "noised": (0.0, 0.0375, 0.075, 0.1125, 0.15, 0.2, 0.3),
    "target": (0.0, 0.5, 1.0),
    "noised_lq": (0.05, 0.2, 0.4),
    "scaled": (0.0, 0.5, 1.5),
    "line": (0.5, 1.5, 2.0),
    "sharpened": (0.5, 1.0, 2.0),
    "two_steps": (0.1,),
}


def high(x: np.ndarray) -> np.ndarray:
    """Return the high frequencies of a picture [H, W, 3] uint8."""
    y = luma(x)
    return y - cv2.GaussianBlur(y, (0, 0), BLUR_PX)


def central(x: np.ndarray) -> np.ndarray:
    """Return the centre of a picture, on which DISTS is computed."""
    top, left = (max(0, (side - DISTS_PX) // 2) for side in x.shape[:2])
    return x[top : top + DISTS_PX, left : left + DISTS_PX]


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a run, a checkpoint or an export, or the name of a shipped model")
    parser.add_argument("--data", required=True, help="shard set of held-out pairs")
    parser.add_argument("--pictures", type=int, default=12, help="number of pairs, spread over the set (default: 12)")
    parser.add_argument("--only", nargs="+", choices=VALUES, default=list(VALUES), help="candidates (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = Upscaler.from_pretrained(options.model, device="cpu").model
    whole, centre = (Scorer(list(names), require=True) for names in (METRICS[:2], METRICS[2:]))
    pairs = list(pairs_of.from_shards(options.data))
    chosen = sorted({round(i) for i in np.linspace(0, len(pairs) - 1, options.pictures)})
    found: dict[str, list[list[float]]] = {}
    for key, load in (pairs[i] for i in chosen):
        sample = load()
        z_lq = model.encode(images.to_tensor(sample.lq_up)[None])
        eps = torch.randn(z_lq.shape, generator=torch.Generator().manual_seed(seed_of(0, key)))
        candidates, energy = Candidates(model, z_lq, eps), np.square(high(sample.hq)).mean()
        for name, value in itertools.chain.from_iterable(((n, v) for v in VALUES[n]) for n in options.only):
            x = images.to_uint8(model.decode(getattr(candidates, name)(value))[0])
            scores = whole.picture(x, sample.hq) | centre.picture(*map(central, (x, sample.hq)))
            share = float(np.sqrt(np.square(high(x)).mean() / energy))
            found.setdefault(f"{name} {value:g}", []).append([*(scores[m] for m in METRICS), share])
    print(f"{f'{len(chosen)} pictures':18s}" + "".join(f"{name:>9s}" for name in (*METRICS, "high")))
    for name, rows in found.items():
        print(f"{name:18s}" + "".join(f"{x:9.3f}" for x in np.mean(rows, 0)))


if __name__ == "__main__":
    main()
