"""Prepare training shards from photographs: the same as `teasr prepare`, for a checkout.

`python data_prep/make_shards.py --help` shows all options.
"""

import sys
from functools import partial

from teasr.commands import prepare

main = partial(prepare.main, prog="python data_prep/make_shards.py")

if __name__ == "__main__":
    sys.exit(main())
