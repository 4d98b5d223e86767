"""Train a model from a YAML config: the same as `teasr train`, for a checkout.

`python launch/train.py --help` shows all options.
"""

from functools import partial

from teasr.commands import train

main = partial(train.main, prog="python launch/train.py")

if __name__ == "__main__":
    train.program(prog="python launch/train.py")
