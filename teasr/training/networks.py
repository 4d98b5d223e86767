"""The networks of a run: its bases in memory, and the roles on them as models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from teasr.backbones.base import Backbone
from teasr.backbones.model import Model
from teasr.backbones.roles import FIRST, Role, places
from teasr.methods.base import Method
from teasr.run_config import RunConfig

Place = tuple[str, str]  # base and copy


class Networks:
    """All bases of a run by place, and a model for each role."""

    def __init__(self, config: RunConfig, method: Method):
        """Build everything with its initial weights. ValueError when files lack or roles do not fit."""
        self.roles = {role.name: role for role in method.roles()}
        self.bases = {place: config.build_backbone(roles) for place, roles in places(method.roles()).items()}
        self.models = {name: Model(self.bases[role.place], role) for name, role in self.roles.items()}
        self.student: Backbone = self.bases[self.roles[FIRST].place]

    @property
    def trained_roles(self) -> list[Role]:
        """Roles with anything to train."""
        return [role for role in self.roles.values() if role.trains != "nothing"]

    @property
    def trained_bases(self) -> dict[Place, Backbone]:
        """Bases with such a role: those that get an engine."""
        found = {role.place for role in self.trained_roles}
        return {place: base for place, base in self.bases.items() if place in found}

    def base(self, role: str) -> Backbone:
        """The base that a role lives on."""
        return self.bases[self.roles[role].place]

    def share_codec(self) -> None:
        """Give the student's fitted codec to the other bases, whose latents must mean the same. ValueError where they cannot."""
        for (section, _), base in self.bases.items():
            if base is self.student:
                continue
            if section == "main":
                base.load_fixed_state(self.student.fixed_state())
            else:
                base.share_codec(self.student)

    def place_frozen(self, device: torch.device, each: Callable = lambda part: None) -> None:
        """Move the bases that no role trains; they have no engine, no optimiser state and no place in checkpoints."""
        for place, base in self.bases.items():
            if place not in self.trained_bases:
                base.net.requires_grad_(False)
                base.to(device, each)
