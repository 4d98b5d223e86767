"""The generic backbone on diffusers: a frozen transformer with LoRA sets on chosen tokens, and its VAE.

The weights come from the hub or from the local folder of a diffusers model (`transformer/`, `vae/`). The prompt
embedding comes from the file written by `teasr cache-prompt`, so text encoders are never loaded here. A backbone adds
what its transformer does differently: a subclass of diffusers' class whose blocks take condition tokens at their own
time (`DualBranch`), and a subclass of `DiffusersModel`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from teasr.backbones import lora_file
from teasr.backbones.base import Backbone
from teasr.backbones.generic.codec import Codec
from teasr.backbones.generic.config import DiffusersConfig
from teasr.backbones.generic.network import DiffusersNet, DualBranch
from teasr.backbones.generic.random_weights import fill
from teasr.backbones.lora import inject_peft_lora, lora_settings, replace_linears
from teasr.backbones.memory.checkpoints import HostCheckpoints
from teasr.backbones.memory.quantised import KINDS, FullLinear
from teasr.backbones.memory.swapping import HostArena, Ring, spaced
from teasr.backbones.memory.sweeps import Sweeps
from teasr.backbones.prompts import DTYPES, cannot_load, load_part, load_prompt
from teasr.backbones.roles import DEFAULT_SET, FIRST, STUDENT, Role, blocks_seen
from teasr.util.seed import seed_of

PROMPT = "prompt.safetensors"  # file name in the folder of a saved model


class DiffusersModel(Backbone):
    """The backbone: a `DiffusersNet` and the VAE's codec. Subclasses set the classes and name the adapted layers."""

    own_dtype = True
    devices = ("cpu", "cuda")  # never run on an Apple GPU
    takes_text = True
    has_prior = True
    dtypes = ("bf16", "fp32", "fp8", "nf4")
    downsample, pixel_multiple, patch_px = 8, 16, 16

    transformer_class: ClassVar[type[DualBranch]]
    codec_class: ClassVar[type[Codec]]
    network_folder = "transformer"  # of a diffusers model
    published: ClassVar[dict[str, dict]] = {}  # sizes that differ from the defaults of diffusers' classes, by part
    prompt_tokens = 5  # of a random prompt
    lora_seed = "lora"  # name of the seed of the student's LoRA
    described: ClassVar[tuple[str, ...]] = ("lora_rank", "lora_alpha")  # settings that a LoRA file records

    def __init__(self, config: DiffusersConfig, seed: int = 0, roles: Sequence[Role] = (STUDENT,)):
        """Build the backbone. Raises ValueError if weights or prompt are missing, incomplete or incompatible."""
        self.config, self.seed, self.roles, self.prepared = config, seed, tuple(roles), False
        self.pending_weights: dict[str, Tensor] = {}  # loaded before the network has memory
        transformer, self.codec = self._random() if config.model == "random" else self._pretrained()
        if config.attention_backend:
            transformer.set_attention_backend(config.attention_backend)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        width = self.text_width(transformer)
        self.net = self._net(transformer, self._prompt("prompt", width))
        if config.null_prompt is not None:
            self.net.null_prompt = self._prompt("null_prompt", width)
        if seen := blocks_seen(roles):
            transformer.keep(seen)
        if config.swap_blocks > len(transformer.blocks):
            raise ValueError(
                f"backbone.swap_blocks = {config.swap_blocks}: this network has only {len(transformer.blocks)} blocks"
            )
        self.swapped_blocks = config.swap_blocks
        self.ring: Ring | None = None
        self.latent_channels, self.codec.checkpointing = self.codec.latent_channels, config.gradient_checkpointing
        with torch.random.fork_rng():
            for role in roles:
                self._add_role(role)
        for name, parameter in transformer.named_parameters():
            trained = "lora_" in name
            parameter.requires_grad_(trained)
            if trained:
                parameter.data = parameter.data.float()
        if config.lora is not None:
            self._load_lora(Path(config.lora).expanduser())

    @abstractmethod
    def lora_targets(self, branches: Literal["dual", "single"], blocks: int | None = None) -> str:
        """Return a regular expression that matches the Linears to adapt: all whose output for adapted tokens is used.

        dual: the adapted tokens are the condition tokens; in the last block only their keys and values are used.
        single: they are the noise tokens, through the first `blocks` blocks (default: all).
        """

    def text_width(self, transformer: DualBranch) -> int:
        """Return the width of the rows of a prompt embedding."""
        return transformer.config.joint_attention_dim

    def feature_channels(self, role: Role) -> int:
        """Return the width D of a role's features [B, D, h', w']."""
        return self.net.transformer.inner_dim

    def block_preparation(self, device: torch.device) -> Callable[[int, nn.Module], None]:
        """Return what to do with each block (index, block) once it is on the device; by default nothing.

        It is called when everything but the blocks is on the device.
        """
        return lambda i, block: None

    def memory_group(self, name: str) -> str:
        """Return the group of a frozen tensor of the network in the memory table of a dry run."""
        return "transformer"

    def _add_role(self, role: Role) -> None:
        """Add the role's LoRA set, encoder adapter and head."""
        config, transformer = self.config, self.net.transformer
        blocks = len(transformer.blocks)
        if role.blocks is not None and not 1 <= role.blocks <= blocks:
            raise ValueError(f"role {role.name} uses {role.blocks} blocks: this backbone allows 1 to {blocks}")
        first = role.adapter_set == DEFAULT_SET
        torch.manual_seed(seed_of(self.seed, self.lora_seed) if first else seed_of(self.seed, "role", role.name))
        if role.adapter_set:
            rank = role.rank or config.lora_rank
            targets = self.lora_targets(role.branches, role.blocks)
            inject_peft_lora(transformer, targets, rank, config.lora_alpha * rank / config.lora_rank, role.adapter_set)
        self.net.add_parts(role, self.latent_channels, self.feature_channels(role))

    def encode(self, x: Tensor) -> Tensor:
        self.check_size(*x.shape[-2:])
        return self.codec.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.codec.decode(z)

    def decode_global(self, z: Tensor) -> Tensor:
        return self.codec.decode_global(z)

    def decode_local(self, features: Tensor) -> Tensor:
        return self.codec.decode_local(features)

    @property
    def decoder_halo(self) -> int | None:
        return self.codec.decoder_halo

    def sweeps(self) -> Sweeps:
        transformer = self.network.transformer
        if not isinstance(transformer, DualBranch):
            return super().sweeps()
        if self.config.compile or not self.config.gradient_checkpointing:
            raise ValueError(
                "method.order = blocks recomputes each block, which must not be compiled: set "
                "backbone.gradient_checkpointing=true and backbone.compile=false, or method.order=losses"
            )
        return Sweeps(transformer.blocks, self.network.begin, transformer.checkpoints, self.block_finished)

    def codec_sha256(self) -> str:
        if self.config.model == "random":
            raise ValueError("data.latents: cached latents do not belong to a random VAE; remove data.latents")
        return self.codec.sha256()

    def check_captions(self, width: int, source: str) -> None:
        if width != (own := self.network.prompt.shape[-1]):
            raise ValueError(
                f"data.captions = {source} has embeddings of width {width}, but {self.config.model} needs width {own}: "
                f"run `teasr cache-captions` with model={self.config.model}"
            )

    @property
    def null_text(self) -> Tensor | None:
        return self.network.null_prompt

    @classmethod
    def with_random_weights(cls, config: DiffusersConfig) -> DiffusersConfig:
        """Use the sizes of a local model if `config.model` is a folder, and the published sizes for a hub name."""
        sizes = {"transformer": config.transformer, "vae": config.vae}
        if config.model != "random" and (folder := Path(config.model).expanduser()).is_dir():
            for part, subfolder in (("transformer", cls.network_folder), ("vae", "vae")):
                try:
                    found = json.loads((folder / subfolder / "config.json").read_text())
                except (OSError, ValueError) as error:
                    raise cannot_load("backbone.model", config.model, error) from None
                sizes[part] = {k: v for k, v in found.items() if not k.startswith("_")}
        null = config.null_prompt and "random"
        return replace(config, model="random", prompt="random", null_prompt=null, lora=None, **sizes)

    def offload(self, device: torch.device) -> None:
        """Use instead of `to` for inference: the frozen weights of all blocks take turns in the slots of a ring."""
        self.swapped_blocks = len(self.net.transformer.blocks)
        self.to(device)

    def drop_training_precision(self) -> None:
        for name, parameter in self.net.transformer.named_parameters():
            if "lora_" in name:  # the products round it to this dtype anyway (lora.py)
                parameter.data = parameter.data.to(DTYPES[self.config.dtype])

    @classmethod
    def inference_config(cls, config: DiffusersConfig, dtype: str | None, folder: Path) -> DiffusersConfig:
        """With dtype `fp8` or `nf4`, the blocks' frozen weights are quantised and the blocks compute in bf16."""
        prompt, lora = folder / PROMPT, folder / lora_file.NAME
        config = replace(
            config,
            prompt=str(prompt) if prompt.is_file() else config.prompt,
            null_prompt=None,  # the student restores without guidance
            lora=str(folder) if lora.is_file() else None,
        )
        config = replace(config, swap_blocks=0)  # restoring keeps all blocks in host memory or none: `offload`
        if dtype in ("fp8", "nf4"):
            return replace(config, dtype="bf16", quantise=dtype)
        return config if dtype is None else replace(config, dtype=dtype, quantise=None)

    @classmethod
    def files(cls, config: DiffusersConfig) -> dict[str, Path]:
        return {} if config.prompt == "random" else {PROMPT: Path(config.prompt).expanduser()}

    def lora_metadata(self) -> tuple[dict, dict]:
        config, transformer = self.config, self.net.transformer
        branches = next(role.branches for role in self.roles if role.name == FIRST)
        peft = lora_settings(self.lora_targets(branches), config.lora_rank, config.lora_alpha)
        metadata = {"base_model": config.model, "prompt": config.prompt, "branches": branches}
        metadata |= {"base_layers": len(transformer.blocks), "base_width": transformer.inner_dim}
        return peft, metadata | {key: getattr(config, key) for key in self.described}

    def _load_lora(self, path: Path) -> None:
        """Load a LoRA file. Raises ValueError if it was trained with a different config."""
        weights, stored = lora_file.read(path)
        stored.setdefault("branches", "dual")  # files of the first version lack this key
        expected = self.lora_metadata()[1]
        differing = [k for k in expected if k not in ("base_model", "prompt") and stored.get(k) != expected[k]]
        if differing:
            key = differing[0]
            raise ValueError(
                f"backbone.lora = {path} has {key} = {stored.get(key)}, but this config has {key} = {expected[key]}: "
                "use the same value or another LoRA"
            )
        try:
            self.load_weights(weights)
        except ValueError as error:
            raise ValueError(f"backbone.lora = {path}: {error}") from None

    def load_weights(self, state: dict[str, Tensor], role: str = FIRST) -> None:
        super().load_weights(state, role)
        if self.config.model == "random" and not self.prepared:
            self.pending_weights |= state  # no memory is allocated yet: `_place` copies these later

    @property
    def copied_bytes(self) -> int:
        checkpoints = self.net.transformer.checkpoints
        return (self.ring.copier.bytes if self.ring else 0) + (checkpoints.copied_bytes if checkpoints else 0)

    @property
    def locked_bytes(self) -> int:
        return HostArena.locked_bytes

    @property
    def checkpoint_bytes(self) -> int:
        checkpoints = self.net.transformer.checkpoints
        return checkpoints.host_bytes if checkpoints else 0

    def memory_groups(self) -> dict[str, Iterable[Tensor]]:
        groups: dict[str, list[Tensor]] = {}
        for name, tensor in (*self.net.named_parameters(), *self.net.named_buffers()):
            if "lora_" not in name and not name.startswith("parts."):
                groups.setdefault(self.memory_group(name), []).append(tensor)
        groups["VAE"] = [*self.codec.parameters(), *self.codec.buffers()]
        if self.ring:
            groups["host: swapped blocks"] = [block.source for block in self.ring.blocks]
            groups["slots for swapped blocks"] = self.ring.slots
        return groups

    def to(self, device: torch.device, each: Callable[[nn.Module], Any] = lambda part: None) -> None:
        """Move to the device. The first call also quantises the blocks' weights, one block after another."""
        if self.prepared:
            if self.ring and device.type != self.ring.device.type:
                raise ValueError(
                    f"a network whose blocks are in host memory (backbone.swap_blocks, offload) computes on "
                    f"{self.ring.device.type} and cannot be moved to {device.type}: build it again"
                )
            self.net.to(device)
            self.codec.to(device)
        else:
            self._prepare(device, each)
        each(self.net)

    def _prepare(self, device: torch.device, each: Callable[[nn.Module], Any]) -> None:
        config, transformer = self.config, self.net.transformer
        blocks = transformer.blocks
        self._place("vae", self.codec, device)
        if "parts" in self.net._modules:
            self.net.parts.to(device)
        if config.model == "random" and device.type != "meta":
            fill(transformer, device, self.seed, "transformer", recurse=False)
        for parameter in transformer.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, child in transformer.named_children():
            if child is not blocks:
                self._place(name, child, device, f"transformer.{name}.")
        for name, embedding in list(self.net.named_buffers(recurse=False)):
            setattr(self.net, name, embedding.to(device))
        prepare = self.block_preparation(device)
        swapped, kind = spaced(self.swapped_blocks, len(blocks)), KINDS.get(config.quantise)
        self.ring = Ring(config.swap_ring, device) if swapped else None
        for i, block in enumerate(blocks):
            self._place(f"block {i}", block, device, f"transformer.{transformer.block_list}.{i}.")
            prepare(i, block)
            if i in swapped:
                block.fetch = self.ring.take(block, kind or FullLinear)
            elif kind:
                replace_linears(block, kind)
            each(block)
        if self.ring:
            self.ring.allocate()
        transformer.checkpoints = HostCheckpoints(device) if config.host_checkpoints else None
        self.prepared, self.pending_weights = True, {}
        if config.compile and not swapped:
            transformer.compile_repeated_blocks()

    def _place(self, part_name: str, part: nn.Module, device: torch.device, prefix: str = "") -> None:
        """Move a part to the device, where random weights are created if `config.model` is random.

        `prefix` is the prefix of the part's parameter names in the network.
        """
        if self.config.model == "random" and device.type != "meta":
            others = {role.adapter_set for role in self.roles} - {None, DEFAULT_SET}
            fill(part, device, self.seed, part_name, others)
            for name, p in part.named_parameters():
                if (weight := self.pending_weights.get(prefix + name)) is not None:
                    p.data.copy_(weight)
        part.to(device)

    def _net(self, transformer: DualBranch, prompt_BTD: Tensor) -> DiffusersNet:
        return DiffusersNet(transformer, prompt_BTD)

    def _pretrained(self) -> tuple[DualBranch, Codec]:
        model, dtype = self.config.model, DTYPES[self.config.dtype]
        transformer = load_part(self.transformer_class, "backbone.model", model, self.network_folder, dtype, "weights")
        return transformer.requires_grad_(False), self.codec_class.from_pretrained(model, dtype)

    def _random(self) -> tuple[DualBranch, Codec]:
        """Build transformer and codec without allocating memory: `to` allocates it part by part."""
        sizes = {part: self.published.get(part, {}) | getattr(self.config, part) for part in ("transformer", "vae")}
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.config.dtype])
        try:
            with init_empty_weights():
                transformer = self.transformer_class(**sizes["transformer"]).requires_grad_(False)
                return transformer, self.codec_class(self.codec_class.vae_class(**sizes["vae"]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"backbone.transformer or backbone.vae contains sizes that cannot be built ({error})"
            ) from error
        finally:
            torch.set_default_dtype(default)

    def _prompt(self, key: Literal["prompt", "null_prompt"], width: int) -> Tensor:
        """Return a prompt embedding [1, T, width]. Raises ValueError if its file is unusable or of another width."""
        path, dtype = getattr(self.config, key), DTYPES[self.config.dtype]
        if path == "random":
            generator = torch.Generator().manual_seed(int(key == "null_prompt"))
            return torch.randn(self.prompt_tokens, width, generator=generator)[None].to(dtype)
        embeds, mask, _ = load_prompt(Path(path).expanduser())
        if mask is not None:
            raise ValueError(
                f"backbone.{key} = {path} contains a padded prompt: create it again for a single prompt with "
                "`teasr cache-prompt`"
            )
        if embeds.shape[1] != width:
            raise ValueError(
                f"backbone.{key} = {path} has embeddings of width {embeds.shape[1]}, but {self.config.model} needs "
                f"width {width}: create it for this model with `teasr cache-prompt`"
            )
        return embeds[None].to(dtype)
