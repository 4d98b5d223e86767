"""Which codec belongs to a VAE of diffusers, by the class that its config names."""

from __future__ import annotations

import torch

from teasr.backbones.generic.codec import Codec, KLCodec
from teasr.backbones.prompts import cannot_load, model_name, vae_folder
from teasr.backbones.qwen_image.vae import QwenCodec

CODECS = {codec.vae_class.__name__: codec for codec in (KLCodec, QwenCodec)}


def load_codec(model: str, dtype: torch.dtype, key: str = "backbone.model") -> Codec:
    """Load from a hub name, or from the local folder of a VAE or of a model with a VAE in vae/.

    `key`: the config key that names it. Raises ValueError if it is missing, incomplete, or a VAE of no backbone.
    """
    try:
        config = KLCodec.vae_class.load_config(model_name(model, key), subfolder=vae_folder(model, key))
    except (OSError, ValueError) as error:
        raise cannot_load(key, model, error) from error
    kind = config.get("_class_name")
    if kind not in CODECS:
        raise ValueError(f"{key} = {model} is a {kind}: no backbone uses it; allowed are {', '.join(CODECS)}")
    return CODECS[kind].from_pretrained(model, dtype, key)
