"""The `teasr` command, with one sub-command for each use of a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = (
    "examples:\n"
    "  teasr upscale photo.jpg -o photo_x4.png                                 "
    "one picture in one step, by the small model that comes along\n"
    "  teasr upscale holiday/ -o restored/ --model runs/mine --steps 4         "
    "a folder, sub-folders kept; a model of one's own\n"
    "  teasr upscale portrait.png -o out/ --model runs/mine --steps 8 --fidelity 0.5   "
    "half of the detail that 8 steps draw\n"
    "  teasr upscale 'scans/*.tif' -o out/ --model runs/mine --suffix _x4 --format png\n"
    "  teasr upscale holiday/ -o restored/ --model runs/mine --skip-existing   "
    "go on after Ctrl-C\n"
)


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments and run the sub-command.

    Returns the exit code: 0 success, 1 some files failed, 2 an error that the message explains, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="teasr", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_upscale(commands)
    _add_demo(commands)
    _add_sync(commands)
    options = parser.parse_args(arguments)
    try:
        return options.act(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: what was finished is there", file=sys.stderr, flush=True)
        return 130


def _add_upscale(commands) -> None:
    upscale = commands.add_parser(
        "upscale", help="restore pictures at four times their size", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    upscale.add_argument("inputs", nargs="+", metavar="IN", help="file, folder or quoted pattern")
    upscale.add_argument("-o", "--out", type=Path, required=True, help="folder, or a file for a single picture")
    model = upscale.add_argument_group("model")
    model.add_argument(
        "--model",
        help="folder of a run, a checkpoint or an export; or owner/name on the hub (the small one that comes along)",
    )
    model.add_argument("--weights", choices=("ema", "weights"), default="ema", help="averaged or last weights (ema)")
    quality = upscale.add_argument_group("quality")
    quality.add_argument("--steps", default="1", metavar="N|auto", help="1 is fastest, more draw more detail (1)")
    quality.add_argument(
        "--fidelity",
        type=float,
        metavar="F",
        help="0 to 1: blend the result of several steps with the one-step result (0)",
    )
    quality.add_argument("--scale", type=float, metavar="X", help="of the sides (4)")
    quality.add_argument("--size", metavar="WxH", help="in pixels, in place of --scale")
    quality.add_argument(
        "--color",
        choices=("none", "wavelet", "adain", "lab"),
        default="none",
        help="take colours back to the source's (none)",
    )
    quality.add_argument("--seed", type=int, default=0, help="of the noise that details are drawn from (0)")
    machine = upscale.add_argument_group("machine")
    machine.add_argument("--tile", default="auto", metavar="auto|PX", help="side of the tiles of large pictures (auto)")
    machine.add_argument("--dtype", help="fp32, bf16, fp16; fp8 or nf4 of large models (as trained)")
    machine.add_argument("--offload", action="store_true", help="GPU too small: weights wait in host memory")
    machine.add_argument("--device", help="cuda, cuda:1 or cpu (the GPU if there is one)")
    files = upscale.add_argument_group("files")
    files.add_argument("--skip-existing", action="store_true", help="leave out what has been restored before")
    files.add_argument("--suffix", default="", help="added to names, such as _x4")
    files.add_argument("--format", choices=("png", "jpg", "webp", "tif"), help="default: as the picture came")
    upscale.set_defaults(act=_upscale)


def _upscale(options: argparse.Namespace) -> int:
    from teasr.restore import batch
    from teasr.restore.upscaler import Upscaler

    if options.tile != "auto" and not options.tile.isdigit():
        raise ValueError(f"--tile {options.tile}: auto, or a number of pixels such as 512")
    if options.steps != "auto" and not (options.steps.isdigit() and int(options.steps) >= 1):
        raise ValueError(f"--steps {options.steps}: auto, or a number >= 1")
    steps = "auto" if options.steps == "auto" else int(options.steps)
    how = {"scale": options.scale, "size": _size(options.size), "color_fix": options.color}
    how |= {"fidelity": options.fidelity, "tile_px": None if options.tile == "auto" else int(options.tile)}
    todo = batch.jobs(options.inputs, options.out, options.suffix, options.format)
    if options.skip_existing and all(job.target.is_file() for job in todo):
        print(f"all {len(todo)} are there already")
        return 0
    upscaler = Upscaler.from_pretrained(options.model, options.weights, options.device, options.dtype, options.offload)
    dials = {} if options.fidelity is None else {"fidelity": options.fidelity}
    upscaler.sampler.check(2 if steps == "auto" else steps, dials)

    def restore(picture, tell, say):
        return upscaler(picture, steps, options.seed, on_progress=tell, say=say, **how)

    failed = batch.run(todo, restore, options.skip_existing)
    if failed:
        print(f"{failed} of {len(todo)} failed", file=sys.stderr)
    return 1 if failed else 0


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"--size {text}: width x height in pixels, such as 3840x2160")
    return int(width), int(height)


def _add_demo(commands) -> None:
    demo = commands.add_parser("demo", help="a local web page to try a model on")
    demo.add_argument("--model", help="as of `teasr upscale`")
    demo.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in (127.0.0.1)")
    demo.add_argument("--port", type=int, default=7860, help="(7860)")
    demo.add_argument("--device", help="cuda, cuda:1 or cpu (the GPU if there is one)")
    demo.add_argument("--dtype", help="as of `teasr upscale`")
    demo.add_argument("--offload", action="store_true", help="GPU too small: weights wait in host memory")
    demo.set_defaults(act=_demo)


def _demo(options: argparse.Namespace) -> int:
    try:
        from teasr.restore import web_page as page
    except ModuleNotFoundError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'teasr[demo]'") from None
    from teasr.restore.upscaler import Upscaler

    upscaler = Upscaler.from_pretrained(
        options.model, device=options.device, dtype=options.dtype, offload=options.offload
    )
    page.serve(upscaler, options.host, options.port)
    return 0


def _add_sync(commands) -> None:
    sync = commands.add_parser("sync-mlflow", help="send to MLflow what it lacks of a run folder")
    sync.add_argument("run", type=Path, help="run folder")
    sync.add_argument("--uri", help="another store than that of the run's config")
    sync.set_defaults(act=_sync)


def _sync(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from teasr.config import strict_yaml as config
    from teasr.config.settings import TrackingConfig
    from teasr.tracking.mlflow_run import sync
    from teasr.tracking.run_files import METRICS

    if not (options.run / METRICS).is_file():
        raise ValueError(f"{options.run} is no run folder: it holds no {METRICS}")
    settings = config.read_yaml(options.run / "config.yaml").get("tracking") or {}
    tracking = config.build(TrackingConfig, settings, "tracking")
    if options.uri:
        tracking = replace(tracking, uri=options.uri)
    place, sent = sync(options.run, tracking)
    print(f"{sent} updates sent to {place}" if sent else f"nothing was missing at {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
