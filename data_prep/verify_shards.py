"""Check a shard set: the same as `teasr verify`, for a checkout.

`python data_prep/verify_shards.py --help` shows all options.
"""

import sys
from functools import partial

from teasr.commands import verify

main = partial(verify.main, prog="python data_prep/verify_shards.py")

if __name__ == "__main__":
    sys.exit(main())
