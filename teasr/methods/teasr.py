"""TEASR: self-adversarial distillation in one model with time-aware rectification (sec. 3 of the paper).

An update has four graphs. The first is that of the one-step estimate (eq. 6): the score difference (eqs. 9-10) and the
pixel losses (eqs. 12-13) at this estimate reach the network through *one* backward pass with an analytic output
gradient, since z_hat = eps - v means d z_hat / d v = -1. L_cons (eqs. 1-4), L_flow and L_adv (eqs. 7-8) follow. With
`order: losses`, only one of the graphs is in memory at a time; with `order: blocks`, all of them pass through each
block of the network together. The weights do not change in between, so the summed gradients are those of the joint loss

    L = L_flow + l_cons L_cons + l_adv L_adv + l_rectify L_rectify + l_mse L_mse + l_lpips L_lpips.

Deviations that are off by default: L_dists, L_grid, and pixel losses at re-noised results (`lambda_restart`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from teasr.backbones.model import Call, Condition, Model
from teasr.backbones.roles import STUDENT, Role
from teasr.data.batch import Batch
from teasr.diffusion import flow, losses
from teasr.methods import tiles
from teasr.methods.base import Loss, Progress, Ramp, latents, require_loss, with_captions
from teasr.methods.pixel_losses import WithMetrics, of_rows, pixel_gradient
from teasr.methods.sampler import AnyStep, Restarts, Sampler
from teasr.methods.teasr_times import Shortcut, Times
from teasr.util.randomness import Draws

WEIGHTED = ("flow", "cons", "adv", "rectify", "mse", "lpips", "dists", "grid", "restart")
PIXELS = ("mse", "lpips", "dists", "grid")
SPLIT = (("rectify", *PIXELS, "adv"), ("cons",), ("flow",), ("restart",))  # losses by part of the batch
Weight = Annotated[float, "[0, inf)"]


@dataclass(frozen=True)
class TeasrConfig:
    """Loss weights and options of TEASR; docs/method.md gives the reasons for choices that the paper leaves open."""

    lambda_flow: Weight = 1.0  # weight of L_flow
    lambda_cons: Weight = 1.0  # weight of L_cons, self-consistency
    lambda_adv: Weight = 1.0  # weight of L_adv, self-adversarial
    lambda_rectify: Weight = 0.5  # weight of L_rectify
    lambda_mse: Weight = 1.0  # weight of the squared error of the one-step result
    lambda_lpips: Weight = 1.0  # weight of LPIPS of the one-step result
    lambda_dists: Weight = 0.0  # weight of DISTS of the one-step result, on the images that LPIPS does not see
    lambda_grid: Weight = (
        0.0  # weight of L_grid: a pattern with the period of the codec's patches, which LPIPS tolerates
    )
    lambda_restart: Weight = 0.0  # factor of the weights of the pixel losses at re-noised one-step results
    lpips_net: Literal["vgg", "alex"] = "vgg"
    lpips_weights: Literal["pretrained", "random"] = "pretrained"  # random: same computation, for benchmarks
    dists_weights: Literal["pretrained", "random"] = "pretrained"
    lpips_dtype: Literal["fp32", "bf16"] = "fp32"  # and of DISTS. bf16: half the time, gradient within .5 %
    ramps: dict[str, Ramp] = field(default_factory=lambda: {"rectify": Ramp(start=1500, length=2000)})
    s_range: tuple[float, float] = (0.02, 0.98)  # s of L_rectify, t' of L_adv; near 0, 1/s diverges and +-t look alike
    # elementwise clamp of v_fake - v_real, before w(s)
    score_clamp: Annotated[float, "(0, inf)", "or null for none"] | None = 1.0
    w_cap: Annotated[float, "(0, inf)", "or null for none"] | None = None  # cap of w(s) = (1 - s)^2 / s
    time_aware: bool = True  # false: w = 1 (Table 3, without TAR)
    cons_mix: tuple[float, float, float] = (0.5, 0.25, 0.25)  # (t, s): uniform | (1, 0) | inference grid
    # step counts N of the grid pairs ((k + 1) / N, k / N)
    cons_grid: tuple[Annotated[int, "[1, inf)"], ...] = (2, 4, 8)
    cons_midpoint: Annotated[float, "(0, 1)"] = 0.5  # m = s + cons_midpoint (t - s)
    mode: Literal["all", "alternate_base", "cycle", "split"] = "all"
    # mode split: shares of the micro-batch for the one-step losses and L_adv | L_cons | L_flow | the restart loss
    split: tuple[float, float, float, float] = (0.125, 0.25, 0.5, 0.125)
    # share of the images on which LPIPS is computed, which costs more than a small network
    lpips_share: Annotated[float, "(0, 1]"] = 1.0
    # LPIPS sees the images without a random 0 .. shift rows and columns, so that its pooling leaves no grid
    lpips_shift_px: Annotated[int, "[0, inf)"] = 0
    # compute the pixel losses in tiles of this side, which saves memory on large pictures and changes no gradient
    pixel_tile_px: Annotated[int, "[64, inf)", "a multiple of 16, or null for whole pictures"] | None = None
    # losses: one after another, one graph at a time. blocks: all network calls of a micro-batch pass through each block
    # of the network together, which copies swapped weights 3 times instead of 10, and keeps the inputs of all graphs
    order: Literal["losses", "blocks"] = "losses"
    rectify_range: tuple[float, float] | None = None  # s of L_rectify; default: s_range
    restart_range: tuple[float, float] = (0.04, 0.3)  # times to which one-step results are re-noised
    # student: its negative target times are the fake score. To measure what that saves: the same network with its own
    # LoRA set on the student's base (set), or a copy of the base (copy)
    fake: Literal["student", "set", "copy"] = "student"
    sampler: Literal["ode", "restart"] = "ode"  # restoring in several steps: Algorithm 1, or restarts of the last jump

    @property
    def uses_dists(self) -> bool:
        """Whether a loss needs the DISTS network."""
        return self.lambda_dists > 0

    def __post_init__(self):
        for name in WEIGHTED:
            if getattr(self, f"lambda_{name}") < 0:
                raise ValueError(
                    f"method.lambda_{name} = {getattr(self, f'lambda_{name}')}: a loss weight must be >= 0"
                )
        require_loss(self, WEIGHTED)
        unknown = sorted(set(self.ramps) - set(WEIGHTED))
        if unknown:
            raise ValueError(f"method.ramps.{unknown[0]}: there is no such loss; the losses are {', '.join(WEIGHTED)}")
        for name in ("s_range", "rectify_range", "restart_range"):
            low, high = getattr(self, name) or self.s_range
            if not 0 < low < high <= 1:
                raise ValueError(
                    f"method.{name} = {getattr(self, name)}: must be [low, high] with 0 < low < high <= 1, such as "
                    "[0.02, 0.98]"
                )
        if abs(sum(self.split) - 1) > 1e-6 or min(self.split) < 0 or not 0 < self.lpips_share <= 1:
            raise ValueError(
                f"method.split = {self.split}: must be four numbers >= 0 with sum 1; method.lpips_share = "
                f"{self.lpips_share}: must be in (0, 1]"
            )
        if self.pixel_tile_px is not None and (self.pixel_tile_px < 64 or self.pixel_tile_px % tiles.LPIPS_STRIDE):
            raise ValueError(
                f"method.pixel_tile_px = {self.pixel_tile_px}: must be a multiple of {tiles.LPIPS_STRIDE} that is at "
                "least 64, such as 256, or null"
            )
        if self.lambda_dists and self.lambda_lpips and self.lpips_share == 1:
            raise ValueError(
                f"method.lambda_dists = {self.lambda_dists} acts on the images that LPIPS does not see, of which "
                "method.lpips_share = 1 leaves none: set method.lpips_share=0.5, or one of both weights to 0"
            )
        if self.pixel_tile_px is not None and self.lambda_lpips and self.lpips_net != "vgg":
            raise ValueError(
                f"method.pixel_tile_px = {self.pixel_tile_px} needs LPIPS on VGG16, whose features are aligned with "
                "the tiles: set method.lpips_net=vgg, or method.pixel_tile_px=null"
            )
        for name in ("lambda_grid", "lambda_dists"):
            if self.pixel_tile_px is not None and getattr(self, name):
                raise ValueError(
                    f"method.{name} = {getattr(self, name)} needs whole pictures: set method.pixel_tile_px=null, or "
                    f"method.{name}=0"
                )
        if self.lambda_restart and not (self.lambda_mse or self.lambda_lpips):
            raise ValueError("method.lambda_restart > 0 needs method.lambda_mse or method.lambda_lpips > 0")
        if abs(sum(self.cons_mix) - 1) > 1e-6 or min(self.cons_mix) < 0:
            raise ValueError(
                f"method.cons_mix = {self.cons_mix}: must be three numbers >= 0 with sum 1, such as [0.5, 0.25, 0.25]"
            )
        if self.fake != "student" and not self.lambda_adv:
            raise ValueError(
                f"method.fake = {self.fake} is trained by L_adv: set method.lambda_adv above 0, or method.fake=student"
            )
        if self.fake != "student" and self.order == "blocks":
            raise ValueError(
                f"method.order = blocks has all calls in one network, but method.fake = {self.fake}: set "
                "method.order=losses, or method.fake=student"
            )
        if not 0 < self.cons_midpoint < 1:
            raise ValueError(f"method.cons_midpoint = {self.cons_midpoint}: must be in (0, 1); the paper uses 0.5")
        if not self.cons_grid or min(self.cons_grid) < 1:
            raise ValueError(f"method.cons_grid = {self.cons_grid}: must be step counts >= 1, such as [2, 4, 8]")


class Teasr(WithMetrics):
    """TEASR on one network, the student, which acts as generator, real score and, by default, fake score."""

    def __init__(self, config: TeasrConfig, lpips: nn.Module | None = None, dists: nn.Module | None = None):
        super().__init__(config, lpips, dists)
        self.cycle = 4 if config.mode == "cycle" else 1
        self.by_block = config.order == "blocks"
        self.one_backward = self.by_block and config.mode != "split"

    def roles(self) -> tuple[Role, ...]:
        fake = self.config.fake
        return (STUDENT,) if fake == "student" else (STUDENT, Role("fake", copy="fake" if fake == "copy" else ""))

    def check_models(self, models: Mapping[str, Model]) -> None:
        """Raise ValueError for a backbone that cannot compute block by block, if the config asks for that."""
        if self.by_block:
            models["student"].sweeps()

    def sampler(self) -> Sampler:
        return Restarts() if self.config.sampler == "restart" else AnyStep()

    def loss_weights(self, progress: Progress) -> dict[str, float]:
        """Return the factor of each loss at this point of the run: its lambda times its ramp."""
        return {
            name: getattr(self.config, f"lambda_{name}")
            * (self.config.ramps[name].factor(progress) if name in self.config.ramps else 1.0)
            for name in WEIGHTED
        }

    def losses(self, models: Mapping[str, Model], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Loss]:
        """Yield up to four losses. Losses with zero weight, and anything only they need, are not computed."""
        weight = self._select(self.loss_weights(progress), draws, progress)
        for part, own in self._parts(len(batch.keys), weight):
            data, rows = {name: weight[name] for name in PIXELS}, batch.rows(part)
            yield from self._losses(with_captions(models, rows), rows, draws.rows(part), own, data)

    def _parts(self, n: int, weight: dict[str, float]) -> Iterator[tuple[slice, dict[str, float]]]:
        """Yield the rows of the batch and the loss weights for them: one part, or those of mode `split`.

        Deviation: in mode `split`, different images serve different losses, each as a mean over its own images.
        """
        if self.config.mode != "split":
            yield slice(0, n), weight
            return
        ends = [round(n * sum(self.config.split[: i + 1])) for i in range(len(SPLIT))]
        for first, end, names in zip([0, *ends], ends, SPLIT, strict=False):
            own = {name: value if name in names else 0.0 for name, value in weight.items()}
            if any(own.values()):
                if first == end:
                    raise ValueError(
                        f"method.split = {self.config.split} leaves no image of a micro-batch of {n} to the losses "
                        f"{', '.join(names)}: raise their share or train.micro_batch, or set their weights to 0"
                    )
                yield slice(first, end), own

    def _losses(
        self,
        models: Mapping[str, Model],
        batch: Batch,
        draws: Draws,
        weight: dict[str, float],
        data: dict[str, float],
    ) -> Iterator[Loss]:
        student, fake = models["student"], "student" if self.config.fake == "student" else "fake"
        z0, z_lq = latents(student, batch)
        times, eps = Times.draw(self.config, draws, student), draws.normal("flow noise", z0)
        factors = batch.perceptual
        inputs = StepInputs(student, models[fake], batch.x_hq, z0, z_lq, eps, draws, times, weight, data, factors)
        shortcut = Shortcut(flow.interpolate(z0, eps, times.t), times.t, times.m, times.s) if weight["cons"] else None
        if self.by_block:
            yield self._by_block(inputs, shortcut)
        else:
            yield from self._one_by_one(inputs, shortcut)

    def _one_by_one(self, inputs: StepInputs, shortcut: Shortcut | None) -> Iterator[Loss]:
        """Yield the losses, each with its own graph."""
        weight, z_fake, target = inputs.weight, None, None
        if weight["restart"]:
            with torch.no_grad():
                z_t, t = self._own_state(inputs, estimate(inputs, inputs.velocity(one_step_call(inputs))))
            yield self._restart(inputs, z_t, t, inputs.velocity(jump_to_image(inputs, z_t, t)))

        if inputs.has_one_step:
            v = inputs.velocity(one_step_call(inputs))
            z_fake = estimate(inputs, v)
            difference, target = self._score_difference(inputs, z_fake, shortcut)
            yield self._one_step(inputs, v, z_fake, difference)
            del v
        elif weight["adv"]:
            with torch.no_grad():
                z_fake = estimate(inputs, inputs.velocity(one_step_call(inputs)))

        if shortcut is not None:
            if target is None:
                with torch.no_grad():
                    target = second_half(inputs, shortcut, inputs.velocity(shortcut.to_m(inputs.z_lq)))
            # eq. 4; the target carries no gradient
            yield velocity_loss("cons", weight, inputs.velocity(shortcut.to_s(inputs.z_lq)), target)

        if weight["flow"]:
            call, target = flow_call(inputs)
            yield velocity_loss("flow", weight, inputs.velocity(call), target)

        if weight["adv"]:
            call, target = adv_call(inputs, z_fake)
            v = inputs.fake.velocity(call.z_t, call.t_cur, call.condition)
            yield velocity_loss("adv", weight, v, target, "student" if inputs.fake is inputs.student else "fake")

    def _by_block(self, inputs: StepInputs, shortcut: Shortcut | None) -> Loss:
        """Return all losses as one, whose network calls pass through each block together.

        The first forward sweep has the calls that depend on the data alone, the second those that need its results: the
        one-step estimate and the middle of the shortcut. Two forward sweeps are therefore the fewest.
        """
        weight, z_lq, targets = inputs.weight, inputs.z_lq, {}
        sweeps, calls = inputs.student.sweeps(), {}
        if inputs.has_one_step or weight["adv"] or weight["restart"]:
            calls["one_step"] = replace(one_step_call(inputs), graph=inputs.has_one_step)
        if shortcut is not None:
            calls |= {"cons": shortcut.to_s(z_lq), "to_m": replace(shortcut.to_m(z_lq), graph=False)}
        if weight["flow"]:
            calls["flow"], targets["flow"] = flow_call(inputs)
        v = inputs.student.velocities(sweeps, calls)

        z_fake, calls, found = estimate(inputs, v["one_step"]) if "one_step" in v else None, {}, []
        if weight["rectify"]:
            calls |= {name: replace(call, graph=False) for name, call in score_calls(inputs, z_fake).items()}
        if shortcut is not None:
            calls["from_m"] = replace(shortcut.from_m(z_lq, v["to_m"]), graph=False)
        if weight["adv"]:
            calls["adv"], targets["adv"] = adv_call(inputs, z_fake)
        if weight["restart"]:
            z_t, t = self._own_state(inputs, z_fake)
            calls["restart"] = jump_to_image(inputs, z_t, t)
        v |= inputs.student.velocities(sweeps, calls)

        if shortcut is not None:
            targets["cons"] = shortcut.target(v["to_m"], v["from_m"])
        if inputs.has_one_step:
            difference = self._difference(v["fake"], v["real"]) if weight["rectify"] else None
            found.append(self._one_step(inputs, v["one_step"], z_fake, difference))
        found += [velocity_loss(name, weight, v[name], target) for name, target in targets.items()]
        if weight["restart"]:
            found.append(self._restart(inputs, z_t, t, v["restart"]))
        logs = {name: value for loss in found for name, value in loss.logs.items()}
        return Loss("all", "student", sweeps.joined(sum(loss.value for loss in found)), logs)

    def _select(self, weight: dict[str, float], draws: Draws, progress: Progress) -> dict[str, float]:
        """Return the weights of this micro-batch; the cheaper modes keep their mean over updates or micro-batches.

        Deviation: `cycle` and `alternate_base` (docs/method.md) are cheaper schedules that are not in the paper.
        """
        if self.config.mode == "alternate_base" and weight["flow"] and weight["cons"]:
            on, off = ("flow", "cons") if draws.shared_uniform("alternate base") < 0.5 else ("cons", "flow")
            return weight | {on: 2 * weight[on], off: 0.0}
        if self.config.mode == "cycle":
            group = (("rectify", *PIXELS), ("cons",), ("flow",), ("adv",))[progress.micro % 4]
            return {name: 4 * value if name in group else 0.0 for name, value in weight.items()}
        return weight

    def _one_step(self, inputs: StepInputs, v: Tensor, z_fake: Tensor, difference: Tensor | None) -> Loss:
        """Combine L_data and L_rectify at the one-step estimate into one scalar that has exactly their gradient.

        v: velocity of the one-step jump. z_fake: the detached estimate. difference: D of eq. 10, if it has a weight.
        """
        weight = inputs.weight
        logs = {"z_hat_mean": z_fake.mean(), "z_hat_std": z_fake.flatten(1).std(1).mean()}
        gradient = torch.zeros_like(z_fake)  # gradient of the loss with respect to v
        if difference is not None:
            w = self._time_weight(inputs.times.score).to(difference.dtype)
            rectify = weight["rectify"] * losses.rectification_gradient(difference, w)  # eq. 11
            gradient += rectify
            logs["rectify"] = losses.rectification(torch.zeros_like(difference), difference, w)
            logs["score_difference"] = losses.rms(difference).mean()
        if any(weight[name] for name in PIXELS):
            _, data, data_logs = self._data_gradient(inputs, z_fake)
            gradient -= data  # d z_hat / d v = -1
            logs |= data_logs
            if difference is not None:
                logs["rectify_to_data"] = (losses.rms(rectify) / losses.rms(data).clamp(min=1e-12)).mean()
        return Loss("one_step", "student", (v * gradient).sum(), logs)

    def _own_state(self, inputs: StepInputs, z_fake: Tensor) -> tuple[Tensor, Tensor]:
        """Return the one-step result re-noised to a random time, and that time."""
        t = inputs.student.snap(inputs.draws.uniform("restart time", *self.config.restart_range))
        return flow.interpolate(z_fake, inputs.draws.normal("restart noise", z_fake), t), t

    def _restart(self, inputs: StepInputs, z_t: Tensor, t: Tensor, v: Tensor) -> Loss:
        """Pixel losses of the jump from the student's own re-noised one-step result to the image, with velocity v.

        Deviation: not in TEASR. It trains the last jump on states that a sampler with restarts really visits.
        """
        value, gradient, logs = self._data_gradient(inputs, flow.z0_from_velocity(z_t, v.detach(), t))
        gradient = -inputs.weight["restart"] * flow.per_sample(t, gradient) * gradient  # d z_hat / d v = -t
        logs = {f"restart_{name}": x for name, x in logs.items()} | {"restart": value}
        return Loss("restart", "student", (v * gradient).sum(), logs)

    def _time_weight(self, s: Tensor) -> Tensor:
        """w(s) of eq. 14, or 1 without TAR."""
        return flow.tar_weight(s, self.config.w_cap) if self.config.time_aware else torch.ones_like(s)

    @torch.no_grad()
    def _score_difference(
        self, inputs: StepInputs, z_fake: Tensor, shortcut: Shortcut | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return D of eq. 10 and the target of the shortcut.

        The student's scores and the first half of the shortcut are computed in one batched forward pass.
        """
        calls = score_calls(inputs, z_fake) if inputs.weight["rectify"] else {}
        apart = calls.pop("fake") if calls and inputs.fake is not inputs.student else None
        if shortcut is not None:
            calls["to_m"] = shortcut.to_m(inputs.z_lq)
        if not calls:
            return None, None
        z, t_cur, t_tar = (
            torch.cat(column)
            for column in zip(*((c.z_t, c.t_cur, c.condition.t_tar) for c in calls.values()), strict=True)
        )
        z_lq = inputs.z_lq.repeat(len(calls), 1, 1, 1)
        found = inputs.student.velocity(z, t_cur, Condition(z_lq, t_tar)).chunk(len(calls))
        v = dict(zip(calls, found, strict=True))
        if apart is not None:
            v["fake"] = inputs.fake.velocity(apart.z_t, apart.t_cur, apart.condition)
        target = None if shortcut is None else second_half(inputs, shortcut, v["to_m"])
        return self._difference(v["fake"], v["real"]) if inputs.weight["rectify"] else None, target

    def _difference(self, v_fake: Tensor, v_real: Tensor) -> Tensor:
        """D of eq. 10, without a graph."""
        return flow.score_difference(v_fake, v_real, self.config.score_clamp)

    def _data_gradient(self, inputs: StepInputs, z_fake: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the weighted pixel losses (eqs. 12-13) at an estimate of the clean latent, and their gradient."""
        if self.config.pixel_tile_px is not None:
            return self._data_gradient_in_tiles(inputs, z_fake, self.config.pixel_tile_px)

        def lpips(x_hat: Tensor, x_hq: Tensor) -> Tensor:
            with self._autocast(x_hat):
                return self.lpips(*self._shifted(inputs.draws, x_hat, x_hq)).to(x_hat.dtype)

        def dists(x_hat: Tensor, x_hq: Tensor) -> Tensor:
            with self._autocast(x_hat):
                return self.dists(x_hat, x_hq)

        n = self._seen_by_lpips(len(z_fake))
        if inputs.data["lpips"] and inputs.data["dists"] and n == len(z_fake):
            raise ValueError(
                f"method.lpips_share = {self.config.lpips_share} leaves none of {n} image(s) to DISTS: raise "
                "train.micro_batch, lower this share, or set method.lambda_dists=0"
            )
        others = {
            "dists": of_rows(dists, slice(n if inputs.data["lpips"] else 0, None), inputs.perceptual),
            "grid": lambda x_hat, x_hq: losses.grid(x_hat, inputs.student.patch_px),
        }
        lpips = of_rows(lpips, slice(n), inputs.perceptual)
        return pixel_gradient(inputs.student, z_fake, inputs.x_hq, inputs.data, lpips, others)

    def _data_gradient_in_tiles(
        self, inputs: StepInputs, z_fake: Tensor, tile_px: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what `_data_gradient` returns, computed in tiles."""
        student, weight = inputs.student, inputs.data
        tiles.check(student, tile_px)
        if inputs.perceptual is not None:
            raise ValueError("data.perceptual needs whole pictures: set method.pixel_tile_px=null, or remove this key")
        x_hat = tiles.decode(student, z_fake, tile_px)
        logs = {"checkerboard": losses.checkerboard_energy(x_hat, student.patch_px)}
        total, gradient = x_hat.new_zeros(()), torch.zeros_like(x_hat)
        if weight["mse"]:
            logs["mse"], at_x = losses.gradient_through(lambda x: losses.mse(x, inputs.x_hq), x_hat)
            total, gradient = total + weight["mse"] * logs["mse"], gradient + weight["mse"] * at_x
        if weight["lpips"]:
            n = self._seen_by_lpips(len(x_hat))
            seen, wanted, place = self._shifted(inputs.draws, x_hat[:n], inputs.x_hq[:n], gradient[:n])
            with self._autocast(x_hat):
                logs["lpips"], at_x = tiles.lpips(self.lpips, seen, wanted, tile_px)
            total = total + weight["lpips"] * logs["lpips"]
            place += weight["lpips"] * at_x  # a view of the gradient
        return total, tiles.decoder_gradient(student, z_fake, gradient, tile_px), logs

    def _autocast(self, x: Tensor) -> AbstractContextManager:
        """The precision of LPIPS and DISTS. The dry run, which computes nothing, counts it in fp32."""
        if self.config.lpips_dtype == "fp32" or x.is_meta:
            return nullcontext()
        return torch.autocast(x.device.type, torch.bfloat16)

    def _seen_by_lpips(self, n: int) -> int:
        """Return how many of n images LPIPS sees."""
        return max(1, round(n * self.config.lpips_share))

    def _shifted(self, draws: Draws, *images: Tensor) -> Iterator[Tensor]:
        """Yield images without up to `lpips_shift_px` rows and columns."""
        most = self.config.lpips_shift_px + 1
        top, left = (int(draws.shared_uniform(f"lpips {side}") * most) for side in ("top", "left"))
        yield from (x[..., top:, left:] for x in images)


@dataclass(frozen=True)
class StepInputs:
    """Inputs shared by all losses of one micro-batch."""

    student: Model
    fake: Model  # whose negative target times are the fake score
    x_hq: Tensor
    z0: Tensor
    z_lq: Tensor
    eps: Tensor  # noise of L_flow and L_cons
    draws: Draws
    times: Times
    weight: dict[str, float]
    data: dict[str, float]  # weights of the pixel losses
    perceptual: Tensor | None  # factors on LPIPS and DISTS [B]

    @property
    def has_one_step(self) -> bool:
        """Whether a loss sends a gradient through the one-step jump."""
        return any(self.weight[name] for name in ("rectify", *PIXELS))

    def velocity(self, call: Call) -> Tensor:
        """Return the student's velocity for one call."""
        return self.student.velocity(call.z_t, call.t_cur, call.condition)


def one_step_call(inputs: StepInputs) -> Call:
    """The jump from pure noise to the image, v(eps, 1, z_lq, 0)."""
    eps = inputs.draws.normal("one-step noise", inputs.z_lq)
    one, zero = torch.ones(len(eps), device=eps.device), torch.zeros(len(eps), device=eps.device)
    return Call(eps, one, Condition(inputs.z_lq, zero))


def estimate(inputs: StepInputs, v: Tensor) -> Tensor:
    """The one-step estimate z_hat = eps - v (eq. 6) from the velocity of `one_step_call`, without a graph."""
    call = one_step_call(inputs)
    return flow.z0_from_velocity(call.z_t, v.detach(), call.t_cur)


def jump_to_image(inputs: StepInputs, z_t: Tensor, t: Tensor) -> Call:
    """The jump from time t to the image."""
    return Call(z_t, t, Condition(inputs.z_lq, torch.zeros_like(t)))


def flow_call(inputs: StepInputs) -> tuple[Call, Tensor]:
    """The call of L_flow and its target; t_tar = t_cur asks for the velocity that eq. 10 uses as the real score."""
    t = inputs.times.flow
    call = Call(flow.interpolate(inputs.z0, inputs.eps, t), t, Condition(inputs.z_lq, t))
    return call, flow.velocity_target(inputs.z0, inputs.eps)


def adv_call(inputs: StepInputs, z_fake: Tensor) -> tuple[Call, Tensor]:
    """The call of L_adv at the one-step estimate (eq. 7), and its target (eq. 8)."""
    t, eps = inputs.times.fake, inputs.draws.normal("fake noise", z_fake)
    call = Call(flow.interpolate(z_fake, eps, t), t, Condition(inputs.z_lq, -t))
    return call, flow.velocity_target(z_fake, eps)


def score_calls(inputs: StepInputs, z_fake: Tensor) -> dict[str, Call]:
    """The fake and the real score at the one-step estimate (eq. 9)."""
    s = inputs.times.score
    z_s = flow.interpolate(z_fake, inputs.draws.normal("score noise", z_fake), s)
    return {"fake": Call(z_s, s, Condition(inputs.z_lq, -s)), "real": Call(z_s, s, Condition(inputs.z_lq, s))}


def second_half(inputs: StepInputs, shortcut: Shortcut, u1: Tensor) -> Tensor:
    """Evaluate the second half m -> s of a shortcut, and return the target of the whole (eqs. 2-3)."""
    return shortcut.target(u1, inputs.velocity(shortcut.from_m(inputs.z_lq, u1)))


def velocity_loss(name: str, weight: dict[str, float], v: Tensor, target: Tensor, role: str = "student") -> Loss:
    """The squared error of a velocity."""
    loss = losses.mse(v, target)
    return Loss(name, role, weight[name] * loss, {name: loss.detach()})
