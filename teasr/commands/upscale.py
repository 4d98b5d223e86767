"""`teasr upscale`: restore images with a trained model."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

from teasr.util import command_line

SUMMARY = "restore images, by default at the scale of the model (`small`: 4)"
EXAMPLES = """examples:
  {prog} photo.jpg -o photo_x4.png
      one image in one step, with the small model that comes with teasr
  {prog} holiday/ -o restored/ --model runs/mine --steps 4
      a folder with its sub-folders, with your own model
  {prog} portrait.png -o out/ --model runs/mine --steps 8 --fidelity 0.5
      8 steps, blended halfway to the one-step result
  {prog} portrait.png -o out/ --strength 0.3
      one step, faithful rather than detailed
  {prog} 'scans/*.tif' -o out/ --model runs/mine --suffix _x4 --format png
  {prog} holiday/ -o restored/ --model runs/mine --skip-existing
      continue after Ctrl-C

Exit code 0: all images are restored; 1: some failed; 2: an error that the message explains; 130: interrupted.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="IN", help="image file, folder of images or quoted glob pattern")
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        help="output folder, or output file for a single image; with / at the end a folder",
    )
    model = parser.add_argument_group("model")
    model.add_argument("-n", "--model", help=command_line.MODEL_HELP)
    model.add_argument(
        "--weights",
        choices=("ema", "weights"),
        default="ema",
        help="ema: moving average of the weights; weights: those of the last update (default: ema)",
    )
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--steps",
        default="1",
        metavar="N|auto",
        help="number of sampling steps: 1 is fastest, more steps add more detail; auto chooses a number for each image "
        "(default: 1)",
    )
    quality.add_argument(
        "--fidelity",
        type=float,
        metavar="F",
        help="0 to 1: how far to blend the result of several steps with the one-step result (default: 0, no blending)",
    )
    quality.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="0 to 1: from faithful to detailed within one step, for a model that has this dial, such as `small` "
        "(default: what the model was trained for)",
    )
    quality.add_argument(
        "-s",
        "--scale",
        type=float,
        metavar="X",
        help="scale factor of width and height (default: that of the model, 4 for `small`)",
    )
    quality.add_argument("--size", metavar="WxH", help="size of the result in pixels, instead of --scale")
    quality.add_argument(
        "--color",
        choices=("none", "wavelet", "adain", "lab"),
        default="none",
        help="method of matching the colours of the result to those of the input (default: none)",
    )
    quality.add_argument("--seed", type=int, default=0, help="seed of the sampling noise (default: 0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "-t",
        "--tile",
        default="auto",
        metavar="auto|PX",
        help="side in pixels of the tiles in which large images are processed; auto: as large as memory allows, up to "
        "the model's own tile size (default: auto)",
    )
    machine.add_argument("--dtype", help=command_line.DTYPE_HELP)
    machine.add_argument("--offload", action="store_true", help=command_line.OFFLOAD_HELP)
    machine.add_argument("--device", help=command_line.DEVICE_HELP)
    files = parser.add_argument_group("files")
    existing = files.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="skip images whose result already exists")
    existing.add_argument(
        "--overwrite", action="store_true", help="replace results that already exist (default: they are an error)"
    )
    files.add_argument("--suffix", default="", help="text appended to output file names, such as _x4 (default: none)")
    files.add_argument(
        "--format", choices=("png", "jpg", "webp", "tif"), help="output format (default: that of the input)"
    )
    files.add_argument("--quality", type=int, metavar="Q", help="quality of JPEG and WebP, 1 to 100 (default: 95)")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr upscale") -> int:
    """Restore the images; returns the exit code, which the help explains."""
    options = parser(prog).parse_args(arguments)
    return command_line.run("restoring with this model", lambda: _upscale(options), stopped="finished files are kept")


def _upscale(options: argparse.Namespace) -> int:
    from teasr.restore import batch, frames, outputs
    from teasr.restore.upscaler import Upscaler

    steps, settings = _numbers(options)
    todo = batch.jobs(options.inputs, options.out, options.suffix, options.format)
    pairs = [(job.source, job.target) for job in todo if not job.problem]
    jpeg_quality = outputs.check_quality(options.quality, [target for _, target in pairs])
    outputs.check_targets(pairs, options.skip_existing, options.overwrite)
    if options.skip_existing and all(os.path.isfile(job.target) for job in todo):
        print(f"all {len(todo)} results already exist; nothing to do")
        return 0
    upscaler = Upscaler.from_pretrained(options.model, options.weights, options.device, options.dtype, options.offload)
    upscaler.sampler.check(2 if steps == "auto" else steps, settings["dials"])
    factor = frames.factor(upscaler.scale, options.scale, settings["size"])
    outputs.check_formats(
        pairs, partial(frames.size_of_result, factor=factor, size=settings["size"]), options.skip_existing
    )

    def restore(picture, on_progress, add_note, scratch):
        how = settings | {"on_progress": on_progress, "say": add_note, "scratch": scratch}
        return upscaler(picture, steps, options.seed, **how)

    failed = batch.run(todo, restore, options.skip_existing, options.overwrite, jpeg_quality)
    if failed:
        print(f"{failed} of {len(todo)} images failed", file=sys.stderr)
    return 1 if failed else 0


def _numbers(options: argparse.Namespace) -> tuple[int | str, dict]:
    """Return the number of steps and the settings of a call of `Upscaler`. Raises ValueError for a wrong number."""
    if options.tile != "auto" and not (options.tile.isdecimal() and int(options.tile) >= 1):
        raise ValueError(f"--tile {options.tile}: must be auto or a number of pixels such as 512")
    if options.steps != "auto" and not (options.steps.isdecimal() and int(options.steps) >= 1):
        raise ValueError(f"--steps {options.steps}: must be auto or a whole number >= 1")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: must be a whole number from 0 to {2**63 - 1}")
    steps = "auto" if options.steps == "auto" else int(options.steps)
    settings = {"scale": options.scale, "size": _size(options.size), "color_fix": options.color}
    dials = {"fidelity": options.fidelity, "strength": options.strength}
    settings |= {"dials": {name: value for name, value in dials.items() if value is not None}}
    settings |= {"tile_px": None if options.tile == "auto" else int(options.tile)}
    return steps, settings


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size {text}: must be WIDTHxHEIGHT in pixels, such as 3840x2160")
    return int(width), int(height)
