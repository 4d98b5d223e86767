"""Encode a shard set with the VAE once: the same as `teasr cache-latents`, for a checkout.

`python data_prep/cache_latents.py --help` shows all options.
"""

import sys
from functools import partial

from teasr.commands import cache_latents

main = partial(cache_latents.main, prog="python data_prep/cache_latents.py")

if __name__ == "__main__":
    sys.exit(main())
