"""A trained LoRA as one safetensors file in diffusers' layout, with the metadata needed to use it and a model card.

Keys are `transformer.<layer>.lora_A.weight`, or `unet.<layer>...`. What a role has besides its LoRA has keys that begin
with `parts.`. The metadata contains peft's config as diffusers reads it and, under the
key `teasr`, our own: how the branches are joined, what the times mean, and which run produced the LoRA. The model card
says which tokens the LoRA applies to and what happens if other software applies it differently.

Of a U-Net there is a second file for other software: its LoRA in kohya's layout, `lora_unet_<layer>.lora_down.weight`,
`.lora_up.weight` and `.alpha`, which ComfyUI and diffusers' `load_lora_weights` read with its scale. teasr reads the
first file only.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from teasr.util.files import write_atomic

NAME = "pytorch_lora_weights.safetensors"
KOHYA = "lora_kohya.safetensors"
KOHYAS_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
PEFT = "lora_adapter_metadata"  # diffusers' key
OURS = "teasr"
FORMAT = 1


def write(folder: Path, weights: dict[str, Tensor], peft: dict, ours: dict) -> Path:
    """Write the file and its model card into `folder`, and that in kohya's layout for a U-Net; return the file's path.

    `weights`: by parameter name. `peft`: the arguments of peft's `LoraConfig`.
    """
    tensors = {_outside(name): x.detach().cpu().contiguous() for name, x in sorted(weights.items())}
    network = next(name.partition(".")[0] for name in tensors if not name.startswith("parts."))
    config = {f"{network}.{key}": sorted(v) if isinstance(v, set) else v for key, v in peft.items()}
    metadata = {
        "format": "pt",
        PEFT: json.dumps(config, sort_keys=True),
        OURS: json.dumps({"format": FORMAT} | ours, sort_keys=True),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NAME, save(tensors, metadata))
    if network == "unet":
        write_atomic(folder / KOHYA, save(_in_kohyas_layout(tensors, peft["lora_alpha"]), {"format": "pt"}))
    write_atomic(folder / "README.md", card(tensors, ours).encode())
    return folder / NAME


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read the weights, by parameter name of the network, and the `teasr` metadata.

    `path` is the file or its folder. Raises ValueError if the file cannot be read or was not written by this version of
    teasr.
    """
    path = path / NAME if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {_inside(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"LoRA {path} cannot be read ({error})") from None
    try:
        ours = json.loads(metadata[OURS])
    except (KeyError, ValueError):
        raise ValueError(
            f"LoRA {path} has no metadata of teasr, so it was not made by teasr: export one with `teasr export`"
        ) from None
    if ours.pop("format", None) != FORMAT:
        raise ValueError(f"LoRA {path} was written by another version of teasr: export it again with `teasr export`")
    return weights, ours


BRANCH_WARNINGS = {
    "dual": (
        "**This LoRA applies to condition tokens only.** Noise and text tokens use the base weights. "
        "A standard diffusers pipeline or ComfyUI\nmay load this file without an error, "
        "but applies it to all tokens and produces wrong images; "
        "fusing it into the base weights does the same. Use `teasr`."
    ),
    "single": (
        "**This LoRA expects the latent of the low-quality image instead of noise.** "
        "A standard diffusers pipeline or ComfyUI may load this file\nwithout an error, but starts from noise "
        "and produces wrong images. Use `teasr`."
    ),
}


def _outside(name: str) -> str:
    return name.replace(".default.weight", ".weight")


def _in_kohyas_layout(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the LoRA of the U-Net without `parts.`, since diffusers refuses a file with other keys."""
    named = {}
    for name, x in tensors.items():
        if name.startswith("unet."):
            layer, factor, _ = name.removeprefix("unet.").rsplit(".", 2)
            layer = "lora_unet_" + layer.replace(".", "_")
            named[f"{layer}.{KOHYAS_FACTORS[factor]}.weight"] = x
            named[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return named


def _inside(name: str) -> str:
    return name if name.startswith("parts.") else name.replace(".weight", ".default.weight")


def _rows(ours: dict) -> str:
    """Return the rows of the card on condition tokens, as far as the backbone has a choice."""
    titles = {"cond_attention": "attention of condition tokens", "rope": "positions of condition tokens"}
    return "".join(f"| {title} | {ours[key]} |\n" for key, title in titles.items() if key in ours)


def _other_software(tensors: dict[str, Tensor]) -> str:
    """Return the card's paragraph on the file in kohya's layout, if there is one."""
    if not any(name.startswith("unet.") for name in tensors):
        return ""
    text = (
        f"`{KOHYA}` is the LoRA of the U-Net alone, with its scale, for ComfyUI's LoRA loader and for diffusers:\n"
        f'`pipeline.load_lora_weights(FOLDER, weight_name="{KOHYA}")`. It changes the U-Net as `teasr` does, but what '
        "these programs\ngive to the U-Net is another matter, as said above. "
    )
    parts = sum(x.numel() for name, x in tensors.items() if name.startswith("parts."))
    if parts:
        text += (
            f"They have no place for the other {parts / 1e6:,.2f} M\nparameters (keys `parts.` in `{NAME}`), which "
            "adapt the VAE's encoder: only `teasr` uses these. "
        )
    return f"\n{text.rstrip()}\n"


def card(tensors: dict[str, Tensor], ours: dict) -> str:
    """Return the text of the model card."""
    count = sum(x.numel() for x in tensors.values())
    base, rank = ours["base_model"], ours["lora_rank"]
    tag, steps, example = (
        ("one-step", "one step", 1) if ours.get("steps") == "1" else ("any-step", "1 to 30 sampling steps", 4)
    )
    return f"""---
base_model: {base}
library_name: teasr
pipeline_tag: image-to-image
tags: [super-resolution, image-restoration, lora, {ours.get("backbone", "qwen_image").replace("_", "-")}, {tag}]
---

# TEASR LoRA for {base}

Restores images (x4 real-world super-resolution) in {steps}: rank {rank}, \
{count / 1e6:,.1f} M parameters in {next(iter(tensors.values())).dtype}.

{BRANCH_WARNINGS[ours.get("branches", "dual")]}
{_other_software(tensors)}
Restore images: `teasr upscale photos/ -o restored/ --model FOLDER --steps {example}`. \
Continue training: set `backbone.lora=FOLDER` in the config.

| | |
|---|---|
{_rows(ours)}| times | t_cur in [0, 1], where 1 is noise; t_tar in [-1, 1], negative for the fake trajectory; \
the sinusoidal embedding is computed in fp32 |
| prompt | {ours["prompt"]} |
| weights | {ours["weights"]} after {ours["updates"]} updates |
| commit | {ours["commit"]} |

Config of the training run:

```yaml
{ours["recipe"].rstrip()}
```
"""
