"""methods/teasr.py: the memory-saving update against the joint loss, what is computed, and the schedules."""

import dataclasses
import gc
import weakref

import pytest
import torch
from peer_update import joint_loss

from teasr.backbones.model import Condition, Model
from teasr.backbones.tiny import Tiny, TinyConfig
from teasr.data.batch import Batch
from teasr.diffusion import flow, losses, perceptual
from teasr.methods.base import Progress
from teasr.methods.teasr import Ramp, Teasr, TeasrConfig
from teasr.methods.teasr_times import Times, shortcut_times
from teasr.util.randomness import Draws

NOW = Progress(update=5, updates=10)
PLAIN = {"lambda_lpips": 0.0, "ramps": {}}


def tiny(dtype=torch.float64, **settings) -> Tiny:
    """A tiny backbone with a fitted codec and random LoRA and output weights, so that every path has an effect."""
    g = torch.Generator().manual_seed(0)
    backbone = Tiny(
        TinyConfig(**({"width": 16, "depth": 2, "heads": 2, "latent_channels": 12, "lora_rank": 2} | settings))
    )
    backbone.fit([(torch.rand(3, 64, 64, generator=g) * 2 - 1, torch.rand(3, 64, 64, generator=g) * 2 - 1)] * 8)
    for name, parameter in backbone.net.named_parameters():
        if "lora_B" in name or "proj_out" in name:
            parameter.data.normal_(0, 0.2, generator=g)
    backbone.net.to(dtype)
    backbone.codec.to(dtype)
    return backbone


def batch(n=3, dtype=torch.float64) -> Batch:
    g = torch.Generator().manual_seed(1)
    x_hq, x_lq = (torch.rand(2, n, 3, 32, 32, generator=g, dtype=dtype) * 2 - 1).unbind(0)
    return Batch(x_hq, x_lq, [str(i) for i in range(n)])


def draws(n=3) -> Draws:
    return Draws(0, NOW.update, tuple(range(n)))


def gradients(backbone: Tiny) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in backbone.net.named_parameters() if p.grad is not None}
    backbone.net.zero_grad()
    return found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"time_aware": False},
        {"w_cap": 3.0, "cons_midpoint": 0.3},
        {"lambda_lpips": 0.7, "lambda_mse": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("net", [{}, {"gradient_checkpointing": True}, {"decoupled_timestep": False}], ids=str)
def test_lean_update_has_the_gradient_of_the_joint_loss(change, net):
    """Four graphs one after another give the gradient of one backward pass through everything (float64, to 1e-10)."""
    config = TeasrConfig(**(PLAIN | change))
    lpips = perceptual.load_lpips("alex", weights=False).double() if config.lambda_lpips else None
    backbone = tiny(**net)
    for loss in Teasr(config, lpips).losses({"student": Model(backbone)}, batch(), draws(), NOW):
        loss.value.backward()
    separate = gradients(backbone)
    joint_loss(config, Model(backbone), batch(), draws(), lpips).backward()
    joint = gradients(backbone)
    assert separate.keys() == joint.keys() and len(separate) > 20
    worst = max((separate[n] - joint[n]).abs().max().item() for n in joint)
    assert worst < 1e-10
    assert max(g.abs().max().item() for g in joint.values()) > 1e-3


class Counting:
    """Records a network's batch sizes with and without a graph, and whether an older graph is still alive."""

    def __init__(self, backbone: Tiny):
        self.plain, self.graph, self.alive = [], [], []
        self.refs: list[weakref.ref] = []
        call = backbone.call

        def counted(role, part, z_t, *rest):
            if torch.is_grad_enabled():
                gc.collect()
                self.alive.append(sum(ref() is not None for ref in self.refs))
            v = call(role, part, z_t, *rest)
            (self.graph if v.requires_grad else self.plain).append(len(z_t))
            if v.requires_grad:
                self.refs.append(weakref.ref(v))
            return v

        backbone.call = counted


def run(config: TeasrConfig, n=3) -> tuple[Counting, dict]:
    backbone = tiny(torch.float32)
    counting, logs = Counting(backbone), {}
    for loss in Teasr(config).losses({"student": Model(backbone)}, batch(n, torch.float32), draws(n), NOW):
        loss.value.backward()
        logs |= loss.logs
        del loss
    return counting, logs


def test_four_graphs_never_two_at_once_and_batched_scores():
    counting, logs = run(TeasrConfig(**PLAIN))
    assert counting.graph == [3, 3, 3, 3]  # one-step, cons, flow, adv
    assert counting.plain == [9, 3]  # fake score + real score + first half of the shortcut; second half
    assert counting.alive == [0, 0, 0, 0]
    assert set(logs) >= {
        "flow",
        "cons",
        "adv",
        "rectify",
        "mse",
        "z_hat_mean",
        "z_hat_std",
        "rectify_to_data",
        "checkerboard",
    }


@pytest.mark.parametrize(
    ("off", "graph", "plain"),
    [
        (("rectify",), 4, [3, 3]),
        (("cons",), 3, [6]),
        (("adv",), 3, [9, 3]),
        (("rectify", "mse"), 3, [3, 3, 3]),  # here L_adv computes its fake sample without a graph
        (("rectify", "mse", "adv", "cons"), 1, []),
        (("flow", "cons", "adv", "rectify"), 1, []),
    ],
)
def test_nothing_is_computed_for_a_zero_weight(off, graph, plain):
    counting, logs = run(TeasrConfig(**PLAIN, **{f"lambda_{name}": 0.0 for name in off}))
    assert len(counting.graph) == graph and counting.plain == plain
    assert not set(off) & set(logs)


@pytest.mark.parametrize("fake", ["set", "copy"])
def test_a_separate_fake_score_changes_whose_weights_are_used_and_nothing_else(fake):
    """With equal weights it has the losses of the student's own; L_adv trains it alone, and D has no other weights."""
    config = TeasrConfig(**PLAIN, fake=fake)
    role = Teasr(config).roles()[1]
    assert (role.name, role.branches, role.copy) == ("fake", "dual", "fake" if fake == "copy" else "")
    own, student, copy = tiny(), tiny(), tiny()
    models = {"student": Model(student), "fake": Model(copy)}
    wanted = list(Teasr(TeasrConfig(**PLAIN)).losses({"student": Model(own)}, batch(), draws(), NOW))
    found = list(Teasr(config).losses(models, batch(), draws(), NOW))
    assert [(a.name, a.role) for a in found] == [(a.name, "fake" if a.name == "adv" else a.role) for a in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a.value, b.value, atol=1e-12)
        a.value.backward()
        assert bool(gradients(copy)) == (a.name == "adv") and bool(gradients(student)) == (a.name != "adv")
    copy.net.proj_out.weight.data *= 2
    other = next(iter(Teasr(config).losses(models, batch(), draws(), NOW)))
    assert other.logs["score_difference"] != wanted[0].logs["score_difference"]
    with pytest.raises(ValueError, match="trained by L_adv"):
        TeasrConfig(**PLAIN, fake=fake, lambda_adv=0.0)


def test_ramps_in_updates_and_fractions():
    ramp = Ramp(start=10, length=20)
    assert [ramp.factor(Progress(u, 100)) for u in (0, 9, 20, 30, 99)] == [0, 0, 0.5, 1, 1]
    ramp = Ramp(start=0.1, length=0.4, unit="fraction")
    assert [ramp.factor(Progress(u, 1000)) for u in (0, 99, 300, 500)] == [0, 0, pytest.approx(0.5), 1]
    assert Ramp(start=3, length=0).factor(Progress(3, 9)) == 1
    with pytest.raises(ValueError, match="<= 1"):
        Ramp(start=0.8, length=0.4, unit="fraction")


def test_rectification_waits_for_its_ramp():
    method = Teasr(TeasrConfig(lambda_lpips=0.0, ramps={"rectify": Ramp(6, 4)}))
    assert method.loss_weights(NOW)["rectify"] == 0
    assert method.loss_weights(Progress(8, 10))["rectify"] == pytest.approx(0.25)


def test_consistency_times_follow_the_mix():
    n = 4000
    d = Draws(0, 0, tuple(range(n)))
    t, s = shortcut_times(TeasrConfig(**PLAIN), d)
    assert bool(((s >= 0) & (s <= t) & (t <= 1)).all())
    one = (t == 1) & (s == 0)
    grid = {((k + 1) / m, k / m) for m in (2, 4, 8) for k in range(m)}
    on_grid = torch.tensor([(a, b) in grid for a, b in zip(t.tolist(), s.tolist(), strict=True)])
    assert one.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert on_grid.float().mean().item() == pytest.approx(0.25, abs=0.03)
    rest = ~(one | on_grid)
    assert t[rest].mean().item() == pytest.approx(0.5, abs=0.03) and s[rest].mean().item() == pytest.approx(
        0.25, abs=0.03
    )


def test_scores_stay_in_their_range():
    config = TeasrConfig(**PLAIN, s_range=(0.1, 0.6))
    times = Times.draw(config, Draws(0, 0, tuple(range(500))), Model(tiny()))
    for t in (times.score, times.fake):
        assert t.min() >= 0.1 and t.max() <= 0.6


def test_cycle_over_four_micro_batches_sums_to_the_whole():
    """Each loss runs on one micro-batch with four times its weight: the mean over the update is the full objective."""
    base = TeasrConfig(**PLAIN)
    backbone, b = tiny(), batch()
    for loss in Teasr(base).losses({"student": Model(backbone)}, b, draws(), NOW):
        loss.value.backward()
    whole = gradients(backbone)
    cycle = Teasr(dataclasses.replace(base, mode="cycle"))
    for micro in range(4):
        for loss in cycle.losses({"student": Model(backbone)}, b, draws(), Progress(5, 10, micro, 4)):
            (loss.value / 4).backward()
    cycled = gradients(backbone)
    assert max((whole[n] - cycled[n]).abs().max().item() for n in whole) < 1e-12
    with pytest.raises(ValueError, match="multiple of 4"):
        cycle.check(accumulation=2)
    cycle.check(accumulation=8)


def test_alternate_base_takes_one_of_two_at_twice_the_weight():
    method, seen = Teasr(TeasrConfig(**PLAIN, mode="alternate_base")), []
    for update in range(40):
        d = Draws(0, update, (0, 1))
        weight = method._select(method.loss_weights(NOW), d, NOW)
        assert sorted((weight["flow"], weight["cons"])) == [0, 2]
        seen.append(weight["flow"] > 0)
        assert d.shared_uniform("x") == Draws(0, update, (7,)).shared_uniform("x")  # all ranks agree
    assert 10 < sum(seen) < 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambda_adv": -1.0}, "lambda_adv"),
        ({f"lambda_{n}": 0.0 for n in ("flow", "cons", "adv", "rectify", "mse", "lpips")}, "nothing to train"),
        ({"ramps": {"rectfy": Ramp(0, 1)}}, "rectfy"),
        ({"s_range": (0.0, 1.0)}, "s_range"),
        ({"cons_mix": (0.5, 0.5, 0.5)}, "cons_mix"),
        ({"cons_midpoint": 1.0}, "cons_midpoint"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TeasrConfig(**change)


def test_split_gives_every_loss_its_own_images():
    """The gradient is the sum of those of each part of the batch with its losses alone and the same random numbers."""
    shares = {"split": (0.25, 0.25, 0.25, 0.25), "lambda_restart": 0.7, "lambda_mse": 0.3}
    method = Teasr(TeasrConfig(**PLAIN, mode="split", **shares))
    backbone, whole = tiny(), batch(8)
    names = [loss.name for loss in run_losses(method, backbone, whole, draws(8))]
    assert names == ["one_step", "adv", "cons", "flow", "restart"]
    together = gradients(backbone)
    parts = []
    groups = (("rectify", "mse", "adv"), ("cons",), ("flow",))
    for i, group in enumerate(groups):
        off = {f"lambda_{n}": 0.0 for n in ("flow", "cons", "adv", "rectify", "mse") if n not in group}
        alone = Teasr(TeasrConfig(**(PLAIN | {"lambda_mse": 0.3} | off)))
        part = slice(2 * i, 2 * i + 2)
        run_losses(alone, backbone, whole.rows(part), draws(8).rows(part))
        parts.append(gradients(backbone))
    run_losses(method, backbone, whole, draws(8), only="restart")
    parts.append(gradients(backbone))
    for name, gradient in together.items():
        total = sum(own[name] for own in parts if name in own)
        assert (gradient - total).abs().max() < 1e-10, name


def run_losses(method, backbone, rows, own, only=None):
    """Back-propagate the losses, or the one of this name alone, and return all of them."""
    found = []
    for loss in method.losses({"student": Model(backbone)}, rows, own, NOW):
        if only in (None, loss.name):
            loss.value.backward()
        found.append(loss)
    return found


def test_the_restart_loss_has_the_gradient_of_the_pixel_losses_at_its_own_state():
    """Compared with autograd through z_t - t v, decoder and losses; nothing reaches the first step."""
    lpips = perceptual.load_lpips("alex", weights=False).double()
    off = {f"lambda_{n}": 0.0 for n in ("flow", "cons", "adv", "rectify")}
    settings = off | {"lambda_restart": 0.7, "lambda_mse": 0.3, "lambda_lpips": 0.2, "lpips_share": 0.5}
    method = Teasr(TeasrConfig(**(PLAIN | settings), mode="split", split=(0.5, 0, 0, 0.5)), lpips)
    backbone, rows, own = tiny(), batch(8), draws(8)
    loss = run_losses(method, backbone, rows, own, only="restart")[-1]
    found = gradients(backbone)
    model, rows, own = Model(backbone), rows.rows(slice(4, 8)), own.rows(slice(4, 8))
    with torch.no_grad():
        z_lq = model.encode(rows.x_lq)
        eps = own.normal("one-step noise", z_lq)
        one = torch.ones(4)
        z_fake = eps - model.velocity(eps, one, Condition(z_lq, 0 * one))
        t = own.uniform("restart time", 0.04, 0.3)
        z_t = flow.interpolate(z_fake, own.normal("restart noise", z_fake), t)
    x = model.decode(flow.z0_from_velocity(z_t, model.velocity(z_t, t, Condition(z_lq, 0 * t)), t))
    value = 0.3 * losses.mse(x, rows.x_hq) + 0.2 * lpips(x[:2], rows.x_hq[:2]).mean()
    (0.7 * value).backward()
    assert loss.logs["restart"].item() == pytest.approx(value.item(), rel=1e-9)
    for name, gradient in gradients(backbone).items():
        assert (gradient - found[name]).abs().max() < 1e-9, name  # LPIPS keeps some constants in fp32


def test_dists_acts_on_the_images_that_lpips_does_not_see_and_samples_have_factors():
    """Compared with autograd through decoder and both networks; a factor of 0 takes a sample out."""
    lpips, dists = perceptual.load_lpips("alex", weights=False).double(), perceptual.load_dists(weights=False).double()
    off = {f"lambda_{n}": 0.0 for n in ("flow", "cons", "adv", "rectify", "mse")}
    config = TeasrConfig(**(PLAIN | off | {"lambda_lpips": 0.2, "lambda_dists": 0.3, "lpips_share": 0.5}))
    backbone, rows, own = tiny(), batch(4), draws(4)
    rows.perceptual = torch.tensor([1.0, 0.5, 0.0, 2.0])
    (loss,) = run_losses(Teasr(config, lpips, dists), backbone, rows, own)
    found, model = gradients(backbone), Model(backbone)
    eps, one = own.normal("one-step noise", z_lq := model.encode(rows.x_lq)), torch.ones(4)
    x = model.decode(eps - model.velocity(eps, one, Condition(z_lq, 0 * one)))
    seen = (lpips(x[:2], rows.x_hq[:2]).flatten() * torch.tensor([1.0, 0.5])).mean()
    others = (dists(x[2:], rows.x_hq[2:]) * torch.tensor([0.0, 2.0])).mean()
    (0.2 * seen + 0.3 * others).backward()
    assert loss.logs["dists"].item() == pytest.approx(others.item(), rel=1e-9)
    for name, gradient in gradients(backbone).items():
        assert (gradient - found[name]).abs().max() < 1e-9, name
    with pytest.raises(ValueError, match="leaves none of 1 image"):
        run_losses(Teasr(config, lpips, dists), backbone, batch(1), draws(1))
    with pytest.raises(ValueError, match=r"method.lpips_share = 1 leaves none"):
        dataclasses.replace(config, lpips_share=1.0)
