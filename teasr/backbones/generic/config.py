"""The settings that all backbones on diffusers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from teasr.util.optional import check_installed


@dataclass(frozen=True)
class DiffusersConfig:
    """What the configs of all backbones on diffusers share: the weights, the LoRA, and how much memory they take."""

    model: str  # local folder of a diffusers model, its name on the hub, or "random" for benchmarks
    prompt: str  # prompt file written by `teasr cache-prompt`, or "random"
    null_prompt: str | None = None  # the same for the null (negative) prompt of guidance, if the method uses it
    lora: str | None = None  # LoRA exported by `teasr export` to start from; null: a new one without effect yet
    lora_rank: Annotated[int, "[1, 65536]"] = 128
    lora_alpha: Annotated[int, "[1, inf)"] = 128
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the frozen weights and the computation; the LoRA is stored in fp32
    quantise: Literal["fp8", "nf4"] | None = None  # of the blocks' frozen weights; they compute in `dtype`
    # number of evenly spaced blocks whose frozen weights stay in host memory and are copied to the GPU to compute
    swap_blocks: Annotated[int, "[0, 65536]"] = 0
    swap_ring: Annotated[int, "[1, 64]"] = 2  # number of them on the GPU; with 2, the next one is copied meanwhile
    gradient_checkpointing: bool = True
    host_checkpoints: bool = False  # keep the inputs of recomputed blocks in host memory between the passes
    compile: bool = False  # torch.compile of the blocks (not under ZeRO-3, whose hooks break the graphs)
    attention_backend: str | None = None  # a diffusers backend name; default: chosen by PyTorch
    # only for `model: random`: arguments that override the published sizes
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ValueError(f"backbone.lora_rank = {self.lora_rank}: must be >= 1")
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
        if self.host_checkpoints and not self.gradient_checkpointing:
            raise ValueError(
                "backbone.host_checkpoints keeps the inputs of recomputed blocks in host memory: set "
                "backbone.gradient_checkpointing=true, or backbone.host_checkpoints=false"
            )
        if self.quantise == "nf4":
            check_installed("bitsandbytes", "backbone.quantise = nf4")
