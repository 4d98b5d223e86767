"""Diffusion networks and their image codecs behind the interface of base.py: a small one and Qwen-Image.

A backbone defines its own time scale, token layout, text handling and weight files. Qwen-Image has its own folder,
qwen_image/. This folder imports only `diffusion`, `assets` and `util`: never methods, data or the trainer.
"""

import logging

# peft imports bitsandbytes if it is installed. On machines without a GPU, bitsandbytes then warns about a missing CPU
# kernel that teasr does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
