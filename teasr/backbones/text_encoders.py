"""Text encoders: they embed prompts as a model's own pipeline does, once, into files that training and inference read.

Inference uses a single prompt, and training too unless its samples have captions (data/captions.py), so the text
encoders (up to 7 B parameters) are loaded only to write these files. Which encoders a model has, and how its pipeline
uses them, follows from its `model_index.json`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from teasr.backbones.prompts import DTYPES, cannot_load, load_part, load_prompt, model_name
from teasr.util.files import unusual, write_atomic
from teasr.util.optional import needed_for
from teasr.util.tensor_file import pack


@dataclass(frozen=True)
class PromptConfig:
    """Which prompt to embed, with which model, and where to store the result."""

    model: str  # local folder of a diffusers model, or its name on the hub
    out: str  # path of the prompt file to write
    prompt: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"  # dtype of the text encoder and of the stored embedding


def cache_prompt(config: PromptConfig) -> None:
    """Compute and write the prompt file, unless it exists with the same provenance; print what was done.

    Raises ValueError with the cause if `out` is a folder or another file, or if the model or the device is unavailable.
    """
    out = Path(config.out).expanduser()
    if out.is_dir():
        raise ValueError(f"out = {config.out} is a folder: name a file, such as out={config.out}/prompt.safetensors")
    wanted = {"prompt": config.prompt, "model": config.model, "dtype": config.dtype, "libraries": libraries()}
    if out.exists():
        if unusual(out) or b"prompt_embeds" not in out.read_bytes()[:1000]:
            raise ValueError(f"out = {config.out} exists and is no prompt file: choose another out=, or delete it")
        try:
            _, _, found = load_prompt(out)
        except ValueError as error:
            print(f"{error}; doing so now")
        else:
            if found == wanted:
                print(f"{out} already contains prompt {config.prompt!r} of {config.model}: nothing to do")
                return
            changes = ", ".join(f"{k} {found.get(k)!r} -> {v!r}" for k, v in wanted.items() if found.get(k) != v)
            print(f"{out} was computed with other settings and is computed again: {changes}")
    embeds, mask = load_encoders(config.model, pick_device(config.device), DTYPES[config.dtype])(config.prompt)
    tensors = {"prompt_embeds": embeds} | ({} if mask is None else {"prompt_mask": mask})
    write_atomic(out, pack(tensors, wanted))
    print(
        f"{out}: wrote prompt {config.prompt!r} of {config.model}, {embeds.shape[0]} tokens of width {embeds.shape[1]}"
    )


Embedding = tuple[Tensor, Tensor | None]  # [L, D], and a mask [L] if not all are tokens
Embed = Callable[[str], Embedding]


def load_encoders(model: str, device: torch.device, dtype: torch.dtype) -> Embed:
    """Load a model's text encoders; return the function that embeds a prompt as its pipeline does, to the CPU.

    Only tokenizers and text encoders are loaded. Raises ValueError if one is missing or incomplete, or if the model is
    of a kind that no backbone uses.
    """
    with needed_for("embedding a prompt"):
        from diffusers import DiffusionPipeline

    name = model_name(model, "model")
    try:  # first, because it fails soonest if the hub is unreachable
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise cannot_load("model", model, error) from error
    kind = index.get("_class_name")
    if kind not in ENCODERS:
        raise ValueError(f"model = {model} is a {kind}: no backbone uses it; allowed are {', '.join(ENCODERS)}")
    encode = ENCODERS[kind](model, index, device, dtype)

    @torch.inference_mode()
    def embed(prompt: str) -> Embedding:
        embeds, mask = encode(prompt)
        return embeds.cpu().clone(), None if mask is None else mask.cpu().clone()

    return embed


def one_prompt(model: str, device: torch.device, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Load a model's text encoders; return the function that gives the embedding [L, D] of a single prompt.

    Raises ValueError as `load_encoders`, and for a pipeline that pads a single prompt.
    """
    encode = load_encoders(model, device, dtype)

    def embed(prompt: str) -> Tensor:
        embeds, mask = encode(prompt)
        if mask is not None:
            raise ValueError(f"the pipeline of {model} pads the prompt {prompt!r}, which no backbone can hide")
        return embeds

    return embed


def _qwen(model: str, index: dict, device: torch.device, dtype: torch.dtype) -> Embed:
    from diffusers import QwenImagePipeline
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    tokenizer = _tokenizer(Qwen2Tokenizer, model, "tokenizer")
    encoder = load_part(Qwen2_5_VLForConditionalGeneration, "model", model, "text_encoder", dtype, "text encoder")
    pipeline = QwenImagePipeline(None, None, encoder.to(device).eval(), tokenizer, None)
    _check_tokenizer(tokenizer, pipeline.prompt_template_encode, model)

    def encode(prompt: str) -> Embedding:
        embeds, mask = pipeline.encode_prompt(prompt, device=device)
        return embeds[0], None if mask is None else mask[0]

    return encode


def _sd3(model: str, index: dict, device: torch.device, dtype: torch.dtype) -> Embed:
    """The pooled embedding of both CLIP encoders, padded with zeros, is the first row (sd3.py)."""
    pipeline = _text_pipeline(model, index, device, dtype)

    def encode(prompt: str) -> Embedding:
        tokens, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, device, do_classifier_free_guidance=False)
        return torch.cat((F.pad(pooled, (0, tokens.shape[-1] - pooled.shape[-1])), tokens[0])), None

    return encode


def _sd(model: str, index: dict, device: torch.device, dtype: torch.dtype) -> Embed:
    """All 77 tokens are used, those of the padding too, as Stable Diffusion was trained."""
    pipeline = _text_pipeline(model, index, device, dtype)
    return lambda prompt: (pipeline.encode_prompt(prompt, device, 1, False)[0][0], None)


def _z_image(model: str, index: dict, device: torch.device, dtype: torch.dtype) -> Embed:
    pipeline = _text_pipeline(model, index, device, dtype)
    return lambda prompt: (pipeline.encode_prompt(prompt, device, do_classifier_free_guidance=False)[0][0], None)


ENCODERS = {  # pipeline named in model_index.json -> what loads its text encoders
    "QwenImagePipeline": _qwen,
    "StableDiffusion3Pipeline": _sd3,
    "StableDiffusionPipeline": _sd,
    "ZImagePipeline": _z_image,
}


def _text_pipeline(model: str, index: dict, device: torch.device, dtype: torch.dtype):
    """Return the model's pipeline with its tokenizers and text encoders, on the device, and nothing else."""
    import diffusers
    import transformers

    parts = {}
    for part, value in index.items():
        if part.startswith("tokenizer"):
            parts[part] = _tokenizer(getattr(transformers, value[1]), model, part)
            _check_tokenizer(parts[part], "a photo", model)
        elif part.startswith("text_encoder"):
            encoder = load_part(getattr(transformers, value[1]), "model", model, part, dtype, part.replace("_", " "))
            parts[part] = encoder.to(device).eval()
        elif not part.startswith("_"):
            parts[part] = None if isinstance(value, list) else value
    return getattr(diffusers, index["_class_name"])(**parts)


def _tokenizer(cls: type, model: str, subfolder: str):
    try:
        return cls.from_pretrained(model_name(model, "model"), subfolder=subfolder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise cannot_load("model", model, error) from error


def _check_tokenizer(tokenizer, text: str, model: str) -> None:
    """Raise ValueError if encoding and decoding change the text.

    transformers silently creates a tokenizer with an empty vocabulary if its files are missing.
    """
    if tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens="<" not in text).strip() != text.strip():
        reason = "its folder tokenizer is missing or broken: decoding the encoded prompt template does not give it back"
        raise cannot_load("model", model, reason)


def libraries() -> dict[str, str]:
    """Return the library versions that affect an embedding, without build tags such as +cpu or +cu128."""
    return {name: version(name).split("+")[0] for name in ("diffusers", "torch", "transformers")}


def pick_device(device: str) -> torch.device:
    """Resolve auto, cpu or cuda to a device; with several GPUs, use index LOCAL_RANK.

    Raises ValueError if that GPU is not available.
    """
    found, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cpu" or (device == "auto" and not found):
        return torch.device("cpu")
    if wanted >= found:
        raise ValueError(
            f"device = {device}, LOCAL_RANK = {wanted}, but PyTorch finds {found} GPU(s): set device=cpu, or check "
            "nvidia-smi, CUDA_VISIBLE_DEVICES and whether PyTorch was built for this driver"
        )
    return torch.device("cuda", wanted)
