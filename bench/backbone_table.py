"""Predict which backbone and method fit on which card, and the seconds a picture: a table in docs/scaling.md.

    python bench/backbone_table.py                  # prints the table; needs no GPU and no weights; about 3 minutes
    python bench/backbone_table.py --write          # writes it into docs/scaling.md
    python bench/backbone_table.py sd35_tsdsr       # rows of these presets alone

Updates are counted on the meta device (teasr/training/footprint.py); where all blocks are alike, networks of a few
blocks are counted and extrapolated, as in card_table.py. The seconds are those of teasr/training/timing.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from card_table import RESERVED_GIB, extrapolated

from teasr import run_config
from teasr.training import footprint, timing
from teasr.training.engine import engine_settings
from teasr.training.footprint import GIB, Footprint

ROOT = Path(__file__).resolve().parent.parent
PAGE, BEGIN, END = ROOT / "docs/scaling.md", "<!-- table of bench/backbone_table.py -->", "<!-- end of this table -->"
SIZES = {512: (), 1024: ("train.micro_batch=1",)}  # px -> overrides
FEW, MORE = 4, 6
ALIKE = {"qwen_image": ("num_layers", 60), "z_image": ("n_layers", 30)}  # backbone -> setting and number of its blocks
SD21, SD35, QWEN = "SD 2.1", "SD 3.5-medium", "Qwen-Image"  # SD: Stable Diffusion
GUIDED = ("backbone.null_prompt=random",)
OSEDIFF = ("method={name: score_distillation, student: single, cfg_real: 7.5}", *GUIDED)
TADSR = ("method={name: tadsr, cfg_real: 7.5}", *GUIDED)
D3SR = ("method={name: d3sr, disc_rank: 16, disc_blocks: 12}",)  # half of the blocks of SD35; others: `counted`
ROWS = (  # backbone, method, preset, overrides
    (SD21, "OSEDiff", "sd21_osediff", ()),
    (SD21, "D3SR", "sd21_d3sr", ()),
    (SD21, "TADSR", "sd21_tadsr", ()),
    (SD35, "TEASR", "sd35_teasr_16gb", ()),
    (SD35, "TSD-SR", "sd35_tsdsr", ()),
    (SD35, "OSEDiff", "sd35_teasr_16gb", OSEDIFF),
    (SD35, "D3SR", "sd35_teasr_16gb", D3SR),
    (SD35, "TADSR", "sd35_teasr_16gb", TADSR),
    ("Z-Image", "TEASR", "zimage_teasr_24gb", ()),
    ("Z-Image", "OSEDiff", "zimage_teasr_24gb", OSEDIFF),
    ("Z-Image", "D3SR", "zimage_teasr_24gb", D3SR),
    ("Z-Image", "TADSR", "zimage_teasr_24gb", TADSR),
    (QWEN, "TEASR", "qwen_teasr", ()),
    (QWEN, "OSEDiff", "qwen_osediff", ()),
    (QWEN, "D3SR", "qwen_d3sr", ()),
    (QWEN, "TADSR", "qwen_tadsr", ()),
    (f"{QWEN}, NF4", "TEASR", "qwen_teasr_24gb", ()),
    (f"{QWEN}, NF4, swap", "TEASR", "qwen_teasr_12gb", ()),
    (f"{QWEN}, NF4, swap", "TEASR", "qwen_teasr_8gb", ()),
)


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="presets whose rows are computed; default: all")
    parser.add_argument("--write", action="store_true", help="write the table into docs/scaling.md")
    options = parser.parse_args()
    lines = table([row for row in ROWS if not options.presets or row[2] in options.presets])
    if options.write:
        text = PAGE.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]))
    print("\n".join(lines))


def counted(preset: str, overrides: tuple[str, ...], size_px: int) -> tuple[Footprint, int]:
    """Return the footprint of an update of a preset at full size, and how many pictures it takes.

    Swapped are none or all of the blocks, and the discriminator of D3SR has half of them.
    """
    own = ["backbone.model=random", "backbone.prompt=random", *overrides]
    config = run_config.load(ROOT / f"launch/presets/{preset}.yaml", own)
    if config.backbone_name not in ALIKE:
        return footprint.count(config, engine_settings(config.train, 1), size_px), config.train.batch
    setting, blocks = ALIKE[config.backbone_name]
    counts = []
    for n in (FEW, MORE):
        some = [f"backbone.transformer={{{setting}: {n}}}"]
        some += [f"backbone.swap_blocks={n}"] if config.backbone.swap_blocks else []
        some += [f"method.disc_blocks={n // 2}"] if config.method_name == "d3sr" else []
        few = run_config.load(ROOT / f"launch/presets/{preset}.yaml", [*own, *some])
        counts.append(footprint.count(few, engine_settings(few.train, 1), size_px))
    return extrapolated(*counts, (FEW, MORE, blocks)), config.train.batch


def table(rows: list[tuple]) -> list[str]:
    """Return the lines of the table."""
    head = ["backbone", "method: preset", "px", "GiB", "TFLOP a picture", *timing.CARDS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for backbone, method, preset, overrides in rows:
        for size, more in SIZES.items():
            found, pictures = counted(preset, (*overrides, *more), size)
            cells = [cell(found, card, pictures) for card in timing.CARDS.values()]
            name = f"{method}: `{preset}`{' + method' if overrides else ''}"
            per_picture = sum(found.flops.values()) / pictures / 1e12
            row = [backbone, name, str(size), f"{found.gpu_total / GIB:.1f}", f"{per_picture:.0f}", *cells]
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def cell(found: Footprint, card: timing.Card, pictures: int) -> str:
    """Return the predicted seconds a picture, or that it does not fit."""
    if found.gpu_total > (card.memory_gib - RESERVED_GIB) * GIB:
        return "–"
    return f"{timing.predict(found, card).seconds / pictures:.1f}"


if __name__ == "__main__":
    main()
