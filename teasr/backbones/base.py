"""What a backbone is to the rest of TEASR: pictures to latents and back, and one velocity with two times.

A backbone owns its habits (time scale, packing, text, channel layout, codec); methods, sampler and trainer see nothing
else than this contract. t_cur in [0, 1] and t_tar in [-1, 1] are float32 [B] (0 clean, 1 noise; a negative target time
asks for the fake trajectory); z [B, C, h, w] is normalised; x [B, 3, H, W] is in [-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Backbone(ABC):
    """One dual-branch diffusion transformer with its image codec."""

    net: nn.Module  # what is trained: the trainer puts a DeepSpeed engine in its place
    latent_channels: int
    downsample: int  # pixels of the picture for one latent pixel
    pixel_multiple: int  # height and width of a picture must be divisible by it
    needs_fit = False  # `fit` has to be called before anything else
    restores = True  # false: an unconditional prior, which only training starts from
    own_dtype = False  # computes in a dtype of its own config: autocast stays out
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")  # that a trained one can restore in
    tile_px = 1024  # side of the tiles in which large pictures are restored
    patch_px: int  # pixels of the picture for one token: the period of a possible checkerboard

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> normalised latents [B, C, H / downsample, W / downsample]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents -> pictures, differentiable and not clamped (a clamp has no gradient where it acts)."""

    def velocity(self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor, t_tar: Tensor) -> Tensor:
        """Velocity at z_t, fp32 at least: noise branch at t_cur, condition branch (z_lq) at t_tar of either sign.

        t_tar = t_cur is the instantaneous velocity, 0 <= t_tar < t_cur the average one of the jump t_cur -> t_tar, and
        t_tar = -t_cur the one of the fake trajectory (TEASR sec. 3.2, 3.4).
        """
        v = self.net(z_t, t_cur, z_lq, t_tar)
        return v if v.dtype == z_t.dtype else v.float()

    def snap(self, t: Tensor) -> Tensor:
        """Round times to what this network can tell apart (identity unless it embeds them in low precision)."""
        return t

    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:  # noqa: B027 - most codecs are pretrained
        """Fit what is fitted to data and not trained; pairs of (x_hq, x_lq) [3, H, W] in [-1, 1]."""

    def fixed_state(self) -> dict[str, Tensor]:
        """Tensors beside the network that a checkpoint must hold (a fitted codec)."""
        return {}

    def load_fixed_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `fixed_state` gave."""
        if state:
            raise ValueError(f"this backbone keeps no fixed state, the checkpoint holds {sorted(state)[:3]}")

    def exports(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a checkpoint's plain weight file holds this parameter: by default what is trained."""
        return parameter.requires_grad

    def exported_names(self) -> list[str]:
        """Of all parameters that `exports` names, in order."""
        return [name for name, parameter in self.net.named_parameters() if self.exports(name, parameter)]

    def lora_story(self) -> tuple[dict, dict] | None:
        """For a LoRA file: peft's settings, and what its users must know. None where more than a LoRA is trained."""
        return None

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Take exported weights into a freshly built network. ValueError names what does not fit."""
        own = dict(self.net.named_parameters())
        wanted = set(self.exported_names())
        wrong = sorted(wanted ^ set(state)) or sorted(n for n in wanted if own[n].shape != state[n].shape)
        if wrong:
            raise ValueError(
                f"the weights do not fit this backbone: {wrong[0]} is missing, unknown or of another shape"
            )
        for name in wanted:
            own[name].data.copy_(state[name])

    @classmethod
    def weightless(cls, config: Any) -> Any:
        """The config of a network of the same sizes with random weights, for which no file is needed."""
        return config

    def memory_groups(self) -> dict[str, Iterable[Tensor]]:
        """Frozen tensors by what they are for, as the memory table of a dry run names them; host memory after a `host:`."""
        frozen = [p for p in self.net.parameters() if not p.requires_grad]
        return {"network, frozen": [*frozen, *self.net.buffers()]}

    def to(self, device: torch.device, each: Callable[[nn.Module], Any] = lambda part: None) -> None:
        """Move network and codec. `each` gets every part of the network once it is in its final form on the device.

        Large backbones come part by part, so that a trainer that shards them never holds more than one whole.
        """
        self.net.to(device)
        each(self.net)

    def offload(self, device: torch.device) -> None:
        """In place of `to`, to restore with: the network's blocks stay in host memory and visit the device one by one."""
        raise ValueError(f"{type(self).__name__} cannot be offloaded: leave it out")

    @classmethod
    def for_use(cls, config: Any, dtype: str | None, folder: Path) -> Any:
        """The config to build a saved model with: no file is needed that only training started from.

        folder: where the model lies, with what `files` named; dtype: None, or one of `dtypes` (matters where `own_dtype`).
        """
        return config

    @classmethod
    def files(cls, config: Any) -> dict[str, Path]:
        """Files that a saved model needs beside its weights: name there -> where they are now."""
        return {}

    def check_size(self, height_px: int, width_px: int) -> None:
        """Raise ValueError when a picture of this size cannot be encoded."""
        m = self.pixel_multiple
        if height_px % m or width_px % m or min(height_px, width_px) < m:
            raise ValueError(
                f"a picture of {width_px}x{height_px} px does not fit this backbone: both sides must be multiples of "
                f"{m} px; choose a crop such as {max(m, round(width_px / m) * m)}x{max(m, round(height_px / m) * m)}"
            )
