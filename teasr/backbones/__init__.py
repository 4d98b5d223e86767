"""Networks with their image codecs, all behind the contract of base.py: the small one, and Qwen-Image in a folder of its own.

A backbone knows its own time scale, token layout, text and weights files. It may import `diffusion`, `assets` and `util`,
never a method, the data or the trainer.
"""

import logging

# peft imports bitsandbytes where it is installed, which on a machine without GPU warns of a kernel that nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
