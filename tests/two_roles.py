"""A test method with three roles on one base: a student, a critic and a frozen teacher.

The critic is trained at another learning rate and on fewer blocks. The student learns from pixels, through the critic,
and from the teacher's velocity; the critic learns to tell the student's results from real latents. The method is
written twice: as a `Method` of the framework, and as a plain PyTorch loop that shares no helper with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from teasr import run_config
from teasr.backbones.model import Condition, Model
from teasr.backbones.roles import STUDENT, Role
from teasr.data.batch import Batch
from teasr.diffusion import flow, losses
from teasr.methods.base import Loss, Method, Progress
from teasr.methods.sampler import AnyStep, Sampler
from teasr.util.randomness import Draws


@dataclass(frozen=True)
class TwoRolesConfig:
    """Loss weights, and how the critic differs from the student."""

    lambda_adv: float = 0.5
    lambda_teacher: float = 0.3
    critic_rate: float = 3.0
    critic_clip: float | None = 0.2
    critic_blocks: int = 1
    critic_base: str = "main"
    copies: bool = False  # give each role its own copy of the base
    leak: bool = False  # inject the fault that the tests must detect: a plain backward pass through the critic


class TwoRoles(Method):
    """The losses, written with the framework's helpers."""

    def roles(self) -> tuple[Role, ...]:
        c = self.config
        critic = Role(
            "critic", base=c.critic_base, copy="critic" if c.copies else "", rate=c.critic_rate,
            clip_norm=c.critic_clip, branches="single", blocks=c.critic_blocks, head=True, rank=2,
        )  # fmt: skip
        teacher = Role("teacher", copy="teacher" if c.copies else "", trains="nothing", branches="single")
        return STUDENT, critic, teacher

    def sampler(self) -> Sampler:
        return AnyStep()

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        return {"mse": 1.0, "generator": self.config.lambda_adv, "critic": 1.0}

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        student, critic, teacher = (models[name] for name in ("student", "critic", "teacher"))
        with torch.no_grad():
            z_hq, z_lq = student.encode(batch.x_hq), student.encode(batch.x_lq)
        eps, noise = draws.normal("eps", z_lq), draws.normal("noise", z_lq)
        t, one = student.snap(draws.uniform("t", 0.1, 0.9)), torch.ones(len(eps))
        v = student.velocity(eps, one, Condition(z_lq, 0 * one))
        z_hat = eps - v

        def adversarial(z):
            return F.softplus(-critic.logits(flow.interpolate(z, noise, t), t)).mean()

        with torch.no_grad():
            z_t = flow.interpolate(z_hat, noise, t)
            guide = (z_t - t.view(-1, 1, 1, 1) * teacher.velocity(z_t, t) - z_hat) / z_hat.numel()
        mse, g_pixels = losses.gradient_through(lambda z: losses.mse(student.decode(z), batch.x_hq), z_hat)
        adv, g_adv = losses.gradient_through(adversarial, z_hat)
        gradient = g_pixels + self.config.lambda_adv * g_adv - self.config.lambda_teacher * guide
        value = (z_hat * gradient).sum()
        if self.config.leak:
            value = (z_hat * (gradient - self.config.lambda_adv * g_adv)).sum() + self.config.lambda_adv * adversarial(
                z_hat
            )
        z_fake = z_hat.detach()
        yield Loss("generator", "student", value, {"mse": mse, "generator": adv})
        del v, z_hat, value
        real, fake = (critic.logits(flow.interpolate(z, noise, t), t) for z in (z_hq, z_fake))
        value = F.softplus(-real).mean() + F.softplus(fake).mean()
        yield Loss("critic", "critic", value, {"critic": value.detach()})


run_config.METHODS["two_roles"] = lambda: (TwoRolesConfig, TwoRoles)


def plain_losses(c: TwoRolesConfig, backbones: dict, batch: Batch, draws: Draws) -> tuple[dict, dict]:
    """The total loss of each role, as one graph derived directly from the equations, and the values to log."""
    student, critic, teacher = backbones["student"], backbones["critic"], backbones["teacher"]
    roles = {role.name: role for role in TwoRoles(c).roles()}
    z_hq, z_lq = student.encode(batch.x_hq), student.encode(batch.x_lq)
    eps, t, noise = draws.normal("eps", z_lq), draws.uniform("t", 0.1, 0.9), draws.normal("noise", z_lq)
    t4, one = t[:, None, None, None], torch.ones(len(eps))
    z_hat = eps - student.net(eps, one, z_lq, 0 * one, role=roles["student"])

    def logits(z):
        return critic.net((1 - t4) * z + t4 * noise, t, role=roles["critic"], part="logits")

    z_t = ((1 - t4) * z_hat + t4 * noise).detach()
    guide = (z_t - t4 * teacher.net(z_t, t, role=roles["teacher"])).detach()
    mse = (student.decode(z_hat) - batch.x_hq).square().mean()
    adv = torch.log1p(torch.exp(-logits(z_hat))).mean()
    toward = 0.5 * (z_hat - guide).square().mean()
    adversary = torch.log1p(torch.exp(-logits(z_hq))).mean() + torch.log1p(torch.exp(logits(z_hat.detach()))).mean()
    total = {"student": mse + c.lambda_adv * adv + c.lambda_teacher * toward, "critic": adversary}
    return total, {"mse": mse, "generator": adv, "critic": adversary}


def plain_torch(config, shards_batches, updates: int) -> tuple[list[dict], dict[str, dict]]:
    """Train without the framework; return the logged values of each update and the final trained weights by role."""
    c, train, roles = config.method, config.train, TwoRoles(config.method).roles()
    if c.copies:
        backbones = {role.name: config.build_backbone((role,)) for role in roles}
    else:
        shared = [role for role in roles if role.base == "main"]
        backbones = {role.name: config.build_backbone(shared) for role in shared[:1]}
        backbones |= {role.name: backbones["student"] for role in shared}
        backbones |= {role.name: config.build_backbone((role,)) for role in roles if role.base != "main"}
    shards_batches.fit(backbones)
    trained = {role.name: backbones[role.name].trained(role.name) for role in roles[:2]}
    rates = {"student": 1.0, "critic": c.critic_rate}
    clips = {"student": train.clip_norm, "critic": train.clip_norm if c.critic_clip is None else c.critic_clip}
    optimizers = {
        name: torch.optim.AdamW(
            own.values(), lr=train.learning_rate * rates[name], betas=train.betas, weight_decay=train.weight_decay,
        )
        for name, own in trained.items()
    }  # fmt: skip
    found = []
    for update in range(updates):
        batches = shards_batches.of(update)
        logs: dict[str, float] = {}
        grads = {name: [torch.zeros_like(p) for p in own.values()] for name, own in trained.items()}
        for i, batch in enumerate(batches):
            n = len(batch.keys)
            draws = Draws(config.seed, update, tuple(range(i * n, (i + 1) * n)))
            totals, values = plain_losses(c, backbones, batch, draws)
            for name, own in trained.items():
                for g, more in zip(
                    grads[name], torch.autograd.grad(totals[name], list(own.values()), retain_graph=True), strict=True
                ):
                    g += more / len(batches)
            logs = {name: logs.get(name, 0) + float(value.detach()) / len(batches) for name, value in values.items()}
        for name, own in trained.items():
            for p, g in zip(own.values(), grads[name], strict=True):
                p.grad = g
            logs[f"grad_norm/{name}"] = float(torch.nn.utils.clip_grad_norm_(own.values(), clips[name]))
            optimizers[name].step()
        found.append(logs)
    return found, {name: {n: p.detach() for n, p in own.items()} for name, own in trained.items()}


class OneSided(TwoRoles):
    """A faulty method that yields no loss for its critic."""

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        yield next(super().losses(models, batch, draws, progress))


run_config.METHODS["one_sided"] = lambda: (TwoRolesConfig, OneSided)
