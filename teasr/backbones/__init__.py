"""Diffusion networks and their image codecs behind the interface of base.py: small ones, and those of diffusers.

A backbone defines its own time scale, token layout, text handling and weight files. What backbones on diffusers share
is in generic/. This folder imports only `diffusion`, `assets` and `util`: never methods, data or the trainer.
"""

import logging

# peft imports bitsandbytes if it is installed. On machines without a GPU, bitsandbytes then warns about a missing CPU
# kernel that teasr does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
