"""Load a trained model for restoration, and save one.

A model is a run folder, a checkpoint, a saved folder, an exported LoRA, a hub repository, or shipped with teasr.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file

from teasr import assets
from teasr.backbones import lora_file
from teasr.backbones.base import Backbone
from teasr.backbones.model import Model
from teasr.methods.sampler import Sampler
from teasr.restore import hub
from teasr.restore.card import card
from teasr.run_config import BACKBONES, RunConfig, parse_text
from teasr.run_config import load as load_config
from teasr.util import checkpoint_folder

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # for backbones that do not set their own dtype
STORED = {"fp32": torch.float32} | AUTOCAST  # dtypes in which the weights of a model can be saved


def load(
    model: str | Path,
    weights: str = "ema",
    device: str | torch.device | None = None,
    dtype: str | None = None,
    offload: bool = False,
) -> tuple[Model, Sampler, RunConfig, torch.device]:
    """Load a model; return the student on its device, the sampler of its method, the config of its run, and the device.

    model: folder of a run (its newest checkpoint is loaded), of a checkpoint, or written by `save` or `teasr export`;
    `owner/name` on the hub; or the name of a model shipped with teasr (`teasr.assets`).
    weights: `ema` (averaged) or `weights` of a checkpoint. dtype: one of the backbone's `dtypes`.
    offload: keep the blocks' frozen weights in host memory and copy them to the GPU one block after another.

    Raises ValueError naming what is missing, damaged or not possible on this machine.
    """
    place = pick_device(device, offload)
    folder = _find(model)
    exported = (folder / lora_file.NAME).is_file()
    if exported:
        config = _config_of_lora(folder)
    else:
        folder = checkpoint_folder.resolve(folder)
        config = load_config(folder / "config.yaml")
    kind, method = BACKBONES[config.backbone_name]()[1], config.build_method()
    if dtype is not None and dtype not in kind.dtypes:
        raise ValueError(f"dtype {dtype}: backbone {config.backbone_name} supports {', '.join(kind.dtypes)}")
    if place.type not in kind.devices:
        raise ValueError(
            f"device {place}: backbone {config.backbone_name} computes on {' or '.join(kind.devices)} only"
        )
    state = {} if exported else _weights(folder, weights)
    student = method.roles()[0]
    backbone = kind(kind.inference_config(config.backbone, dtype, folder), seed=config.seed, roles=(student,))
    if not exported:
        backbone.load_fixed_state(load_file(folder / "fixed.safetensors"))
        backbone.load_weights(state)
    backbone.autocast = None if backbone.own_dtype else AUTOCAST.get(dtype)
    backbone.offload(place) if offload else backbone.to(place)
    backbone.drop_training_precision()
    return Model(backbone, student), method.sampler(), config, place


def save(
    backbone: Backbone,
    names: list[str],
    config: RunConfig,
    folder: Path,
    dtype: str = "fp32",
    origin: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Write a folder that `load` can read, atomically.

    It holds the parameters `names`, the codec, the config, the files that the config refers to, and a model card.
    dtype: fp32, or the dtype to which the parameters are rounded; the codec is not rounded. origin: what the card tells
    besides, such as the number of updates. Raises ValueError if the folder already holds other files, or if a file that
    the config refers to is missing.
    """
    if folder.exists() and not (folder / checkpoint_folder.MANIFEST).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files: choose a new folder")
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parameters = dict(backbone.net.named_parameters())
    tensors = {
        "ema": {name: parameters[name].detach().to(STORED[dtype]) for name in names},
        "fixed": backbone.fixed_state(),
    }
    for name, state in tensors.items():
        save_file({n: x.cpu().contiguous() for n, x in state.items()}, temporary / f"{name}.safetensors")
    copy_files(type(backbone), config.backbone, temporary)
    (temporary / "config.yaml").write_text(config.to_yaml())
    count = sum(x.numel() for x in tensors["ema"].values())
    (temporary / "README.md").write_text(card(folder.name, config, count, origin))
    checkpoint_folder.commit(temporary, folder)


def copy_files(kind: type[Backbone], config: object, folder: Path) -> None:
    """Copy the files that a backbone needs besides its weights to `folder`. Raises ValueError if one is missing."""
    for name, path in kind.files(config).items():
        if not path.is_file():
            raise ValueError(
                f"{path}, which the model needs, does not exist: put it back, or run on a machine that has it"
            )
        shutil.copyfile(path, folder / name)


def move(backbone: Backbone, device: str | torch.device | None, dtype: str | None) -> torch.device | None:
    """Move a loaded backbone, or change the precision in which it computes; return the new device, if one is given.

    Raises ValueError for a device or a dtype that is not possible.
    """
    name = type(backbone).__name__
    if dtype is not None and dtype not in backbone.dtypes:
        raise ValueError(f"dtype {dtype}: {name} supports {', '.join(backbone.dtypes)}")
    if dtype is not None and backbone.own_dtype:
        raise ValueError(f"the weights of {name} are loaded in one precision: load the model again with dtype={dtype}")
    place = None if device is None else pick_device(device)
    if place is not None and place.type not in backbone.devices:
        raise ValueError(f"device {place}: {name} computes on {' or '.join(backbone.devices)} only")
    if dtype is not None:
        backbone.autocast = AUTOCAST.get(dtype)
    if place is not None:
        backbone.to(place)
    return place


def check_variant(model: str | Path, weights: str, variant: str) -> None:
    """Raise ValueError unless the weights of a model are stored in the dtype `variant`: fp32, bf16 or fp16."""
    if variant not in STORED:
        raise ValueError(f"variant = {variant}: use one of {', '.join(STORED)}")
    folder = _find(model)
    if (folder / lora_file.NAME).is_file():
        tensors = lora_file.read(folder)[0]
    else:
        tensors = _weights(checkpoint_folder.resolve(folder), weights)
    found = {x.dtype for x in tensors.values()}
    if found != {STORED[variant]}:
        names = ", ".join(sorted(name for name, dtype in STORED.items() if dtype in found))
        raise ValueError(
            f"the weights of {model} are stored in {names}, not {variant}: leave variant out, or save them with "
            f"save_pretrained(folder, variant={variant!r})"
        )


def pick_device(name: str | torch.device | None, offload: bool = False) -> torch.device:
    """Return a device that this machine has: cpu, cuda, cuda:1 or mps; None is the NVIDIA GPU if there is one.

    Raises ValueError when there is no such device, or none for offloading.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device {name}: use cpu, cuda, cuda:1 or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name}: use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: no GPU is visible; omit the device to restore on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            "device mps: no Apple GPU is available (it needs a Mac with Apple silicon and PyTorch's build for macOS); "
            "omit the device to restore on the CPU"
        )
    if offload and device.type != "cuda":
        raise ValueError("offload is for a GPU with too little memory, but no GPU is visible: omit it")
    return device


def _find(model: str | Path) -> Path:
    path = assets.find(model) or Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    if name.count("/") != 1 or not all(name.split("/")) or name.startswith((".", "~")):
        raise ValueError(
            f"model {model}: no such folder exists; the models shipped with teasr are {', '.join(assets.names())}"
        )
    return hub.download(name)


def _config_of_lora(folder: Path) -> RunConfig:
    _, metadata = lora_file.read(folder)
    return parse_text(metadata["recipe"], f"the config in {folder / lora_file.NAME}")


def _weights(folder: Path, which: str) -> dict[str, torch.Tensor]:
    """Read the requested weights; parameters that the average does not cover are taken from `weights`."""
    file = folder / f"{which}.safetensors"
    if not file.is_file():
        tensors = (f.stem for f in sorted(folder.glob("*.safetensors")))
        available = ", ".join(name for name in tensors if name in ("ema", "weights"))
        raise ValueError(f"{folder} holds no {file.name}; weights must be one of: {available}")
    unaveraged = folder / "weights.safetensors"
    return (load_file(unaveraged) if unaveraged.is_file() else {}) | load_file(file)
