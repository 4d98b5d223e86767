"""Export a trained run: its LoRA as one file in diffusers' layout with a model card, or, where more than a LoRA was trained, all that restoring needs.

    python launch/export.py runs/qwen_teasr --out exported/teasr
    python launch/export.py runs/qwen_teasr/checkpoints/step-00047500 --out exported/teasr --weights weights --dtype bf16
    python launch/export.py runs/demo --out exported/demo --register teasr-demo       # and a version in MLflow's model registry

fp32 keeps every bit of the training; bf16 halves the file. `teasr upscale --model exported/teasr` restores with it (the base model comes from where
the recipe has it), `backbone.lora=exported/teasr` starts another run from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from teasr import run_config as recipe
from teasr.backbones import lora_file
from teasr.util import checkpoint_folder


def main(arguments: list[str] | None = None) -> int:
    """Export; returns the exit code: 0 done, 2 a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the file and its card")
    parser.add_argument("--weights", choices=("ema", "weights"), default="ema", help="averaged or last weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the file")
    parser.add_argument("--register", metavar="NAME", help="make it a version of this model in MLflow's registry")
    options = parser.parse_args(arguments)
    try:
        folder = checkpoint_folder.resolve(options.model)
        path = export(options, folder)
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
        if options.register:
            print(register(options, folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def register(options: argparse.Namespace, folder: Path) -> str:
    """A version of a registered model, made of the exported folder and tied to the run. ValueError when the store does not take it."""
    from teasr.tracking.mlflow_results import register_model

    settings = recipe.load(folder / "config.yaml")
    state = json.loads((folder / "state.json").read_text())
    tags = {"backbone": settings.backbone_name, "updates": str(state["update"]), "commit": state["commit"]}
    return register_model(
        checkpoint_folder.run_folder(folder), settings.tracking, settings.to_dict(), options.out, options.register, tags
    )


def export(options: argparse.Namespace, folder: Path) -> Path:
    """Checkpoint -> files below --out; returns the one with the weights. ValueError when they are not there or damaged."""
    from safetensors.torch import load_file

    from teasr.restore import pretrained

    file = folder / f"{options.weights}.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} holds no {file.name}: choose the other with --weights")
    settings = recipe.load(folder / "config.yaml")
    found = settings.with_random_weights().build_backbone(settings.build_method().roles()[:1]).lora_metadata()
    if found is None:
        model, *_ = pretrained.load(folder, options.weights, "cpu")
        pretrained.save(model.backbone, list(model.backbone.exported()), settings, options.out, options.dtype)
        return options.out / "ema.safetensors"
    state = json.loads((folder / "state.json").read_text())
    peft, metadata = found
    metadata |= {"base_model": settings.backbone.model, "prompt": settings.backbone.prompt}
    metadata |= {
        "weights": options.weights,
        "updates": state["update"],
        "commit": state["commit"],
        "recipe": settings.to_yaml(),
    }
    weights = {name: x.to(pretrained.STORED[options.dtype]) for name, x in load_file(file).items()}
    path = lora_file.write(options.out, weights, peft, metadata)
    kind = recipe.BACKBONES[settings.backbone_name]()[1]
    for name, used in kind.files(settings.backbone).items():
        if used.is_file():
            shutil.copyfile(used, options.out / name)
        else:
            print(
                f"warning: {used} is not here: copy it to {options.out / name}, or the model cannot be used elsewhere"
            )
    return path


if __name__ == "__main__":
    sys.exit(main())
