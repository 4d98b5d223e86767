"""Predict which blocks of Qwen-Image to swap on which card, and how long a picture takes: the table in docs/scaling.md.

    python bench/card_table.py                  # prints the table; needs no GPU and no weights
    python bench/card_table.py --write          # writes it into docs/scaling.md
    python bench/card_table.py --check          # compares predictions with the updates measured on an H200; the counts
                                                # are those of this commit, see docs/memory.md
    python bench/card_table.py --one qwen_teasr_12gb 512 method.order=blocks    # one preset, with changes

Networks of a few blocks are counted on the meta device (teasr/training/footprint.py). All blocks are alike, so bytes,
FLOPs and calls of 60 blocks follow from those of two smaller numbers. The seconds are those of
teasr/training/timing.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from teasr import run_config
from teasr.training import footprint, timing
from teasr.training.engine import engine_settings
from teasr.training.footprint import GIB, Calls, Footprint

ROOT = Path(__file__).resolve().parent.parent
BLOCKS, FEW, MORE = 60, 4, 6
PAGE, BEGIN, END = ROOT / "docs/scaling.md", "<!-- table of bench/card_table.py -->", "<!-- end of the table -->"
SIZES = (512, 1024)
PRESET, ONE = "qwen_teasr_12gb", ("train.batch=1",)  # one picture an update: the optimiser steps after each
KINDS = {"bf16": "null", "fp8": "fp8", "nf4": "nf4"}
RESERVED_GIB = 0.7  # of a card's memory, for the driver and fragmentation beyond the allowance of the dry run
MEASURED = {  # rows of bench/results/h200.jsonl
    "teasr-bf16": ("train.batch=1", "train.micro_batch=1", "backbone.gradient_checkpointing=false"),
    "teasr-bf16-four-at-once": ("train.batch=4", "train.micro_batch=4", "backbone.gradient_checkpointing=true"),
    "swap-bf16": (
        "train.batch=1", "train.micro_batch=1", "backbone.gradient_checkpointing=true", "backbone.swap_blocks=60",
    ),
}  # fmt: skip


def main() -> None:
    """Print, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write the table into docs/scaling.md")
    what.add_argument("--check", action="store_true", help="compare with the measured updates")
    what.add_argument("--one", nargs="+", metavar="WHAT", help="a preset, a size in px and changes of its settings")
    options = parser.parse_args()
    if options.one:
        print(one(options.one[0], int(options.one[1]), tuple(options.one[2:])))
        return
    if options.check:
        print("\n".join(check()))
        return
    lines = table()
    if options.write:
        text = PAGE.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]))
    print("\n".join(lines))


def counted(preset: str, overrides: tuple[str, ...], size_px: int) -> Footprint:
    """Return the footprint of a preset with all 60 blocks. Swapped are none or all of the blocks."""
    counts = []
    for blocks in (FEW, MORE):
        own = [text.replace(f"swap_blocks={BLOCKS}", f"swap_blocks={blocks}") for text in overrides]
        own += ["backbone.model=random", "backbone.prompt=random", f"backbone.transformer={{num_layers: {blocks}}}"]
        config = run_config.load(ROOT / f"launch/presets/{preset}.yaml", own)
        counts.append(footprint.count(config, engine_settings(config.train, 1), size_px))
    return extrapolated(*counts, (FEW, MORE, BLOCKS))


def one(preset: str, size_px: int, overrides: tuple[str, ...]) -> str:
    """Return what one update of a preset costs: memory, copies, FLOPs, and the seconds on each card."""
    found = counted(preset, overrides, size_px)
    lines = [
        f"GPU {found.gpu_total / GIB:.2f} GiB, host {sum(found.host.values()) / GIB:.2f} GiB, copied to the GPU in an "
        f"update {found.copied / GIB:.1f} GiB, {sum(found.flops.values()) / 1e12:.0f} TFLOP",
        "activations: " + ", ".join(f"{name} {n / GIB:.2f} GiB" for name, n in found.peaks.items()),
    ]
    for name, card in timing.CARDS.items():
        predicted = timing.predict(found, card)
        lines.append(f"{name}: {predicted.seconds:.2f} s an update ({predicted.bound})")
    return "\n".join(lines)


def extrapolated(few: Footprint, more: Footprint, blocks: tuple[int, int, int]) -> Footprint:
    """Return the footprint of blocks[2] blocks from those of blocks[0] and blocks[1]."""
    result = Footprint(few.size_px, on_host=few.on_host)

    def line(a: int, b: int) -> int:
        return a + (b - a) * (blocks[2] - blocks[0]) // (blocks[1] - blocks[0])

    for name in ("parameters", "gpu", "host", "flops", "peaks"):
        one, two = getattr(few, name), getattr(more, name)
        getattr(result, name).update({key: line(one.get(key, 0), two[key]) for key in two})
    result.trained, result.step = line(few.trained, more.trained), line(few.step, more.step)
    result.gpu[footprint.LARGER] = max(result.step, *result.peaks.values())
    for name, a in few.calls.items():
        b = more.calls[name]
        kernels = Counter({work: n for work in b.kernels if (n := line(a.kernels[work], b.kernels[work])) > 0})
        result.calls[name] = Calls(kernels, line(a.views, b.views), line(a.copied, b.copied))
    return result


def check() -> list[str]:
    """Return a line for each measured update: the predicted and the measured seconds of each loss."""
    rows = [json.loads(line) for line in (ROOT / "bench/results/h200.jsonl").read_text().splitlines()]
    lines = []
    for row in rows:
        if row["step"] not in MEASURED:
            continue
        found = counted("qwen_teasr", MEASURED[row["step"]], row["size_px"])
        predicted = {name: timing.predict_loss(found, name, timing.CARDS["H200"]) for name in found.calls}
        total = timing.predict(found, timing.CARDS["H200"]).seconds
        measured = sum(row["seconds"].values())
        each = ", ".join(f"{name} {s:.2f} ({row['seconds'][name]:.2f}, {b})" for name, (s, b) in predicted.items())
        lines.append(f"{row['step']}: {total:.2f} s, measured {measured:.2f} s ({total / measured - 1:+.0%}); {each}")
    return lines


def with_swapped(everything: Footprint, n: int) -> Footprint:
    """Return the footprint with n swapped blocks, from that with all of them: copies are in proportion."""
    result = replace(everything, gpu=dict(everything.gpu), host=dict(everything.host))
    blocks = everything.host["swapped blocks"]
    result.gpu["blocks that stay"] = blocks * (BLOCKS - n) // BLOCKS
    result.host["swapped blocks"] = blocks - result.gpu["blocks that stay"]
    if not n:
        del result.gpu["slots for swapped blocks"]
    result.calls = {
        name: Calls(calls.kernels, calls.views, calls.copied * n // BLOCKS) for name, calls in everything.calls.items()
    }
    return result


def cell(everything: Footprint, card: timing.Card) -> str:
    """Return blocks to swap, GiB and seconds a picture, with as few swapped blocks as the card's memory allows."""
    usable = (card.memory_gib - RESERVED_GIB) * GIB
    for n in range(BLOCKS + 1):
        found = with_swapped(everything, n)
        if found.gpu_total <= usable:
            predicted = timing.predict(found, card)
            return f"{n}; {found.gpu_total / GIB:.1f}; {predicted.seconds:.1f} ({predicted.bound})"
    return "does not fit"


def table() -> list[str]:
    """Return the lines of the table."""
    counts = {
        (size, kind): counted(PRESET, (f"backbone.quantise={value}", f"backbone.swap_blocks={BLOCKS}", *ONE), size)
        for size, (kind, value) in itertools.product(SIZES, KINDS.items())
    }
    lines = ["| card | size | " + " | ".join(KINDS) + " |", "|---" * (2 + len(KINDS)) + "|"]
    for (name, card), size in itertools.product(timing.CARDS.items(), SIZES):
        cells = [cell(counts[size, kind], card) for kind in KINDS]
        lines.append(f"| {name}, {card.memory_gib:g} GiB | {size} px | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
