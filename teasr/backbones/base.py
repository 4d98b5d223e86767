"""What a backbone is to the rest of teasr: pictures to latents and back, and one network that serves every role on its base.

A backbone owns its habits (time scale, token layout, text, codec, weight files). Methods and samplers see it through `Model` (model.py), the
trainer through this contract. t_cur in [0, 1] and t_tar in [-1, 1] are float32 [B] (0 clean, 1 noise; a negative target time asks for the fake
trajectory); z [B, C, h, w] is normalised; x [B, 3, H, W] is in [-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from teasr.backbones.parts import RoleNet
from teasr.backbones.roles import FIRST, STUDENT, Role
from teasr.diffusion.losses import only_input_gradient

Part = Literal["velocity", "features", "logits", "encoder"]


class Backbone(ABC):
    """One base: a diffusion network with the adapter sets of its roles, and its image codec."""

    net: RoleNet  # the trainer puts a DeepSpeed engine in its place where a role trains
    roles: tuple[Role, ...]  # that live on this base
    trains_base = False  # its configuration says `train: full`: the base itself is trained, by the one role it then has
    exports_base = False  # its weight file holds frozen weights too, as it is small
    autocast: torch.dtype | None = None  # of the network where no engine, which has its own, is around it
    takes_text = False
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
    def __init__(self, config: Any, seed: int = 0, roles: Sequence[Role] = (STUDENT,)):
        """Build the base with its initial weights and the adapter sets of these roles."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> normalised latents [B, C, H / downsample, W / downsample]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents -> pictures, differentiable and not clamped (a clamp has no gradient where it acts)."""

    @property
    def network(self) -> RoleNet:
        """The network itself, without the engine that may be around it."""
        return getattr(self.net, "module", self.net)

    def call(self, role: Role, part: Part, z_t: Tensor, t_cur: Tensor, *rest: Tensor | None) -> Tensor:
        """What `RoleNet.forward` computes for this role, fp32 at least; `rest`: z_lq, t_tar, text. ValueError where there is no text.

        Where the caller wants the gradient of its input alone, the network is called without its DeepSpeed engine, whose hooks expect a
        backward pass into parameters.
        """
        if not self.takes_text and len(rest) == 3 and rest[2] is not None:
            raise ValueError(f"{type(self).__name__} takes no text: leave `text` out of the condition")
        net = self.network if only_input_gradient() else self.net
        casts = self.autocast is not None and net is self.network
        with torch.autocast(z_t.device.type, self.autocast) if casts else nullcontext():
            out = net(z_t, t_cur, *rest, role=role, part=part)
        return out if out.dtype == z_t.dtype else out.float()

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

    def check_sharing(self) -> None:
        """ValueError where a base that is trained itself carries other roles: they would change with it."""
        if self.trains_base and len(self.roles) > 1:
            raise ValueError(
                f"backbone.train = full trains the base that the roles {', '.join(role.name for role in self.roles)} share: set "
                "backbone.train=lora with a backbone.base, or give each role a copy of its own"
            )

    def owner(self, name: str, parameter: nn.Parameter) -> str | None:
        """The role that trains a parameter of the network; None where nothing does."""
        if not parameter.requires_grad:
            return None
        for role in self.roles:
            if f".{role.adapter_set}." in name or name.startswith(f"parts.{role.name}."):
                return role.name
        return next(role.name for role in self.roles if role.trains == "adapter")

    def trained(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters that a role trains, by name, in order."""
        return {n: p for n, p in self.network.named_parameters() if self.owner(n, p) == role}

    def exported(self, role: str = FIRST) -> dict[str, nn.Parameter]:
        """What the weight file of a role holds, by name, in order: what the role trains, and a small base beside the student."""
        with_base = self.exports_base and role == FIRST
        found = [(n, p, self.owner(n, p)) for n, p in self.network.named_parameters()]
        return {n: p for n, p, owner in found if owner == role or (with_base and owner is None)}

    def lora_metadata(self) -> tuple[dict, dict] | None:
        """For a LoRA file: peft's settings, and what its users must know. None where more than a LoRA is trained."""
        return None

    def load_weights(self, state: dict[str, Tensor], role: str = FIRST) -> None:
        """Take the weight file of a role into a freshly built network. ValueError names what does not fit."""
        wanted = self.exported(role)
        wrong = sorted(set(wanted) ^ set(state)) or sorted(n for n in wanted if wanted[n].shape != state[n].shape)
        if wrong:
            raise ValueError(
                f"the weights do not fit this backbone: {wrong[0]} is missing, unknown or of another shape"
            )
        for name, parameter in wanted.items():
            parameter.data.copy_(state[name])

    def share_codec(self, other: Backbone) -> None:
        """Take over a codec that only `other` has yet. ValueError where the latents of the two do not mean the same."""
        if type(self) is not type(other) or self.latent_channels != other.latent_channels:
            raise ValueError(
                f"prior: {type(self).__name__} with {self.latent_channels} latent channels does not share the codec of "
                f"{type(other).__name__} with {other.latent_channels}: both must encode pictures alike"
            )

    @classmethod
    def with_random_weights(cls, config: Any) -> Any:
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
    def inference_config(cls, config: Any, dtype: str | None, folder: Path) -> Any:
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
