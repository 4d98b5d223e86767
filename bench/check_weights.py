"""Check that the weights of a large backbone are read rightly: the first command for somebody who has them.

    python bench/check_weights.py launch/presets/sd21_osediff.yaml ~/pictures
    python bench/check_weights.py launch/presets/sd21_osediff.yaml ~/pictures backbone.model=~/models/sd21-base

Some pictures are encoded and decoded, and their latents are noised at several times. The base without LoRA and without
an LQ image predicts the velocity. A guess that knows only the mean square of the latents sets the limit: a trained
model stays below it at every time, while a wrong sign, time or kind of prediction does not.
Exit code 0 if all lines are right, 1 otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from teasr import run_config
from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.diffusion import flow
from teasr.imaging import finding, images
from teasr.restore.pretrained import pick_device
from teasr.util import command_line

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
LEAST_PSNR = 20.0  # dB of a picture that was encoded and decoded


def main() -> int:
    """Check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config of a run, such as a preset")
    parser.add_argument("pictures", type=Path, help="folder of photographs; the first ones are used")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes of the config")
    parser.add_argument("--count", type=int, default=4, help="number of photographs (default: 4)")
    parser.add_argument("--size", type=int, default=512, help="side of their middle part in px (default: 512)")
    return command_line.run("checking weights", lambda: check(parser.parse_intermixed_args()))


@torch.no_grad()
def check(options: argparse.Namespace) -> int:
    """Print the table; return 0 if all is right. Raises ValueError if weights or pictures are missing."""
    config, device = run_config.load(options.config, options.changes), pick_device(None)
    real = Role("real", branches="single", trains="nothing")
    backbone = config.build_backbone((real,))
    if not backbone.has_prior:
        raise ValueError(f"backbone {config.backbone_name} has no weights that were trained without an LQ image")
    backbone.to(device)
    x = crops(options.pictures, options.count, options.size).to(device)
    z = torch.cat([backbone.encode(part) for part in x.split(1)])
    decoded = torch.cat([backbone.decode(part) for part in z.split(1)])
    psnr = -10 * ((decoded - x).square().mean() / 4).log10().item()
    verdicts = [psnr >= LEAST_PSNR]
    print(f"codec: {psnr:.1f} dB, mean {z.mean():.2f} and deviation {z.std():.2f} of the latents: {said(verdicts[0])}")
    print(f"{'time':>6}{'error':>10}{'limit':>10}{'ratio':>8}")
    for time in TIMES:
        t = backbone.snap(torch.full((1,), time, device=device))
        error, limit = errors(Model(backbone, real), z, t)
        verdicts.append(error < limit)
        print(f"{t.item():6.3f}{error:10.4f}{limit:10.4f}{error / limit:8.3f}  {said(verdicts[-1])}")
    print("all right" if all(verdicts) else "WRONG: see above")
    return 0 if all(verdicts) else 1


def said(right: bool) -> str:
    """Return a verdict as a word."""
    return "right" if right else "WRONG"


def crops(folder: Path, count: int, size: int) -> Tensor:
    """Return the middle parts of the first photographs that are large enough, [B, 3, size, size] in [-1, 1]."""
    found = []
    for name in finding.walk_pictures(folder)[0]:
        picture = images.read_rgb(folder / name)
        height, width = picture.shape[:2]
        if min(height, width) >= size and len(found) < count:
            top, left = (height - size) // 2, (width - size) // 2
            found.append(images.to_tensor(picture[top : top + size, left : left + size]))
    if not found:
        raise ValueError(f"{folder} has no photograph of at least {size}x{size} px: name another folder, or --size")
    return torch.stack(found)


def errors(real: Model, z: Tensor, t: Tensor) -> tuple[float, float]:
    """Return the mean squared error of the velocity at time t [1], and that of the best guess from each pixel alone.

    With data of mean square q^2 the guess is linear in z_t, and its error is q^2 / ((1 - t)^2 q^2 + t^2).
    """
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    pairs = zip(z.split(1), noise.split(1), strict=True)
    found = [real.velocity(flow.interpolate(z0, n, t), t) - flow.velocity_target(z0, n) for z0, n in pairs]
    square = z.square().mean()
    limit = square / ((1 - t).square() * square + t.square())
    return torch.cat(found).square().mean().item(), limit.item()


if __name__ == "__main__":
    raise SystemExit(main())
