"""The generic part of the backbones built on diffusers: frozen weights, LoRA sets on chosen tokens, and the VAE.

config.py holds their common settings, network.py what their networks share, model.py the backbone (loading, dtype,
quantised and swapped blocks, LoRA files, prompts), codec.py the VAE with its scale and shift, and random_weights.py
weights for benchmarks. A backbone adds one file with the habits of its network: ../sd3.py is an example. This folder
imports other files of `backbones`, and `util`.
"""

from teasr.util.optional import check_installed

for package in ("accelerate", "diffusers", "transformers"):
    check_installed(package, "a backbone on diffusers")
