"""Stable Diffusion 2.1 (0.9 B parameters) as a one-step restoration model, on diffusers' U-Net and VAE.

backbone.py is the public part, network.py maps the U-Net's predictions to velocities, and encoder.py adapts the VAE's
encoder. This folder imports other files of `backbones`, `diffusion` and `util`.
"""

from teasr.util.optional import check_installed

for package in ("accelerate", "diffusers", "transformers"):
    check_installed(package, "Stable Diffusion 2.1")
