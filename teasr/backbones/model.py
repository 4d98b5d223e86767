"""`Model`, the interface through which methods call a role, and `Condition`, the inputs of its velocity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teasr.backbones.base import Backbone, Part
from teasr.backbones.memory.sweeps import Sweeps
from teasr.backbones.roles import STUDENT, Role
from teasr.diffusion import flow

# embeddings of prompts: [B, T, D], one for all samples [1, T, D], or B times [1, T, D] where T may differ
Text = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Condition:
    """Inputs of a velocity prediction besides the noised latent and its time.

    Passing an input that the role's branch layout does not use is an error.
    """

    z_lq: Tensor | None = None  # [B, C, h, w], latent of the LQ image; dual-branch roles only
    t_tar: Tensor | None = None  # [B] in [-1, 1], time of the condition branch; dual-branch roles only
    text: Text | None = None  # prompt embeddings; None: those of `Model.with_text`, or the backbone's prompt
    null_text: Tensor | None = None  # [1, T, D], embedding of the null prompt, for guidance
    guidance: float | Tensor = 1.0  # classifier-free guidance: v_null + guidance (v_text - v_null); a number or [B]


NOTHING = Condition()


@dataclass(frozen=True)
class Call:
    """The arguments of a velocity prediction that shares its sweep over the blocks with others."""

    z_t: Tensor  # [B, C, h, w]
    t_cur: Tensor  # [B]
    condition: Condition
    graph: bool = True  # whether the velocity gets a gradient


class Model:
    """One role, as methods call it. Times are float32 [B]: t_cur in [0, 1] (0 clean, 1 noise), t_tar in [-1, 1]."""

    def __init__(self, backbone: Backbone, role: Role = STUDENT, text: Text | None = None):
        """text: see `with_text`."""
        self.backbone, self.role, self.text = backbone, role, text

    def with_text(self, text: Text | None) -> Model:
        """Return the role with other default prompts: the captions of a batch, or None for the backbone's prompt.

        Several copies of the batch, one behind another, may share a call: the captions repeat.
        """
        return Model(self.backbone, self.role, text)

    @property
    def patch_px(self) -> int:
        """Image pixels per token, along each side."""
        return self.backbone.patch_px

    @property
    def pixel_multiple(self) -> int:
        """Image height and width must be divisible by this number."""
        return self.backbone.pixel_multiple

    @property
    def sees_pixels(self) -> bool:
        """Whether the network takes pictures [B, 3, H, W] instead of latents."""
        return self.backbone.sees_pixels

    @property
    def null_text(self) -> Tensor | None:
        """Embedding of the backbone's null prompt [1, T, D], or None if it has none."""
        return self.backbone.null_text

    def require_prior(self) -> None:
        """Raise ValueError unless the base, without the LQ image, is a trained model of images."""
        if not self.backbone.has_prior:
            raise ValueError(
                f"role {self.role.name} is a score that does not see the LQ image, but the weights of this "
                f"{type(self.backbone).__name__} were never trained without one: use the backbone tiny with a prior "
                "(backbone.base=small-prior), or one of diffusers (sd_unet, sd3, z_image, qwen_image)"
            )

    def snap(self, t: Tensor) -> Tensor:
        """Round times to the values that the network can distinguish."""
        return self.backbone.snap(t)

    def time_at(self, u: Tensor) -> Tensor:
        """Return the times at shares u in [0, 1] of the noise schedule with which the network was trained."""
        return self.backbone.time_at(u)

    def start_from(self, z_lq: Tensor, t: Tensor) -> Tensor:
        """Return the state at time t [B] that has the LQ latent in the place of the noised one."""
        return self.backbone.start_from(z_lq, t)

    def encode_lq(self, x: Tensor) -> Tensor:
        """Encode LQ images [B, 3, H, W] in [-1, 1] to their latents, or to what the role's encoder adapter takes."""
        return self.backbone.encoder_input(x) if self.role.encoder else self.backbone.encode(x)

    def encode(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to latents [B, C, h, w].

        With a time t [B], also apply the role's encoder adapter at that time.
        """
        return self.backbone.encode(x) if t is None else self.adapt(self.encode_lq(x), t)

    def adapt(self, z_lq: Tensor, t: Tensor) -> Tensor:
        """Apply the role's time-aware encoder adapter at time t [B] to the result of `encode_lq`; returns latents.

        Raises ValueError for a role without an encoder adapter.
        """
        if not self.role.encoder:
            raise ValueError(
                f"role {self.role.name} has no encoder adapter: encode without a time, or set encoder=True in its Role"
            )
        return self.backbone.call(self.role, "encoder", z_lq, t)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to images; differentiable, and not clamped."""
        return self.backbone.decode(z)

    def velocity(self, z_t: Tensor, t_cur: Tensor, condition: Condition = NOTHING) -> Tensor:
        """Predict the velocity at z_t [B, C, h, w], in fp32 or higher precision.

        For dual-branch roles, t_tar = t_cur requests the instantaneous velocity, 0 <= t_tar < t_cur the average
        velocity of the jump t_cur -> t_tar, and t_tar = -t_cur the velocity of the fake trajectory (TEASR sec. 3.2,
        3.4). Guidance requires a second evaluation with the null prompt. Raises ValueError for a condition that does
        not match the role's branch layout.
        """
        self._check(c := condition)
        v = self._call("velocity", z_t, t_cur, c)
        if isinstance(c.guidance, float | int) and c.guidance == 1:
            return v
        if c.text is None or c.null_text is None:
            raise ValueError("guidance != 1 needs two prompts: give text and null_text")
        null = self.velocity(z_t, t_cur, replace(c, text=c.null_text, guidance=1.0))
        g = torch.as_tensor(c.guidance, dtype=v.dtype, device=v.device)
        return null + g.reshape(-1, 1, 1, 1) * (v - null)

    def sweeps(self) -> Sweeps:
        """Begin the sweeps of one loss, in which several calls pass through each block together.

        Raises ValueError if the backbone cannot do that.
        """
        return self.backbone.sweeps()

    def velocities(self, sweeps: Sweeps, calls: Mapping[str, Call]) -> dict[str, Tensor]:
        """Predict the velocities of several calls in one forward sweep, by the names of the calls.

        They get their gradients from `sweeps.joined(loss)`. Guidance is not supported.
        """
        passes = {}
        for name, call in calls.items():
            self._check(call.condition)
            with torch.set_grad_enabled(call.graph):
                rows = self._rows(call.z_t, call.t_cur, call.condition)
                passes[name] = [sweeps.begin(*row, self.role) for row in rows]
        found = iter(sweeps.run([p for own in passes.values() for p in own]))
        joined = {name: _joined([next(found) for _ in own]) for name, own in passes.items()}
        return {name: v if v.dtype == calls[name].z_t.dtype else v.float() for name, v in joined.items()}

    def _call(self, part: Part, z_t: Tensor, t: Tensor, c: Condition = NOTHING) -> Tensor:
        """Call the network; in one pass, or sample by sample if the texts may have different numbers of tokens."""
        return _joined([self.backbone.call(self.role, part, *row) for row in self._rows(z_t, t, c)])

    def _rows(self, z_t: Tensor, t: Tensor, c: Condition) -> list[tuple[Tensor | None, ...]]:
        """Return the arguments z_t, t_cur, z_lq, t_tar, text of each pass."""
        text, inputs = self.text if c.text is None else c.text, (z_t, t, c.z_lq, c.t_tar)
        if text is None or len(text) == 1:
            return [(*inputs, text[0] if isinstance(text, tuple) else text)]
        times = len(z_t) // len(text)
        assert times * len(text) == len(z_t), f"{len(text)} captions for {len(z_t)} samples"
        if isinstance(text, Tensor):
            return [(*inputs, text.repeat(times, 1, 1))]
        columns = ([None] * len(z_t) if x is None else x.split(1) for x in inputs)
        return list(zip(*columns, text * times, strict=True))

    def _check(self, c: Condition) -> None:
        """Raise ValueError for a condition that does not match the role's branch layout."""
        role = self.role
        if role.blocks is not None:
            raise ValueError(
                f"role {role.name} uses only blocks 1 to {role.blocks}: it returns features, not a velocity; "
                "set blocks=None in its Role for a velocity"
            )
        if (role.branches == "dual") != (c.z_lq is not None) or (c.z_lq is None) != (c.t_tar is None):
            must = "must contain z_lq and t_tar" if role.branches == "dual" else "must contain neither z_lq nor t_tar"
            raise ValueError(f"role {role.name} is {role.branches}-branch: its condition {must}")

    def coarse(self, z_lq: Tensor) -> tuple[Tensor, Tensor]:
        """Return a coarse restoration of z_lq and the log standard deviation of its error, [B, C, h, w] each.

        Raises ValueError for a backbone that has none.
        """
        return self.backbone.call(self.role, "coarse", z_lq, z_lq.new_zeros(len(z_lq))).chunk(2, dim=1)

    def jump_from_coarse(self, z_lq: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noise the coarse restoration of z_lq to time t [B] and jump from there to the image, [B, C, h, w].

        z = z_t - t v(z_t, t, z_lq, 0) with z_t = (1 - t) coarse + t eps. Raises ValueError like `coarse`.
        """
        z_t = flow.interpolate(self.coarse(z_lq)[0], eps, t)
        return flow.z0_from_velocity(z_t, self.velocity(z_t, t, Condition(z_lq, torch.zeros_like(t))), t)

    def features(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the tokens after block k = `role.blocks` (default: the last) as a feature map [B, D, h', w'].

        Raises ValueError for a dual-branch role.
        """
        self._require_single_branch("features")
        return self._call("features", z_t, t)

    def logits(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Return one logit per feature token, fp32 [B, h', w']. Raises ValueError for a role without a head."""
        if not self.role.head:
            raise ValueError(f"role {self.role.name} has no head: set head=True in its Role")
        self._require_single_branch("logits")
        return self._call("logits", z_t, t)

    def _require_single_branch(self, what: str) -> None:
        if self.role.branches != "single":
            raise ValueError(
                f"role {self.role.name} is dual-branch: {what} are available only for roles with branches=single"
            )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
