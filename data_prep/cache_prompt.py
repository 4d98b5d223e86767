"""Compute the text embedding of the prompt once: the same as `teasr cache-prompt`, for a checkout.

`python data_prep/cache_prompt.py --help` shows all options.
"""

import sys
from functools import partial

from teasr.commands import cache_prompt

main = partial(cache_prompt.main, prog="python data_prep/cache_prompt.py")

if __name__ == "__main__":
    sys.exit(main())
