"""The networks of a run: its bases, and a `Model` for each role on them."""

from __future__ import annotations

import torch

from teasr.backbones.base import Backbone
from teasr.backbones.model import Model
from teasr.backbones.roles import FIRST, Role, places
from teasr.methods.base import Method
from teasr.run_config import RunConfig

Place = tuple[str, str]  # base and copy


class Networks:
    """All bases of a run by place (base and copy), and a model for each role."""

    def __init__(self, config: RunConfig, method: Method):
        """Build everything with its initial weights. Raises ValueError when files are missing or roles do not fit."""
        self.roles = {role.name: role for role in method.roles()}
        self.bases = {place: config.build_backbone(roles) for place, roles in places(method.roles()).items()}
        self.models = {name: Model(self.bases[role.place], role) for name, role in self.roles.items()}
        self.student: Backbone = self.bases[self.roles[FIRST].place]
        method.check_models(self.models)

    @property
    def trained_roles(self) -> list[Role]:
        """Roles that have trainable parameters."""
        return [role for role in self.roles.values() if role.is_trained]

    @property
    def trained_bases(self) -> dict[Place, Backbone]:
        """Bases with at least one trained role. Each of them gets a DeepSpeed engine."""
        found = {role.place for role in self.trained_roles}
        return {place: base for place, base in self.bases.items() if place in found}

    def base(self, role: str) -> Backbone:
        """The base that a role lives on."""
        return self.bases[self.roles[role].place]

    def share_codec(self) -> None:
        """Copy the student's fitted codec to the other bases, so that all latents share one space.

        Raises ValueError when a base cannot use it.
        """
        for (section, _), base in self.bases.items():
            if base is self.student:
                continue
            if section == "main":
                base.load_fixed_state(self.student.fixed_state())
            else:
                base.share_codec(self.student)

    def place_frozen(self, device: torch.device) -> None:
        """Freeze and move bases without trained roles. They have no engine and no optimiser state and are not saved."""
        for place, base in self.bases.items():
            if place not in self.trained_bases:
                base.net.requires_grad_(False)
                base.to(device)
