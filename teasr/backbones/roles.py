"""Roles: the networks of a method as its paper names them, and which of them share weights.

A base is a set of loaded weights: `backbone:` of the configuration is the base `main`, `prior:` a second one. A role is one network on a base.
Roles on the same base share its frozen weights and differ by their adapter set. Which set acts on which tokens travels as an argument down to
each Linear, never as a switch: recomputed activations, which come at backward time, then see what the first pass saw.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FIRST = "student"  # the role that every method has: averaged, previewed, exported, restored with
DEFAULT_SET = "default"  # its adapter set, by the name that peft and diffusers give to the only one


@dataclass(frozen=True)
class Adapters:
    """Which adapter set acts on which tokens; None: the base weights alone."""

    noise: str | None = None
    condition: str | None = None


@dataclass(frozen=True)
class Role:
    """One network of a method: student, fake score, teacher, discriminator."""

    name: str
    base: Literal["main", "prior"] = "main"  # the section of the configuration that its weights come from
    copy: str = ""  # roles with the same base and copy share weights; another name here is another copy in memory
    # adapter: its LoRA set, its encoder adapter and its head, and the base itself where the base's configuration says `train: full`
    trains: Literal["adapter", "head", "nothing"] = "adapter"
    rate: float = 1.0  # factor on train.learning_rate
    clip_norm: float | None = None  # of its own gradient; None: train.clip_norm
    # dual: noise tokens at t_cur see condition tokens (z_lq) at t_tar, and the adapter acts on the latter; single: noise tokens alone, adapted
    branches: Literal["dual", "single"] = "dual"
    blocks: int | None = None  # sees only blocks 1..k and returns features of them, no velocity
    head: bool = False  # one logit for each token of the features
    encoder: bool = False  # a time-aware adapter of the latent, z + B(z, t), which starts as the identity
    rank: int | None = None  # of its LoRA; None: that of the backbone

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name == DEFAULT_SET:
            raise ValueError(f"role {self.name!r}: a name of small letters, digits and _, and not `{DEFAULT_SET}`")
        if self.rate <= 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError(f"role {self.name}: rate {self.rate} and clip_norm {self.clip_norm} must be > 0")
        if self.branches == "dual" and (self.blocks is not None or self.head):
            raise ValueError(f"role {self.name}: features and a head are those of a single branch: set branches=single")
        if self.trains == ("nothing" if self.head else "head"):
            raise ValueError(f"role {self.name}: head = {self.head} does not go with trains = {self.trains}")

    @property
    def place(self) -> tuple[str, str]:
        """What roles that share weights have in common."""
        return self.base, self.copy

    @property
    def adapter_set(self) -> str | None:
        """Name of its LoRA set in the network's parameters; None where it has none."""
        if self.trains != "adapter":
            return None
        return DEFAULT_SET if self.name == FIRST else self.name

    @property
    def adapters(self) -> Adapters:
        """Which tokens its LoRA acts on."""
        single = self.branches == "single"
        return Adapters(self.adapter_set if single else None, None if single else self.adapter_set)


STUDENT = Role(FIRST)


def check_roles(roles: Sequence[Role]) -> None:
    """ValueError where a method's roles cannot live together."""
    names = [role.name for role in roles]
    if not roles or names[0] != FIRST or roles[0].trains != "adapter" or roles[0].place != ("main", ""):
        raise ValueError(
            f"the first role of a method is `{FIRST}`: trained, on the base `main`, first copy; got {names}"
        )
    if roles[0].blocks is not None:
        raise ValueError(f"role {FIRST} restores pictures: it sees all blocks, not {roles[0].blocks}")
    if len(set(names)) < len(names):
        raise ValueError(f"roles {names}: every role has a name of its own")


def places(roles: Sequence[Role]) -> dict[tuple[str, str], list[Role]]:
    """(base, copy) -> the roles that live there, in order."""
    found: dict[tuple[str, str], list[Role]] = {}
    for role in roles:
        found.setdefault(role.place, []).append(role)
    return found


def blocks_seen(roles: Sequence[Role]) -> int | None:
    """How many blocks of a base its roles see together; None where one of them sees all."""
    seen = [role.blocks for role in roles]
    return None if None in seen else max(seen, default=None)
