"""Qwen-Image (20 B) as a dual-branch restoration model: diffusers' transformer and VAE, LoRA on the condition branch.

The weights come from the hub or from the local folder of a diffusers model (`transformer/`, `vae/`). The prompt
embedding comes from the file written by `teasr cache-prompt`, so the text encoder is never loaded here. The two
branches with decoupled timesteps follow TEASR sec. 3.4.

Shape legend: B batch, C latent channels (16), h w latent pixels, L tokens of 2x2 latent pixels, P = 4 C, T text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from teasr.backbones import lora_file
from teasr.backbones.base import Backbone
from teasr.backbones.lora import inject_peft_lora, lora_settings, replace_linears
from teasr.backbones.memory.offloading import offload_blocks
from teasr.backbones.memory.quantised import KINDS, FullLinear
from teasr.backbones.memory.swapping import Ring, spaced
from teasr.backbones.memory.sweeps import Pass, Sweeps, Tokens
from teasr.backbones.parts import RoleNet
from teasr.backbones.prompts import DTYPES, cannot_load, load_part, load_prompt
from teasr.backbones.qwen_image.modulation import ModulationTable
from teasr.backbones.qwen_image.transformer import DualBranchTransformer, lora_targets
from teasr.backbones.qwen_image.vae import QwenCodec
from teasr.backbones.roles import DEFAULT_SET, FIRST, STUDENT, Role, blocks_seen
from teasr.util.optional import check_installed
from teasr.util.seed import seed_of

PROMPT = "prompt.safetensors"  # file name in the folder of a saved model


@dataclass(frozen=True)
class QwenImageConfig:
    """Config of the Qwen-Image backbone: its weights and how its branches are joined."""

    model: str  # local folder of a diffusers Qwen-Image model, its name on the hub, or "random" for benchmarks
    prompt: str  # prompt file written by `teasr cache-prompt`, or "random"
    null_prompt: str | None = None  # the same for the null (negative) prompt of guidance, if the method uses it
    lora: str | None = None  # LoRA exported by `teasr export` to start from; null: a new one without effect yet
    lora_rank: Annotated[int, "[1, 65536]"] = 128
    lora_alpha: Annotated[int, "[1, inf)"] = 128
    # independent: condition tokens attend only to condition tokens
    cond_attention: Literal["joint", "independent"] = "joint"
    # positions of condition tokens: the same as the noise tokens, or those of the next frame
    rope: Literal["shared", "frame_offset"] = "shared"
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the frozen weights and the computation; the LoRA is stored in fp32
    quantise: Literal["fp8", "nf4"] | None = None  # of the blocks' frozen weights; they compute in `dtype`
    # number of evenly spaced blocks whose frozen weights stay in host memory and are copied to the GPU to compute
    swap_blocks: Annotated[int, "[0, 65536]"] = 0
    swap_ring: Annotated[int, "[1, 64]"] = 2  # number of them on the GPU; with 2, the next one is copied meanwhile
    # number of steps of the modulation table (in host memory), which replaces a third of the weights; null: no table
    modulation_table: Annotated[int, "[1, 1000000]", "such as 1000, or null for no table"] | None = 1000
    gradient_checkpointing: bool = True
    compile: bool = False  # torch.compile of the blocks (not under ZeRO-3, whose hooks break the graphs)
    attention_backend: str | None = None  # a diffusers backend name; default: chosen by PyTorch
    # only for `model: random`: arguments that override the published sizes
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ValueError(f"backbone.lora_rank = {self.lora_rank}: must be >= 1")
        if self.modulation_table is not None and self.modulation_table < 1:
            raise ValueError(
                f"backbone.modulation_table = {self.modulation_table}: must be a number of time steps >= 1, such as "
                "1000, or null for no table"
            )
        if (self.transformer or self.vae) and self.model != "random":
            raise ValueError(
                "backbone.transformer and backbone.vae set sizes only for backbone.model=random: remove them"
            )
        if self.lora is not None and self.model == "random":
            raise ValueError(
                f"backbone.lora = {self.lora} needs the model that it was trained on: set backbone.model to that model "
                "instead of random"
            )
        if self.swap_blocks < 0 or self.swap_ring < 1:
            raise ValueError(
                f"backbone.swap_blocks = {self.swap_blocks} and backbone.swap_ring = {self.swap_ring}: they must be >= "
                "0 and >= 1"
            )
        if self.swap_blocks and not self.gradient_checkpointing:
            raise ValueError(
                f"backbone.swap_blocks = {self.swap_blocks} needs activation checkpointing, which fetches a block "
                "again for its backward pass: set backbone.gradient_checkpointing=true, or backbone.swap_blocks=0"
            )
        if self.swap_blocks and self.compile:
            raise ValueError(
                f"backbone.swap_blocks = {self.swap_blocks} does not work with compiled blocks: set "
                "backbone.compile=false, or backbone.swap_blocks=0"
            )
        if self.quantise == "nf4":
            check_installed("bitsandbytes", "backbone.quantise = nf4")


class QwenNet(RoleNet):
    """The network: latents and two times -> velocity. It holds the transformer and the prompt embedding."""

    def __init__(self, transformer: DualBranchTransformer, prompt_TD: Tensor, config: QwenImageConfig):
        super().__init__()
        self.transformer, self.config = transformer, config
        self.register_buffer("prompt", prompt_TD, persistent=False)
        self.register_buffer("null_prompt", None, persistent=False)

    def predict(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Tensor:
        """Map latents [B, C, h, w] and times [B] fp32 to the velocity [B, C, h, w]."""
        v = self._tokens(z_t, t_cur, z_lq, t_tar, text, role)
        return unpack(v, z_t.shape[-2] // 2, z_t.shape[-1] // 2)

    def features(self, z_t: Tensor, t_cur: Tensor, text: Tensor | None, role: Role) -> Tensor:
        """Return a feature map [B, D, h / 2, w / 2]."""
        blocks = role.blocks or len(self.transformer.transformer_blocks)
        x = self._tokens(z_t, t_cur, None, None, text, role, blocks)
        return x.transpose(1, 2).unflatten(2, (z_t.shape[-2] // 2, z_t.shape[-1] // 2))

    def begin(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Pass:
        """Return the call of `predict` with these arguments as one that can share its sweep with others."""
        transformer = self.transformer
        tokens, others = transformer.begin(*self._inputs(z_t, t_cur, z_lq, t_tar, text, role))

        def through(i: int, tokens: Tokens) -> Tokens:
            return transformer.transformer_blocks[i].compute(*tokens, **others(i))

        def end(tokens: Tokens) -> Tensor:
            v = unpack(transformer.end(tokens, others), z_t.shape[-2] // 2, z_t.shape[-1] // 2)
            return v if v.dtype == z_t.dtype else v.float()

        return Pass(tokens, through, end)

    def _tokens(self, z_t, t_cur, z_lq, t_tar, text, role: Role, blocks: int | None = None) -> Tensor:
        """Return velocity tokens [B, L, P], or the noise tokens [B, L, D] after `blocks` blocks if that is given."""
        return self.transformer(*self._inputs(z_t, t_cur, z_lq, t_tar, text, role), blocks)

    def _inputs(self, z_t, t_cur, z_lq, t_tar, text, role: Role) -> tuple:
        """Return the arguments of the transformer, in order."""
        dtype = self.prompt.dtype
        text = self.prompt if text is None else text.to(dtype)
        cond = None if z_lq is None else pack(z_lq).to(dtype)
        grid = (z_t.shape[-2] // 2, z_t.shape[-1] // 2)
        own = self.config.rope, self.config.cond_attention, role.adapters
        return pack(z_t).to(dtype), t_cur, text.expand(z_t.shape[0], -1, -1), grid, cond, t_tar, *own


def pack(z: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, L, P], channel-major within a token, as in diffusers' pipeline."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, L, P] of h x w tokens -> [B, C, 2 h, 2 w]."""
    b, _, p = tokens.shape
    z = tokens.reshape(b, h, w, p // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, p // 4, 2 * h, 2 * w)


class QwenImage(Backbone):
    """The backbone: `QwenNet` and the VAE's codec."""

    own_dtype = True
    devices = ("cpu", "cuda")  # its times are rounded in float64, which Apple GPUs do not have
    takes_text = True
    has_prior = True
    dtypes = ("bf16", "fp32", "fp8", "nf4")

    def __init__(self, config: QwenImageConfig, seed: int = 0, roles: Sequence[Role] = (STUDENT,)):
        """Build the backbone. Raises ValueError if weights or prompt are missing, incomplete or incompatible."""
        self.config, self.seed, self.roles, self.prepared = config, seed, tuple(roles), False
        self.pending_weights: dict[str, Tensor] = {}  # loaded before the network has memory
        dtype = DTYPES[config.dtype]
        transformer, self.codec = _random(config) if config.model == "random" else _pretrained(config)
        embeds = _prompt(config, "prompt", transformer.config.joint_attention_dim)
        if config.attention_backend:
            transformer.set_attention_backend(config.attention_backend)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.net = QwenNet(transformer, embeds[None].to(dtype), config)
        if config.null_prompt is not None:
            null = _prompt(config, "null_prompt", transformer.config.joint_attention_dim)
            self.net.null_prompt = null[None].to(dtype)
        if seen := blocks_seen(roles):
            transformer.transformer_blocks = transformer.transformer_blocks[:seen]
        if config.swap_blocks > len(transformer.transformer_blocks):
            raise ValueError(
                f"backbone.swap_blocks = {config.swap_blocks}: this network has only "
                f"{len(transformer.transformer_blocks)} blocks"
            )
        self.ring: Ring | None = None
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
        self.codec.checkpointing = config.gradient_checkpointing
        self.latent_channels = transformer.config.in_channels // 4
        self.downsample, self.pixel_multiple, self.patch_px = 8, 16, 16

    def _add_role(self, role: Role) -> None:
        """Add the role's LoRA set, encoder adapter and head."""
        config, transformer = self.config, self.net.transformer
        blocks = len(transformer.transformer_blocks)
        if role.blocks is not None and not 1 <= role.blocks <= blocks:
            raise ValueError(f"role {role.name} uses {role.blocks} blocks: this backbone allows 1 to {blocks}")
        first = role.adapter_set == DEFAULT_SET
        torch.manual_seed(seed_of(self.seed, "qwen lora") if first else seed_of(self.seed, "role", role.name))
        if role.adapter_set:
            rank = role.rank or config.lora_rank
            targets = lora_targets(transformer, role.branches, role.blocks)
            inject_peft_lora(transformer, targets, rank, config.lora_alpha * rank / config.lora_rank, role.adapter_set)
        self.net.add_parts(role, transformer.config.in_channels // 4, transformer.inner_dim)

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
    def decoder_halo(self) -> int:
        return self.codec.decoder_halo

    def codec_sha256(self) -> str:
        if self.config.model == "random":
            raise ValueError("data.latents: cached latents do not belong to a random VAE; remove data.latents")
        return self.codec.sha256()

    @property
    def null_text(self) -> Tensor | None:
        return self.network.null_prompt

    def sweeps(self) -> Sweeps:
        if self.config.compile or not self.config.gradient_checkpointing:
            raise ValueError(
                "method.order = blocks recomputes each block, which must not be compiled: set "
                "backbone.gradient_checkpointing=true and backbone.compile=false, or method.order=losses"
            )
        return Sweeps(self.network.transformer.transformer_blocks, self.network.begin)

    def snap(self, t: Tensor) -> Tensor:
        """Round to the times of the modulation table, so that time embedding and noise level agree."""
        steps = self.config.modulation_table
        return t if steps is None else (t.double() * steps).round().div(steps).to(t.dtype)

    @classmethod
    def with_random_weights(cls, config: QwenImageConfig) -> QwenImageConfig:
        """Use the sizes of a local model if `config.model` is a folder, and the published sizes for a hub name."""
        sizes = {"transformer": config.transformer, "vae": config.vae}
        if config.model != "random" and (folder := Path(config.model).expanduser()).is_dir():
            for part in sizes:
                try:
                    found = json.loads((folder / part / "config.json").read_text())
                except (OSError, ValueError) as error:
                    raise cannot_load("backbone.model", config.model, error) from None
                sizes[part] = {k: v for k, v in found.items() if not k.startswith("_")}
        null = config.null_prompt and "random"
        return replace(config, model="random", prompt="random", null_prompt=null, lora=None, **sizes)

    def offload(self, device: torch.device) -> None:
        self.to(torch.device("cpu"))
        offload_blocks(self.net.transformer, device)
        self.net.prompt = self.net.prompt.to(device)
        self.codec.to(device)

    @classmethod
    def inference_config(cls, config: QwenImageConfig, dtype: str | None, folder: Path) -> QwenImageConfig:
        """With dtype `fp8` or `nf4`, the blocks' frozen weights are quantised and the blocks compute in bf16."""
        prompt, lora = folder / PROMPT, folder / lora_file.NAME
        config = replace(
            config,
            prompt=str(prompt) if prompt.is_file() else config.prompt,
            null_prompt=None,  # the student restores without guidance
            lora=str(folder) if lora.is_file() else None,
        )
        config = replace(config, swap_blocks=0)  # restoring has its own way to keep blocks in host memory: `offload`
        if dtype in ("fp8", "nf4"):
            return replace(config, dtype="bf16", quantise=dtype)
        return config if dtype is None else replace(config, dtype=dtype, quantise=None)

    @classmethod
    def files(cls, config: QwenImageConfig) -> dict[str, Path]:
        return {} if config.prompt == "random" else {PROMPT: Path(config.prompt).expanduser()}

    def lora_metadata(self) -> tuple[dict, dict]:
        config = self.config
        branches = next(role.branches for role in self.roles if role.name == FIRST)
        peft = lora_settings(lora_targets(self.net.transformer, branches), config.lora_rank, config.lora_alpha)
        settings = ("lora_rank", "lora_alpha", "rope", "cond_attention")
        layers, width = len(self.net.transformer.transformer_blocks), self.net.transformer.inner_dim
        metadata = {"base_model": config.model, "prompt": config.prompt, "base_layers": layers, "base_width": width}
        return peft, metadata | {"branches": branches} | {key: getattr(config, key) for key in settings}

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
    def swapped_blocks(self) -> int:
        return self.config.swap_blocks

    @property
    def copied_bytes(self) -> int:
        return self.ring.copier.bytes if self.ring else 0

    def memory_groups(self) -> dict[str, Iterable[Tensor]]:
        groups: dict[str, list[Tensor]] = {}
        for name, tensor in (*self.net.named_parameters(), *self.net.named_buffers()):
            if "lora_" not in name and not name.startswith("parts."):
                groups.setdefault(_group(name), []).append(tensor)
        groups["VAE"] = [*self.codec.parameters(), *self.codec.buffers()]
        if table := self.net.transformer.modulation:
            groups["host: modulation table"] = [table.image, table.text]
        if self.ring:
            groups["host: swapped blocks"] = [block.source for block in self.ring.blocks]
            groups["slots for swapped blocks"] = self.ring.slots
        return groups

    def to(self, device: torch.device, each: Callable[[nn.Module], Any] = lambda part: None) -> None:
        """Move to the device. The first call also tabulates modulation and quantises weights, block by block."""
        if self.prepared:
            if self.ring and device.type != self.ring.device.type:
                raise ValueError(
                    f"a network with backbone.swap_blocks = {self.config.swap_blocks} computes on "
                    f"{self.ring.device.type} and cannot be moved to {device.type}: build it again"
                )
            self.net.to(device)
            self.codec.to(device)
        else:
            self._prepare(device, each)
        each(self.net)

    def _prepare(self, device: torch.device, each: Callable[[nn.Module], Any]) -> None:
        config, transformer = self.config, self.net.transformer
        self._place("vae", self.codec, device)
        if "parts" in self.net._modules:
            self.net.parts.to(device)
        for name, child in transformer.named_children():
            if child is not transformer.transformer_blocks:
                self._place(name, child, device, f"transformer.{name}.")
        for name, embedding in list(self.net.named_buffers(recurse=False)):
            setattr(self.net, name, embedding.to(device))
        table = None
        if config.modulation_table:
            blocks, width = len(transformer.transformer_blocks), transformer.inner_dim
            table = ModulationTable(config.modulation_table, blocks, width, self.net.prompt.dtype, device)
            with torch.no_grad():
                temb = transformer.time_embedding(table.times.to(device))
        swapped, kind = spaced(config.swap_blocks, len(transformer.transformer_blocks)), KINDS.get(config.quantise)
        self.ring = Ring(config.swap_ring, device) if swapped else None
        for i, block in enumerate(transformer.transformer_blocks):
            self._place(f"block {i}", block, device, f"transformer.transformer_blocks.{i}.")
            if table:
                table.take(i, block, temb)
            if i in swapped:
                block.fetch = self.ring.take(block, kind or FullLinear)
            elif kind:
                replace_linears(block, kind)
            each(block)
        if self.ring:
            self.ring.allocate()
        transformer.modulation, self.prepared, self.pending_weights = table, True, {}
        if config.compile:
            transformer.compile_repeated_blocks()

    def _place(self, part_name: str, part: nn.Module, device: torch.device, prefix: str = "") -> None:
        """Move a part to the device, where random weights are created if `config.model` is random.

        `prefix` is the prefix of the part's parameter names in the network.
        """
        if self.config.model != "random" or device.type == "meta":
            part.to(device)
            return
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, "random weights", part_name))
        others = {role.adapter_set for role in self.roles} - {None, DEFAULT_SET}
        for path, module in part.named_modules():
            for name, p in module._parameters.items():
                if p is not None:
                    value = torch.empty_like(p, device=device)
                    if (
                        last := path.rpartition(".")[2]
                    ) in others:  # own generator: does not change the draws of base and student
                        value.zero_()
                        if "lora_A" in path:
                            own = seed_of(self.seed, "random weights", part_name, last, path)
                            value.normal_(0, p.shape[1] ** -0.5, generator=torch.Generator(device).manual_seed(own))
                        module._parameters[name] = nn.Parameter(value, requires_grad=p.requires_grad)
                        continue
                    if p.ndim > 1 and p.numel() > max(p.shape):
                        value.normal_(0, p[0].numel() ** -0.5, generator=generator)
                    else:  # weight of a norm, or a bias
                        value.fill_(0.0 if name == "bias" else 1.0)
                    module._parameters[name] = nn.Parameter(value, requires_grad=p.requires_grad)
        for name, p in part.named_parameters():
            if (weight := self.pending_weights.get(prefix + name)) is not None:
                p.data.copy_(weight)
        part.to(device)


def _pretrained(config: QwenImageConfig) -> tuple[DualBranchTransformer, QwenCodec]:
    dtype = DTYPES[config.dtype]
    transformer = load_part(DualBranchTransformer, "backbone.model", config.model, "transformer", dtype, "weights")
    return transformer.requires_grad_(False), QwenCodec.from_pretrained(config.model, dtype)


def _random(config: QwenImageConfig) -> tuple[DualBranchTransformer, QwenCodec]:
    """Build transformer and codec without allocating memory: `QwenImage.to` allocates it part by part."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.dtype])
    try:
        with init_empty_weights():
            transformer = DualBranchTransformer(**config.transformer).requires_grad_(False)
            return transformer, QwenCodec(AutoencoderKLQwenImage(**config.vae))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"backbone.transformer or backbone.vae contains sizes that cannot be built ({error})"
        ) from error
    finally:
        torch.set_default_dtype(default)


def _prompt(config: QwenImageConfig, key: Literal["prompt", "null_prompt"], width: int) -> Tensor:
    """Return a prompt embedding [T, width]. Raises ValueError if the file is unusable or of another width."""
    path = getattr(config, key)
    if path == "random":
        tokens = 5  # the empty prompt has 5
        return torch.randn(tokens, width, generator=torch.Generator().manual_seed(int(key == "null_prompt")))
    embeds, mask, _ = load_prompt(Path(path).expanduser())
    if mask is not None:
        raise ValueError(
            f"backbone.{key} = {path} contains a padded prompt: create it again for a single prompt with "
            "`teasr cache-prompt`"
        )
    if embeds.shape[1] != width:
        raise ValueError(
            f"backbone.{key} = {path} has embeddings of width {embeds.shape[1]}, but {config.model} needs "
            f"width {width}: create it for this model with `teasr cache-prompt`"
        )
    return embeds


def _group(name: str) -> str:
    """Return the memory group of a frozen tensor of the transformer."""
    if "_mod." in name:
        return "modulation"
    if any(part in name for part in ("txt_", ".add_", "to_add_out", "norm_added", "prompt")):
        return "text path"
    return "image path"
