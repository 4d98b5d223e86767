"""`teasr demo`: serve a local web page to try out a model."""

from __future__ import annotations

import argparse

from teasr.util import command_line

SUMMARY = "serve a local web page to try out a model"
EXAMPLES = """examples:
  {prog}                                  the small model that comes with teasr, at http://127.0.0.1:7860
  {prog} --model runs/mine --port 8000    your own model
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("--model", help=command_line.MODEL_HELP)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 allows access from other machines (default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument("--device", help=command_line.DEVICE_HELP)
    parser.add_argument("--dtype", help=command_line.DTYPE_HELP)
    parser.add_argument("--offload", action="store_true", help=command_line.OFFLOAD_HELP)
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr demo") -> int:
    """Serve the page until Ctrl-C; returns the exit code: 2 for an error that the message explains."""
    options = parser(prog).parse_args(arguments)
    return command_line.run("the web page", lambda: _serve(options), stopped="finished files are kept")


def _serve(options: argparse.Namespace) -> int:
    from teasr.restore.upscaler import Upscaler
    from teasr.restore.web import page

    if not 1 <= options.port <= 65535:
        raise ValueError(f"--port {options.port}: must be from 1 to 65535")
    upscaler = Upscaler.from_pretrained(
        options.model, device=options.device, dtype=options.dtype, offload=options.offload
    )
    page.serve(upscaler, options.host, options.port)
    return 0
