"""Prepare training shards from a folder of photographs; run it again to resume.

    python data_prep/make_shards.py photos=~/pictures out=data/train degradation=osediff crop_px=512
    python data_prep/make_shards.py --config data_prep/presets/demo_train.yaml

Settings come from --config and from key=value arguments (those of `teasr.data.making.PrepConfig`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from teasr import config as cfg
from teasr.data.making import PrepConfig, finish, make_plan, process_shard
from teasr.progress import ProgressLine


def main(arguments: list[str] | None = None) -> int:
    """Plan, write every missing shard, then the index; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file with the settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    options = parser.parse_args(arguments)
    try:
        data = cfg.read_yaml(options.config) if options.config else {}
        make(cfg.build(PrepConfig, cfg.override(data, options.overrides)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(config: PrepConfig) -> None:
    """Make the shard set of `config` and say what became of every photograph."""
    plan = make_plan(config)
    line, done, manifests = ProgressLine("prepare", len(plan.crops), "samples"), 0, []

    def count() -> None:
        nonlocal done
        done += 1
        line.show(done)

    for shard in range(plan.shards):
        before = done
        manifests.append(process_shard(plan, shard, count))
        if done == before:  # a finished shard was kept
            done += manifests[-1]["nsamples"]
            line.first += manifests[-1]["nsamples"]
    line.close()
    index = json.loads(finish(plan, manifests).read_text())
    size = sum(m["bytes"] for m in manifests) / 1e6
    print(
        f"{config.out}: {len(plan.crops)} samples of {config.crop_px} px from {len(plan.photos)} photos in {plan.shards} "
        f"shards, {size:.1f} MB, sha256 {index['set_sha256'][:12]}"
    )
    for reason, n in Counter(reason.split(":")[0] for _, reason in plan.skipped).items():
        print(f"skipped {n}: {reason} (named in index.json)")


if __name__ == "__main__":
    sys.exit(main())
