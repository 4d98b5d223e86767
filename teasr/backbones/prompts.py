"""Reading prompt files and the parts of a diffusers model, with errors that say what to do.

A prompt file holds the text embedding of one prompt with its provenance, in the format of util/tensor_file.py;
text_encoders.py computes it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from teasr.util.tensor_file import unpack

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_prompt(path: Path | str) -> tuple[Tensor, Tensor | None, dict]:
    """Read a prompt file: embedding [L, D], mask [L] (1 for tokens; None if all are tokens) and provenance.

    Raises ValueError if the file is missing or damaged.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"prompt {path} cannot be read ({error.strerror}): create it with `teasr cache-prompt`"
        ) from None
    try:
        tensors, metadata = unpack(data, f"prompt {path}")
    except ValueError as error:
        raise ValueError(f"{error}: create it again with `teasr cache-prompt`") from None
    if "prompt_embeds" not in tensors:
        raise ValueError(f"prompt {path} contains no prompt_embeds: create it with `teasr cache-prompt`")
    return tensors["prompt_embeds"], tensors.get("prompt_mask"), metadata


def model_name(model: str, key: str) -> str:
    """Return a local folder (with ~ expanded) or a hub name. Raises ValueError if `model` is neither."""
    folder = Path(model).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise ValueError(
            f"{key} = {model} is neither a folder nor the owner/name of a model on the Hugging Face hub: give the "
            "folder of a diffusers model"
        )
    return str(folder) if folder.is_dir() else model


def load_part(cls: type, key: str, model: str, subfolder: str | None, dtype: torch.dtype, what: str):
    """Load one part of a diffusers model with `cls.from_pretrained`.

    Raises ValueError, naming `key` and `what`, if it cannot be loaded or is incomplete.
    """
    try:
        part, info = cls.from_pretrained(
            model_name(model, key), subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise cannot_load(key, model, error) from error
    if info["missing_keys"]:  # diffusers and transformers would initialise them randomly
        raise cannot_load(
            key, model, f"its {what} lack{'' if what == 'weights' else 's'} the tensor {min(info['missing_keys'])}"
        )
    return part


def vae_folder(model: str, key: str) -> str | None:
    """Return the subfolder of the VAE: "vae", or None if `model` is the folder of a VAE itself."""
    folder = Path(model_name(model, key))
    return "vae" if (folder / "vae").is_dir() or not folder.is_dir() else None


def cannot_load(key: str, model: str, error: object) -> ValueError:
    """Return a one-line error, with the remedy, for a model that is missing, incomplete or unreachable."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{key} = {model} cannot be loaded ({reason}): give the local folder of a complete diffusers model "
        f"({key}=/path/to/model), or connect to the Hugging Face hub"
    )
