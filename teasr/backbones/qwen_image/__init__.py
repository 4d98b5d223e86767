"""Qwen-Image (20 B parameters) as a dual-branch restoration model, built on diffusers' transformer and VAE.

backbone.py is the public part, used by the rest of teasr. transformer.py adds the condition branch, modulation.py
replaces a third of the weights with a lookup table, and vae.py is the codec for single images. This folder imports
other files of `backbones`, and `util`.
"""

from teasr.util.optional import check_installed

for package in ("accelerate", "diffusers", "transformers"):
    check_installed(package, "Qwen-Image")
