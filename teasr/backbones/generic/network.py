"""What the networks of backbones on diffusers share: the prompt beside the transformer, and the condition branch.

Shape legend: B batch, C latent channels, h w latent pixels, L image tokens, D width, T text tokens, H heads, E head
width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teasr.backbones.lora import upgrade_lora
from teasr.backbones.memory.checkpoints import HostCheckpoints
from teasr.backbones.memory.sweeps import Pass, Tokens
from teasr.backbones.parts import RoleNet
from teasr.backbones.roles import DEFAULT_SET, STUDENT, Adapters, Role


class DiffusersNet(RoleNet):
    """The network: latents and two times -> velocity. It holds the transformer and the prompt embedding."""

    def __init__(self, transformer: DualBranch, prompt_TD: Tensor):
        super().__init__()
        self.transformer = transformer
        self.register_buffer("prompt", prompt_TD, persistent=False)
        self.register_buffer("null_prompt", None, persistent=False)

    def predict(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Tensor:
        """Map latents [B, C, h, w] and times [B] fp32 to the velocity [B, C, h, w]."""
        return self.transformer(*self._inputs(z_t, t_cur, z_lq, t_tar, text, role))

    def begin(
        self, z_t: Tensor, t_cur: Tensor, z_lq: Tensor | None, t_tar: Tensor | None, text: Tensor | None, role: Role
    ) -> Pass:
        """Return the call of `predict` with these arguments as one that can share its sweep with others."""
        return self.transformer.begin(*self._inputs(z_t, t_cur, z_lq, t_tar, text, role))

    def features(self, z_t: Tensor, t_cur: Tensor, text: Tensor | None, role: Role) -> Tensor:
        """Return a feature map [B, D, h / 2, w / 2]."""
        blocks = role.blocks or len(self.transformer.blocks)
        x = self.transformer(*self._inputs(z_t, t_cur, None, None, text, role), blocks=blocks)
        return x.transpose(1, 2).unflatten(2, (z_t.shape[-2] // 2, z_t.shape[-1] // 2))

    def _inputs(self, z_t: Tensor, t_cur: Tensor, z_lq, t_tar, text: Tensor | None, role: Role) -> tuple:
        """Return the arguments of `DualBranch.begin`, with latents and text in the network's dtype."""
        dtype = self.prompt.dtype
        text = (self.prompt if text is None else text.to(dtype)).expand(len(z_t), -1, -1)
        return z_t.to(dtype), t_cur, text, None if z_lq is None else z_lq.to(dtype), t_tar, role.adapters


class DualBranch:
    """What transformers with a condition branch share; the stock class of diffusers follows it in the bases.

    The modules and state-dict keys are those of the stock model, with no additional parameters. The LoRA sets of noise
    and of condition tokens are passed to every block as an argument (`Adapters`), without masks, hooks or global state,
    so that activation checkpointing recomputes exactly what the first forward pass computed.
    """

    block_list = "transformer_blocks"  # name of the module list of blocks
    checkpoints: HostCheckpoints | None = None  # where the inputs of recomputed blocks are kept; None: on the device

    @classmethod
    def from_stock(cls, model: nn.Module) -> Self:
        """Convert a loaded stock model, quantised or not, to this class in place."""
        model.__class__ = cls
        model.upgrade()
        return model

    @abstractmethod
    def upgrade(self) -> None:
        """Convert the stock model's blocks in place."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return getattr(self, self.block_list)

    def keep(self, blocks: int) -> None:
        """Remove the blocks after the first `blocks`, which no role uses."""
        setattr(self, self.block_list, self.blocks[:blocks])

    @abstractmethod
    def begin(
        self,
        z_BChw: Tensor,
        t_cur: Tensor,
        text_BTD: Tensor,
        cond: Tensor | None = None,
        t_tar: Tensor | None = None,
        adapters: Adapters = STUDENT.adapters,
        blocks: int | None = None,
    ) -> Pass:
        """Return a call up to the first block.

        text_BTD: the prompt embedding. cond: the LQ latent [B, C, h, w] at time t_tar; without it the network is the
        stock model. adapters: the LoRA sets of noise and of condition tokens.
        """

    def forward(self, *inputs: Any, blocks: int | None = None) -> Tensor:
        """Return the velocity [B, C, h, w], or with `blocks` the noise tokens [B, L, D] after so many blocks.

        The other arguments are those of `begin`.
        """
        call = self.begin(*inputs, blocks=blocks)
        tokens = call.tokens
        for i, block in enumerate(self.blocks[:blocks]):
            tokens = self.run_block(block, *tokens, **call.others(i))
        return call.end(tokens)

    def run_block(self, block: nn.Module, *arguments: Any, **others: Any) -> Any:
        """Run a block, recomputed in the backward pass if activation checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            with nullcontext() if self.checkpoints is None else self.checkpoints.hooks():
                return checkpoint(block, *arguments, use_reentrant=False, **others)
        return block(*arguments, **others)

    def load_lora_adapter(self, *args, adapter_name: str = DEFAULT_SET, **kwargs) -> None:
        """Load a LoRA as diffusers does, by default into the student's set, which acts on condition tokens."""
        super().load_lora_adapter(*args, adapter_name=adapter_name, **kwargs)
        upgrade_lora(self)

    def fuse_lora(self, *args, **kwargs) -> None:
        """Raise RuntimeError: fusing is not supported, because it would change the noise tokens too."""
        raise RuntimeError(
            "this LoRA applies to condition tokens only and cannot be fused into the base weights, because that would "
            "change the noise tokens too"
        )


class DualBlock:
    """What blocks with condition tokens share; the stock class of diffusers follows it in the bases."""

    fetch: Callable[[], None] | None = None  # makes the weights readable, if the block is swapped (swapping.py)

    def forward(self, *tokens: Tensor | None, **others: Any) -> Tokens:
        """Fetch the block's weights if it is swapped, and return the result of `compute`."""
        if self.fetch is not None:
            self.fetch()
        return self.compute(*tokens, **others)

    @abstractmethod
    def compute(self, *tokens: Tensor | None, **others: Any) -> Tokens:
        """Return the tokens after the block."""


class Attention:
    """What attention processors share: softmax attention through diffusers' dispatcher."""

    _attention_backend = None  # set by diffusers' `set_attention_backend`
    _parallel_config = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q, k and v, each [B, *, H, E], to [B, queries, D]."""
        out = dispatch_attention_fn(q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config)
        return out.flatten(2, 3).to(q.dtype)


def heads(attn: nn.Module, x_BLD: Tensor) -> Tensor:
    """[B, L, D] -> [B, L, H, E]."""
    return x_BLD.unflatten(-1, (-1, attn.inner_dim // attn.heads))


def rms(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Apply diffusers' RMSNorm as one fused operation: equal in fp32, and rounded once instead of twice in bf16."""
    return x if norm is None else F.rms_norm(x, norm.dim, norm.weight, norm.eps)
