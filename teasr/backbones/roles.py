"""Roles: the networks of a method, named as in its paper, and which of them share weights.

A base is a set of loaded weights: the section `backbone:` of the config is the base `main`, `prior:` is a second one. A
role is one network on a base. Roles on the same base share its frozen weights and differ in their adapter set. The
adapter set for each group of tokens is passed down to every Linear as an argument and is never global state, so that
activation checkpointing recomputes with the same adapters as the first forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FIRST = "student"  # the role that every method has; EMA, previews, export and restoration use it
DEFAULT_SET = "default"  # the student's adapter set; peft and diffusers use this name for a single adapter


@dataclass(frozen=True)
class Adapters:
    """The adapter sets that act on noise and on condition tokens; None: base weights only."""

    noise: str | None = None
    condition: str | None = None


@dataclass(frozen=True)
class Role:
    """One network of a method: student, fake score, teacher, discriminator."""

    name: str
    base: Literal["main", "prior"] = "main"  # which base its weights come from: config section `backbone:` or `prior:`
    copy: str = ""  # roles with the same base and copy share weights; a different name creates another copy in memory
    # adapter: its LoRA set, encoder adapter and head, and the base weights too if the base's config sets `train: full`
    trains: Literal["adapter", "head", "nothing"] = "adapter"
    rate: float = 1.0  # factor on train.learning_rate
    clip_norm: float | None = None  # maximum norm of this role's gradient; None: train.clip_norm
    # dual: noise tokens at t_cur attend to condition tokens (z_lq) at t_tar, and the adapter acts on the condition
    # tokens; single: noise tokens only, and the adapter acts on them
    branches: Literal["dual", "single"] = "dual"
    blocks: int | None = None  # k: run only blocks 1..k and return features instead of a velocity
    head: bool = False  # add a head with one logit per feature token
    # add a time-aware adapter of the encoder or of its latents, initialised to the identity. timed: false if its time
    # is always the same, so that adapters inside an encoder need no modulation by it
    encoder: bool = False
    timed: bool = True
    rank: int | None = None  # rank of its LoRA; None: the backbone's lora_rank

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name == DEFAULT_SET:
            raise ValueError(
                f"role name {self.name!r} is not allowed: use lower-case letters, digits and _, start with a letter, "
                f"and do not use `{DEFAULT_SET}`"
            )
        if self.rate <= 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError(f"role {self.name}: rate = {self.rate} and clip_norm = {self.clip_norm} must be > 0")
        if self.branches == "dual" and (self.blocks is not None or self.head):
            raise ValueError(f"role {self.name}: blocks and head require a single branch: set branches=single")
        if self.trains == ("nothing" if self.head else "head"):
            cure = "set trains=head or trains=adapter" if self.head else "set head=True or another value of trains"
            raise ValueError(
                f"role {self.name}: head = {self.head} cannot be combined with trains = {self.trains}: {cure}"
            )

    @property
    def place(self) -> tuple[str, str]:
        """(base, copy): roles with the same place share weights."""
        return self.base, self.copy

    @property
    def is_trained(self) -> bool:
        """Whether it has trainable parameters."""
        return self.trains != "nothing"

    @property
    def adapter_set(self) -> str | None:
        """Name of its LoRA set in the network's parameters, or None if it has no LoRA."""
        if self.trains != "adapter":
            return None
        return DEFAULT_SET if self.name == FIRST else self.name

    @property
    def adapters(self) -> Adapters:
        """The tokens that its LoRA acts on: noise tokens if single-branch, condition tokens if dual-branch."""
        single = self.branches == "single"
        return Adapters(self.adapter_set if single else None, None if single else self.adapter_set)


STUDENT = Role(FIRST)


def check_roles(roles: Sequence[Role]) -> None:
    """Raise ValueError if the roles of a method are not a valid combination."""
    names = [role.name for role in roles]
    if not roles or names[0] != FIRST or roles[0].trains != "adapter" or roles[0].place != ("main", ""):
        raise ValueError(
            f"the first role of a method must be named `{FIRST}`, with trains=adapter, base=main and no copy; got "
            f"{names}"
        )
    if roles[0].blocks is not None:
        raise ValueError(
            f"role {FIRST} restores images and needs all blocks: set blocks=None instead of {roles[0].blocks}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"roles {names}: every role needs a unique name")


def places(roles: Sequence[Role]) -> dict[tuple[str, str], list[Role]]:
    """Group roles by place: (base, copy) -> its roles, in order."""
    found: dict[tuple[str, str], list[Role]] = {}
    for role in roles:
        found.setdefault(role.place, []).append(role)
    return found


def blocks_seen(roles: Sequence[Role]) -> int | None:
    """Return how many blocks of a base its roles need, or None if one of them uses all blocks."""
    seen = [role.blocks for role in roles]
    return None if None in seen else max(seen, default=None)
