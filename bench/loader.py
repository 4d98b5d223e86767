"""Compare the speed of the training reader with only reading the tar files and decoding the images.

    python bench/loader.py data/train [--samples 1000] [--rounds 5]

Both run alternately in this process, over the same order of shards. `raw` reads the tar files with tarfile and decodes
HQ and LQ; `reader` is the iterator that the trainer uses (webdataset, shuffling within shards, checksums, LQ
upsampling, flips, tensors). Reports samples/s and the median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import time
from itertools import islice

import torch

from teasr.data.config import DataConfig
from teasr.data.shards import ShardSet
from teasr.data.stream import PairStream
from teasr.imaging import images


def raw(shards: ShardSet, samples: int) -> float:
    """Return the seconds needed to read tar files and decode `samples` pairs."""
    started, done = time.perf_counter(), 0
    while True:
        for url in shards.urls:
            with tarfile.open(url) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        continue
                    images.decode_rgb(tar.extractfile(member).read(), member.name)
                    done += ".hq." in member.name
                    if done == samples:
                        return time.perf_counter() - started


def reader(shards: ShardSet, samples: int, **config) -> float:
    """Return the seconds that the training reader needs for `samples` pairs."""
    stream = PairStream(shards, DataConfig(shards.location, streams=1, **config), 0, 0, 1, 0)
    started = time.perf_counter()
    for _ in islice(iter(stream), samples):
        pass
    return time.perf_counter() - started


def main() -> None:
    """Time all variants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", help="folder of a shard set")
    parser.add_argument("--samples", type=int, default=1000, help="number of samples per round (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; figures are medians (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards = ShardSet.open(options.shards)
    ways = {
        "raw tar + decode": lambda: raw(shards, options.samples),
        "reader": lambda: reader(shards, options.samples),
        "reader, no augmentation": lambda: reader(shards, options.samples, augment="none"),
        "reader, online degradation": lambda: reader(shards, options.samples, degrade="online"),
    }
    if shards.settings.get("lq"):
        del ways["reader, online degradation"]
    rows: dict[str, list[float]] = {name: [] for name in ways}
    raw(shards, min(50, options.samples))  # fills the page cache
    for _ in range(options.rounds):
        for name, way in ways.items():
            rows[name].append(way())
    base = rows["raw tar + decode"]
    print(
        f"{shards.location}: {options.samples} samples, {shards.settings['crop_px']} px, {shards.settings['hq_format']}"
    )
    for name, seconds in rows.items():
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        print(f"{name:28s} {options.samples / statistics.median(seconds):8.1f} samples/s   {ratio:5.2f} x raw speed")


if __name__ == "__main__":
    main()
