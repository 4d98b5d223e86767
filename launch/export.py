"""Export a trained run: the same as `teasr export`, for a checkout.

`python launch/export.py --help` shows all options.
"""

import sys
from functools import partial

from teasr.commands import export

main = partial(export.main, prog="python launch/export.py")

if __name__ == "__main__":
    sys.exit(main())
