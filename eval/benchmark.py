"""Score a model, or existing predictions, on held-out pairs: the same as `teasr benchmark`, for a checkout.

`python eval/benchmark.py --help` shows all options.
"""

import sys
from functools import partial

from teasr.commands import benchmark

main = partial(benchmark.main, prog="python eval/benchmark.py")

if __name__ == "__main__":
    sys.exit(main())
