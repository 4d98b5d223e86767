"""Write a report on several evaluations: the same as `teasr report`, for a checkout.

`python eval/report.py --help` shows all options.
"""

import sys
from functools import partial

from teasr.commands import report

main = partial(report.main, prog="python eval/report.py")

if __name__ == "__main__":
    sys.exit(main())
