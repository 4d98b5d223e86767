"""Check the real weights of a backbone on one photograph: the first thing to run with them, before any training.

    python bench/check_backbone.py sd35_teasr_16gb --photo photo.jpg          # a preset or a YAML file
    python bench/check_backbone.py zimage_teasr_24gb --photo photo.jpg backbone.quantise=nf4

The picture is cut to 512 px, encoded, decoded, and noised; the network without LoRA and condition predicts the velocity
from noise. Printed are the standard deviation of the latent (a normalised one has about 1), the PSNR of decoding it,
and at each time how much of the velocity's variance the network explains, beside the best linear guess from the noised
latent. A trained model of images with the right times, sign and scale explains more than the linear guess everywhere;
with a wrong one it does worse. The exit code is 1 then.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from teasr import run_config
from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.config import presets
from teasr.diffusion import flow
from teasr.imaging import images
from teasr.imaging.exact_metrics import psnr

TIMES, SIZE_PX = (0.9, 0.7, 0.5, 0.3), 512
PRIOR = Role("prior", branches="single", trains="nothing")


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; returns 0 if the network explains more than the linear guess at every time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="preset or YAML file, such as sd35_teasr_16gb")
    parser.add_argument("--photo", required=True, help="a photograph of at least 512 px")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as backbone.quantise=nf4")
    options = parser.parse_intermixed_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = run_config.load(presets.find(options.config, presets.RUNS), options.overrides)
    model = Model(config.build_backbone((PRIOR,)), PRIOR)
    model.backbone.to(device)
    x = images.to_tensor(images.read_rgb(options.photo))[None, :, :SIZE_PX, :SIZE_PX].to(device)
    with torch.no_grad():
        z = model.encode(x)
        again = model.decode(z).clamp(-1, 1)
        print(f"latent: standard deviation {z.std():.2f}")
        print(f"VAE: PSNR {psnr(images.to_uint8(again[0].cpu()), images.to_uint8(x[0].cpu())):.1f} dB")
        rows = [explained(model, z, t) for t in TIMES]
    for t, (share, linear) in zip(TIMES, rows, strict=True):
        print(f"t = {t}: explains {share:.2f} of the velocity's variance, a linear guess {linear:.2f}")
    good = all(share > linear for share, linear in rows)
    print("the network knows pictures" if good else "NOT a trained model of pictures as it is loaded here")
    return 0 if good else 1


def explained(model: Model, z: Tensor, t: float) -> tuple[float, float]:
    """Return the part of the velocity's variance that the network explains at time t, and a linear guess from z_t."""
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    times = model.snap(torch.full((1,), t, device=z.device))
    z_t, v = flow.interpolate(z, eps, times), eps - z
    error = (model.velocity(z_t, times) - v).square().mean() / v.var()
    linear = torch.corrcoef(torch.stack((z_t.flatten(), v.flatten())))[0, 1] ** 2
    return 1 - float(error), float(linear)


if __name__ == "__main__":
    sys.exit(main())
