"""Export the LoRA of a trained run as one file in diffusers' layout, with a model card.

    python launch/export.py runs/qwen_teasr --out exported/teasr
    python launch/export.py runs/qwen_teasr/checkpoints/step-00047500 --out exported/teasr --weights weights --dtype bf16

fp32 keeps every bit of the training; bf16 halves the file. `teasr upscale --model exported/teasr` restores with it (the base model comes from where
the recipe has it), `backbone.lora=exported/teasr` starts another run from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from teasr import checkpoint, lora_file, recipe


def main(arguments: list[str] | None = None) -> int:
    """Export; returns the exit code: 0 done, 2 a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the file and its card")
    parser.add_argument("--weights", choices=("ema", "weights"), default="ema", help="averaged or last weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the file")
    options = parser.parse_args(arguments)
    try:
        path = export(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB, card beside it")
    return 0


def export(options: argparse.Namespace) -> Path:
    """Checkpoint -> file. ValueError when there is no LoRA in it, or it is damaged."""
    from safetensors.torch import load_file

    from teasr.prompts import DTYPES

    folder = checkpoint.resolve(options.model)
    file = folder / f"{options.weights}.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} holds no {file.name}: choose the other with --weights")
    settings = recipe.load(folder / "config.yaml")
    told = settings.weightless().build_backbone().lora_story()
    if told is None:
        raise ValueError(
            f"{folder} is of backbone {settings.backbone_name}, which trains more than a LoRA: use it as it is"
        )
    state = json.loads((folder / "state.json").read_text())
    peft, story = told
    story |= {"base_model": settings.backbone.model, "prompt": settings.backbone.prompt}
    story |= {
        "weights": options.weights,
        "updates": state["update"],
        "commit": state["commit"],
        "recipe": settings.to_yaml(),
    }
    weights = {name: x.to(DTYPES[options.dtype]) for name, x in load_file(file).items()}
    path = lora_file.write(options.out, weights, peft, story)
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
