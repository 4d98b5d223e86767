"""The backbone interface: an image codec, and one diffusion network shared by every role on its base.

A backbone defines its own time scale, token layout, text handling, codec and weight files. Methods and samplers use it
through `Model` (model.py), the trainer through this interface. Conventions: the times t_cur in [0, 1] and t_tar in
[-1, 1] are float32 [B] (0 is clean, 1 is noise; a negative target time requests the fake trajectory); latents z
[B, C, h, w] are normalised; images x [B, 3, H, W] are in [-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from teasr import assets
from teasr.backbones.memory.sweeps import Sweeps
from teasr.backbones.parts import RoleNet
from teasr.backbones.roles import FIRST, STUDENT, Role
from teasr.diffusion.losses import only_input_gradient
from teasr.util import checkpoint_folder

Part = Literal["velocity", "coarse", "features", "logits", "encoder"]


class Backbone(ABC):
    """One base: a diffusion network with the adapter sets of its roles, and its image codec."""

    net: RoleNet  # the trainer replaces it with a DeepSpeed engine if any role trains
    roles: tuple[Role, ...]  # the roles on this base
    trains_base = False  # config has `train: full`: the base weights are trained too, by the only role on this base
    exports_base = False  # the exported weight file also contains the frozen base weights, because the base is small
    autocast: torch.dtype | None = None  # used if no DeepSpeed engine, which has its own autocast, wraps the network
    takes_text = False  # the network accepts a text embedding
    has_coarse = False  # the network has a coarse restoration, `RoleNet.coarse`
    has_prior = False  # without the LQ image and without LoRA, the network is a trained model of images: a real score
    latent_channels: int
    downsample: int  # image pixels per latent pixel, along each side
    pixel_multiple: int  # image height and width must be divisible by it
    needs_fit = False  # `fit` must be called before anything else
    sees_pixels = False  # its network takes pictures instead of latents: a discriminator of pictures
    restores = True  # false: an unconditional prior, which serves only as a starting point for training
    own_dtype = False  # the compute dtype comes from the backbone's config, so autocast is not used
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")  # dtypes in which a trained model can restore
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")  # types of devices on which it computes
    tile_px = 1024  # side of the tiles in which large images are restored
    # called in block-major order with each block whose gradients of this update are complete (training/update.py)
    block_finished: Callable[[nn.Module], None] | None = None
    swapped_blocks = 0  # number of blocks whose frozen weights stay in host memory and are copied to compute
    patch_px: int  # image pixels per token along each side: the period of possible checkerboard artefacts
    # `decode_local` needs so many latent pixels around each pixel; None: it cannot be called on parts of a picture
    decoder_halo: int | None = None

    @abstractmethod
    def __init__(self, config: Any, seed: int = 0, roles: Sequence[Role] = (STUDENT,)):
        """Build the base with its initial weights, and the adapter sets of these roles."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to normalised latents [B, C, H / downsample, W / downsample]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Decode normalised latents to images; differentiable, and not clamped (clamped values have no gradient)."""

    def decode_global(self, z: Tensor) -> Tensor:
        """Run the part of the decoder that sees the whole picture: latents -> features [.., h, w]."""
        return z

    def decode_local(self, features: Tensor) -> Tensor:
        """Run the rest of the decoder on features [.., h, w], in which each pixel sees `decoder_halo` pixels around."""
        return self.decode(features)

    @property
    def network(self) -> RoleNet:
        """The network itself, without a wrapping DeepSpeed engine."""
        return getattr(self.net, "module", self.net)

    def call(self, role: Role, part: Part, z_t: Tensor, t_cur: Tensor, *inputs: Tensor | None) -> Tensor:
        """Run `RoleNet.forward` for this role and return its output in fp32 or higher precision.

        `inputs` is z_lq, t_tar, text. Raises ValueError if a text is given to a backbone that takes none. When only the
        gradient with respect to the input is needed, the network is called without its DeepSpeed engine, because the
        engine's hooks expect a backward pass into parameters.
        """
        if not self.takes_text and len(inputs) == 3 and inputs[2] is not None:
            raise ValueError(f"{type(self).__name__} takes no text embedding: leave `text` out of the condition")
        net = self.network if only_input_gradient() else self.net
        casts = self.autocast is not None and net is self.network
        with torch.autocast(z_t.device.type, self.autocast) if casts else nullcontext():
            out = net(z_t, t_cur, *inputs, role=role, part=part)
        return out if out.dtype == z_t.dtype else out.float()

    def encoder_input(self, x: Tensor) -> Tensor:
        """Return what the time-aware encoder adapter of a role takes: the image's latents [B, C, h, w].

        A backbone whose adapters are inside its encoder returns the image itself, with the pixels of each latent pixel
        as channels.
        """
        return self.encode(x)

    @property
    def encoder_channels(self) -> int:
        """Number of channels of `encoder_input`."""
        return self.latent_channels

    def start_from(self, z_lq: Tensor, t: Tensor) -> Tensor:
        """Return the state at time t [B] that has the LQ latent in the place of the noised one.

        This is the latent itself, unless the network was trained on states of another scale.
        """
        return z_lq

    def time_at(self, u: Tensor) -> Tensor:
        """Return the times at shares u in [0, 1] of the noise schedule with which the network was trained.

        A uniform share then is a time distributed as in that training. This is the identity for rectified flows.
        """
        return u

    def sweeps(self) -> Sweeps:
        """Begin the sweeps of one loss, in which several calls pass through each block together.

        Raises ValueError if the backbone cannot do that.
        """
        raise ValueError(
            f"{type(self).__name__} cannot compute block by block: set method.order=losses, which is the default"
        )

    def check_captions(self, width: int, source: str) -> None:
        """Raise ValueError unless the network takes text embeddings of this width, which come from `source`."""
        raise ValueError(f"data.captions = {source}: {type(self).__name__} takes no text; remove data.captions")

    @property
    def null_text(self) -> Tensor | None:
        """Embedding of the null prompt [1, T, D], for guidance, or None if there is none."""
        return None

    def snap(self, t: Tensor) -> Tensor:
        """Round times to the values that this network can distinguish.

        This is the identity unless the network embeds times in low precision.
        """
        return t

    def uncertainty(self, z_lq: Tensor) -> float | None:
        """How much of an image's detail is unknown, predicted from its LQ latents [1, C, h, w] before restoring it.

        0 stands for nothing; None: this backbone does not predict it.
        """
        return None

    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:  # noqa: B027 - most codecs are pretrained
        """Fit the parts that are fitted to data instead of trained, on pairs (x_hq, x_lq) [3, H, W] in [-1, 1]."""

    def fixed_state(self) -> dict[str, Tensor]:
        """Return the tensors outside the network that a checkpoint must contain, such as a fitted codec."""
        return {}

    def load_fixed_state(self, state: dict[str, Tensor]) -> None:
        """Load the tensors returned by `fixed_state`. Raises ValueError for tensors unknown to this backbone."""
        if state:
            raise ValueError(
                f"{type(self).__name__} has no state besides its network, but the checkpoint contains "
                f"{sorted(state)[:3]}: load it with the backbone that saved it"
            )

    def codec_sha256(self) -> str:
        """Return the hash of the codec, by which cached latents are recognised (`data.latents`).

        Raises ValueError if latents of this backbone cannot be cached, because its codec belongs to the run.
        """
        raise ValueError(
            f"data.latents: {type(self).__name__} fits its codec to the data of each run, so its latents cannot be "
            "cached: remove data.latents"
        )

    def check_sharing(self) -> None:
        """Raise ValueError if the base itself is trained and has several roles: training would change them all."""
        if self.trains_base and len(self.roles) > 1:
            raise ValueError(
                "backbone.train = full trains the base that the roles "
                f"{', '.join(role.name for role in self.roles)} share: set "
                "backbone.train=lora with a backbone.base, or give each role its own copy of the base (Role.copy)"
            )

    def owner(self, name: str, parameter: nn.Parameter) -> str | None:
        """Return the role that trains this parameter of the network, or None if it is frozen."""
        if not parameter.requires_grad:
            return None
        for role in self.roles:
            if f".{role.adapter_set}." in name or name.startswith(f"parts.{role.name}."):
                return role.name
        return next(role.name for role in self.roles if role.trains == "adapter")

    def trained(self, role: str) -> dict[str, nn.Parameter]:
        """Return the parameters that a role trains, by name, in the network's order."""
        return {n: p for n, p in self.network.named_parameters() if self.owner(n, p) == role}

    def exported(self, role: str = FIRST) -> dict[str, nn.Parameter]:
        """Return the parameters in the weight file of a role, by name, in the network's order.

        These are the parameters that the role trains, and for the student also the base if `exports_base` is set.
        """
        with_base = self.exports_base and role == FIRST
        found = [(n, p, self.owner(n, p)) for n, p in self.network.named_parameters()]
        return {n: p for n, p, owner in found if owner == role or (with_base and owner is None)}

    def lora_metadata(self) -> tuple[dict, dict] | None:
        """Return the metadata of a LoRA file: peft's config, and what else is needed to use the LoRA.

        Returns None if more than a LoRA is trained.
        """
        return None

    def load_weights(self, state: dict[str, Tensor], role: str = FIRST) -> None:
        """Load the weight file of a role into a new network. Raises ValueError naming a tensor that does not fit."""
        wanted = self.exported(role)
        wrong = sorted(set(wanted) ^ set(state)) or sorted(n for n in wanted if wanted[n].shape != state[n].shape)
        if wrong:
            raise ValueError(
                f"the weights do not fit this backbone: {wrong[0]} is missing, unknown or of another shape"
            )
        for name, parameter in wanted.items():
            parameter.data.copy_(state[name])

    def share_codec(self, other: Backbone) -> None:
        """Use the codec of `other` if this backbone's codec is not fitted yet.

        Raises ValueError if the two backbones do not share a latent space.
        """
        if type(self) is not type(other) or self.latent_channels != other.latent_channels:
            raise ValueError(
                f"prior: {type(self).__name__} with {self.latent_channels} latent channels cannot use the codec of "
                f"{type(other).__name__} with {other.latent_channels}: use the same backbone and the same number of "
                "latent channels in the sections prior and backbone"
            )

    @classmethod
    def with_random_weights(cls, config: Any) -> Any:
        """Return the config of a network of the same size with random weights, which needs no files."""
        return config

    @property
    def copied_bytes(self) -> int:
        """Bytes of swapped blocks and of activation checkpoints that have been copied to the device so far."""
        return 0

    @property
    def locked_bytes(self) -> int:
        """Host memory that this process has locked for frozen weights and activation checkpoints so far."""
        return 0

    @property
    def checkpoint_bytes(self) -> int:
        """Host memory that activation checkpoints have needed so far."""
        return 0

    def memory_groups(self) -> dict[str, Iterable[Tensor]]:
        """Return the frozen tensors grouped by purpose, for the memory table of a dry run.

        Groups in host memory have names that start with `host:`.
        """
        frozen = [p for p in self.net.parameters() if not p.requires_grad]
        return {"network, frozen": [*frozen, *self.net.buffers()]}

    def to(self, device: torch.device, each: Callable[[nn.Module], Any] = lambda part: None) -> None:
        """Move the network and the codec to the device.

        `each` is called with every part of the network once it is on the device in its final form. Large backbones are
        moved part by part, so that a trainer that shards them never holds more than one unsharded part.
        """
        self.net.to(device)
        each(self.net)

    def offload(self, device: torch.device) -> None:
        """Use instead of `to` for inference: blocks stay in host memory and are copied to the device one at a time.

        Raises ValueError if the backbone does not support it.
        """
        raise ValueError(f"{type(self).__name__} does not support offloading to host memory: leave offload out")

    def drop_training_precision(self) -> None:  # noqa: B027 - small models compute in the dtype of their weights
        """Keep the LoRA in the dtype in which it computes; restoring then gives the same bits with less memory."""

    @classmethod
    def inference_config(cls, config: Any, dtype: str | None, folder: Path) -> Any:
        """Return the config for building a saved model; it needs no files that were used only to start the training.

        folder: the saved model's folder, including the files listed by `files`. dtype: None, or one of `dtypes` (used
        only by backbones with `own_dtype`).
        """
        return config

    @classmethod
    def files(cls, config: Any) -> dict[str, Path]:
        """Return the files that a saved model needs in addition to its weights: name in its folder -> current path."""
        return {}

    def check_size(self, height_px: int, width_px: int) -> None:
        """Raise ValueError if an image of this size cannot be encoded."""
        m = self.pixel_multiple
        if height_px % m or width_px % m or min(height_px, width_px) < m:
            raise ValueError(
                f"an image of {width_px}x{height_px} px does not fit this backbone: both sides must be multiples of "
                f"{m} px; choose a crop such as {max(m, round(width_px / m) * m)}x{max(m, round(height_px / m) * m)}"
            )


def find_weights(source: str) -> tuple[Path, Path]:
    """Return the folder of a trained model and its weight file, the averaged weights if it has them.

    source: folder of a run, a checkpoint or an export, or the name of a model that ships with teasr. Raises ValueError
    if there is no complete model.
    """
    folder = checkpoint_folder.resolve(assets.find(source) or Path(source).expanduser())
    for name in ("ema.safetensors", "weights.safetensors"):
        if (folder / name).is_file():
            return folder, folder / name
    raise ValueError(f"{folder} holds no weights")
