"""Tensors with metadata and a checksum in one safetensors file, for prompt embeddings and cached latents."""

from __future__ import annotations

import json
import zlib

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

KEY = "teasr"  # the only metadata key, because safetensors does not write several keys in a fixed order


def pack(tensors: dict[str, Tensor], metadata: dict) -> bytes:
    """Serialise tensors and JSON metadata to safetensors, with a checksum of both.

    The result is deterministic: it depends only on the arguments.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in sorted(tensors.items())}
    text = json.dumps(metadata | {"crc32": _crc32(tensors, metadata)}, sort_keys=True)
    return safetensors.save(tensors, {KEY: text})


def unpack(data: bytes, name: str) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the metadata given to `pack`.

    Raises ValueError, starting with `name`, if the data is damaged or was modified.
    """
    try:
        tensors = safetensors.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"][KEY])
        wanted = metadata.pop("crc32")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is damaged ({error!r})") from None
    if _crc32(tensors, metadata) != wanted:
        raise ValueError(f"{name} is damaged (its checksum differs)")
    return dict(sorted(tensors.items())), metadata


def _crc32(tensors: dict[str, Tensor], metadata: dict) -> int:
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {x.dtype} {list(x.shape)}".encode(), crc)
        crc = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc
