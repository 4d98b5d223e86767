"""The command `teasr`: one verb for each thing that can be done; the files of `teasr.commands` hold them."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

VERBS = {  # verb -> file of teasr.commands, and what it does
    "upscale": ("upscale", "restore images with a trained model"),
    "demo": ("demo", "serve a local web page to try out a model"),
    "prepare": ("prepare", "make training shards from photographs"),
    "verify": ("verify", "check a shard set"),
    "cache-prompt": ("cache_prompt", "compute the text embedding of a prompt once"),
    "cache-captions": ("cache_captions", "compute the text embeddings of a set's captions once"),
    "cache-latents": ("cache_latents", "encode a shard set with a VAE once"),
    "train": ("train", "train a model, or continue its training"),
    "export": ("export", "export a trained model"),
    "benchmark": ("benchmark", "score a model on held-out pairs"),
    "report": ("report", "write a report on several evaluations"),
    "weights": ("weights", "fetch the weight files of the metrics"),
    "sync-mlflow": ("sync_mlflow", "upload a run to MLflow"),
    "presets": ("presets", "list the configs and models that come with teasr"),
    "completion": ("completion", "print the completion script of a shell"),
}
EXAMPLES = """\
examples:
  teasr upscale photo.jpg -o photo_x4.png
  teasr prepare photos=~/pictures out=data/train crop_px=64
  teasr train --config tiny_teasr data.shards=data/train run_dir=runs/mine
  teasr benchmark runs/mine --data data/heldout
  teasr VERB --help             all options of a verb, with examples

Exit code 0: success; 1: some files failed or have problems; 2: an error that the message explains; 130: interrupted."""


def main(arguments: list[str] | None = None) -> int:
    """Run the verb that the arguments name and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in VERBS:
        return _without_verb(arguments)
    verb, *rest = arguments
    module = command(verb)
    if verb == "train" and arguments == sys.argv[1:]:  # as a program of its own: see `leave`
        module.program(rest, prog="teasr train")
    return module.main(rest, prog=f"teasr {verb}")


def command(verb: str) -> ModuleType:
    """Import the file of a verb of VERBS."""
    return importlib.import_module(f"teasr.commands.{VERBS[verb][0]}")


def _without_verb(arguments: list[str]) -> int:
    import teasr

    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, (_, what) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="teasr",
        usage="teasr VERB ..",
        description=f"{teasr.__doc__.splitlines()[0]}\n\nverbs:\n{verbs}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"teasr {teasr.__version__}")
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    parser.parse_args(arguments)
    parser.error(f"the verb comes first: teasr {next(a for a in arguments if a in VERBS)} ..")


if __name__ == "__main__":
    sys.exit(main())
