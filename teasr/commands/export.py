"""`teasr export`: a trained run as one LoRA file in diffusers' layout, or in full; as ONNX; to the Hugging Face hub.

It is exported in full where more than a LoRA was trained.

The LoRA file comes with a model card; a full export holds everything that restoring needs. fp32 keeps every bit of the
trained weights; bf16 halves the file size. `teasr upscale --model exported/teasr` restores with the export (the base
model is loaded from where the config names it), and `backbone.lora=exported/teasr` starts another run from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from teasr import assets
from teasr.util import checkpoint_folder, command_line
from teasr.util.files import read_json

SUMMARY = "export a trained model: its weights or its LoRA, to the Hugging Face hub, or one step of it as ONNX"
EXAMPLES = """examples:
  {prog} runs/qwen_teasr --out exported/teasr
  {prog} runs/qwen_teasr/checkpoints/step-00047500 --out exported/teasr --weights weights --dtype bf16
  {prog} runs/demo --out exported/demo --register teasr-demo    also a version in MLflow's model registry
  {prog} runs/mine --push-to-hub me/restorer                    for others: --model me/restorer
  {prog} small --onnx small.onnx --dtype fp16                   one step, for programs without PyTorch
  {prog} small --onnx small_4.onnx --steps 4
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("model", type=Path, help="run folder, checkpoint folder, or the name of a shipped model")
    parser.add_argument("--out", type=Path, help="output folder for the weights and the model card")
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="write a small model as an ONNX file (docs/onnx.md)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="with --onnx: number of steps that the file takes (default: 1)"
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload the weights and the model card to the Hugging Face hub"
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: create the model as a private one")
    parser.add_argument(
        "--weights",
        choices=("ema", "weights"),
        default="ema",
        help="ema: moving average of the weights; weights: those of the last update (default: ema)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="dtype of the exported weights (default: fp32)",
    )
    parser.add_argument(
        "--register", metavar="NAME", help="also register the export as a version of this model in MLflow's registry"
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr export") -> int:
    """Export; returns the exit code: 0 on success, 2 for an error that the message explains."""
    return command_line.run("exporting", lambda: _export_all(parser(prog).parse_args(arguments)))


def _export_all(options: argparse.Namespace) -> None:
    """Write everything that the options ask for. Raises ValueError if they ask for nothing, or contradict."""
    if not (options.out or options.onnx or options.push_to_hub):
        raise ValueError("nothing to write: give --out FOLDER, --onnx FILE or --push-to-hub OWNER/NAME")
    if options.register and not options.out:
        raise ValueError("--register needs the folder that is registered: add --out FOLDER")
    if options.private and not options.push_to_hub:
        raise ValueError("--private is for a model on the hub: add --push-to-hub OWNER/NAME, or omit it")
    if options.steps is not None and not options.onnx:
        raise ValueError("--steps is for an ONNX file, other exports take any number: add --onnx FILE, or omit it")
    folder = checkpoint_folder.resolve(assets.find(options.model) or options.model)
    if options.onnx:
        _to_onnx(options, folder)
    with tempfile.TemporaryDirectory(prefix="teasr-") as scratch:
        if options.push_to_hub and not options.out:
            options.out = Path(scratch, options.push_to_hub.rpartition("/")[2] or "model")
        if options.out:
            path = export(options, folder)
            print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
        if options.register:
            print(register(options, folder))
        if options.push_to_hub:
            print(f"uploaded to {_to_hub(options)}: load it with --model {options.push_to_hub}")


def _to_onnx(options: argparse.Namespace, folder: Path) -> None:
    from teasr.restore import onnx_export
    from teasr.restore.upscaler import Upscaler

    upscaler = Upscaler.from_pretrained(folder, options.weights, device="cpu")
    onnx_export.export(upscaler, options.onnx, options.dtype, 1 if options.steps is None else options.steps)
    print(f"{options.onnx}: {options.onnx.stat().st_size / 1e6:,.1f} MB")


def _to_hub(options: argparse.Namespace) -> str:
    from teasr.restore import hub

    card = options.out / checkpoint_folder.CARD
    text, name = card.read_text(), options.out.name
    for before in (f"--model {name}\n", f'from_pretrained("{name}")'):
        text = text.replace(before, before.replace(name, options.push_to_hub))
    card.write_text(text)
    return hub.upload(options.out, options.push_to_hub, options.private)


def register(options: argparse.Namespace, folder: Path) -> str:
    """Register the exported folder as a version of a registered model, linked to the run.

    Raises ValueError when the store does not accept it.
    """
    from teasr import run_config
    from teasr.tracking.mlflow_model import register_model

    settings = run_config.load(folder / "config.yaml")
    state = json.loads((folder / "state.json").read_text())
    tags = {"backbone": settings.backbone_name, "updates": str(state["update"]), "commit": state["commit"]}
    return register_model(
        checkpoint_folder.run_folder(folder), settings.tracking, settings.to_dict(), options.out, options.register, tags
    )


def export(options: argparse.Namespace, folder: Path) -> Path:
    """Export a checkpoint to files below --out and return the path of the weight file.

    Raises ValueError when the weights are missing or damaged.
    """
    from safetensors.torch import load_file

    from teasr import run_config
    from teasr.backbones import lora_file
    from teasr.restore import pretrained

    file = folder / f"{options.weights}.safetensors"
    if not file.is_file():
        other = "ema" if options.weights == "weights" else "weights"
        raise ValueError(f"{folder} contains no {file.name}: use --weights {other}")
    settings = run_config.load(folder / "config.yaml")
    method = settings.build_method()
    lora = settings.with_random_weights().build_backbone(method.roles()[:1]).lora_metadata()
    if lora is None:
        model, *_ = pretrained.load(folder, options.weights, "cpu")
        state = read_json(folder / "state.json")  # a shipped model or an export has none
        origin = {name: state[key] for key, name in (("update", "updates"), ("commit", "commit")) if key in state}
        names = list(model.backbone.exported())
        pretrained.save(model.backbone, names, settings, options.out, options.dtype, origin)
        return options.out / "ema.safetensors"
    state = json.loads((folder / "state.json").read_text())
    peft, metadata = lora
    metadata |= {"base_model": settings.backbone.model, "prompt": settings.backbone.prompt}
    metadata["backbone"] = settings.backbone_name
    metadata["steps"] = "1" if method.sampler().step_counts == (1,) else "any"
    metadata |= {
        "weights": options.weights,
        "updates": state["update"],
        "commit": state["commit"],
        "recipe": settings.to_yaml(),
    }
    weights = {name: x.to(pretrained.STORED[options.dtype]) for name, x in load_file(file).items()}
    path = lora_file.write(options.out, weights, peft, metadata)
    backbone_class = run_config.BACKBONES[settings.backbone_name]()[1]
    for name, used in backbone_class.files(settings.backbone).items():
        if used.is_file():
            shutil.copyfile(used, options.out / name)
        else:
            print(
                f"warning: {used} was not found and is missing in the export: copy it to {options.out / name}, "
                "otherwise the model cannot be used on other machines"
            )
    return path
