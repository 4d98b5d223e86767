"""Score distillation: closed forms of its gradients, what reaches which network, and plain torch as the reference."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from teasr.backbones.model import Condition, Model
from teasr.backbones.pixel_cnn import PixelCnn, PixelCnnConfig
from teasr.backbones.roles import places
from teasr.backbones.tiny import Tiny, TinyConfig
from teasr.backbones.unet.backbone import UNet, UNetConfig
from teasr.data.batch import Batch
from teasr.diffusion import flow
from teasr.methods import scores
from teasr.methods.base import Progress
from teasr.methods.score_distillation import OneStep, ScoreDistillation, ScoreDistillationConfig
from teasr.training.update import backpropagate
from teasr.util.randomness import Draws

NOW = Progress(0, 1)
PLAIN = {"lambda_lpips": 0.0}
TSD = {
    "lambda_vsd": 0.7, "lambda_tsm": 0.3, "weight": "s2", "time_shift": 3.0, "s_range": (0.05, 0.95),
    "mse_space": "latent", "dasm_weights": (1.0, 0.3, 0.3, 0.3),
}  # fmt: skip


class Gaussian:
    """The exact score of N(mean, deviation^2) in every element; its null prompt has another mean."""

    null_text = torch.ones(1, 1, 1)

    def __init__(self, mean: float, deviation: float, null_mean: float = 0.0):
        self.mean, self.deviation, self.null_mean = mean, deviation, null_mean

    def snap(self, t):
        return t

    time_at = snap

    def velocity(self, z, t, condition=None):
        mean = self.mean if condition is None or condition.text is None else self.null_mean
        s = flow.per_sample(t, z)
        score = -(z - (1 - s) * mean) / ((1 - s) ** 2 * self.deviation**2 + s**2)
        return -(z + s * score) / (1 - s)


def grid(n=12):
    """Nodes and weights of Gauss-Hermite quadrature over two independent standard normal numbers, [n^2, 1, 1, 1]."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    xi, noise = (torch.tensor(a.reshape(-1, 1, 1, 1)) for a in np.meshgrid(x, x))
    return xi, noise, torch.tensor(np.outer(w, w).reshape(-1, 1, 1, 1) / w.sum() ** 2)


@pytest.mark.parametrize("s", [0.05, 0.3, 0.7, 0.98])
def test_the_gradient_is_that_of_kl_in_closed_form(s):
    """To nine digits, for mean and spread of a Gaussian student, also through the surrogate and autograd."""
    mu, tau, a = 0.4, 0.8, 1 - s
    m, q = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, 0.5))
    xi, noise, weights = grid()
    z_hat = m + q * xi
    times = torch.full((len(xi),), s, dtype=torch.float64)
    with torch.no_grad():
        z_s = flow.interpolate(z_hat, noise, times)
        v_real, v_fake = (Gaussian(*law).velocity(z_s, times) for law in ((mu, tau), (m.item(), q.item())))
        g = scores.distribution_gradient(scores.time_weight("kl", times, z_hat, z_hat), v_real, v_fake)
    (0.5 * weights * (z_hat - (z_hat - g).detach()).square()).sum().backward()
    variance_f, variance_r = (a * q) ** 2 + s**2, a**2 * tau**2 + s**2
    kl = 0.5 * (variance_f / variance_r + a**2 * (m - mu) ** 2 / variance_r - 1 + torch.log(variance_r / variance_f))
    for found, wanted in zip((m.grad, q.grad), torch.autograd.grad(kl, (m, q)), strict=True):
        assert abs(found - wanted) < 1e-9 * abs(wanted) < 1
    assert torch.allclose((weights * g).sum(), a**2 * (m - mu) / variance_r)
    assert abs((weights * g * xi).sum() - a**2 * q * (1 / variance_r - 1 / variance_f)) < 1e-10


def latents(n=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, n, 2, 3, 3, generator=g, dtype=torch.float64).unbind()


def test_weights_are_those_of_the_published_losses_with_their_sign():
    """OSEDiff: mse without a half of the estimates, over N; TSD-SR: half a mse of velocities times s^2."""
    z_hat, z_s, v_real, v_fake = latents()
    s = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_real, x_fake = (flow.z0_from_velocity(z_s, v, s) for v in (v_real, v_fake))

    def gradient(loss, target):
        z = z_hat.clone().requires_grad_()
        return torch.autograd.grad(loss(z, target), z)[0] * z.numel()

    n = (z_hat - x_real).abs().mean((1, 2, 3), keepdim=True)
    osediff = gradient(F.mse_loss, z_hat - (x_fake - x_real) / n)
    tsd = gradient(lambda z, y: 0.5 * F.mse_loss(z, y), z_hat - s.view(-1, 1, 1, 1) ** 2 * (v_real - v_fake))
    for kind, wanted in (("osediff", osediff), ("s2", tsd)):
        w = scores.time_weight(kind, s, z_hat, x_real)
        assert torch.allclose(scores.distribution_gradient(w, v_real, v_fake), wanted, atol=1e-12) and (w > 0).all()
    assert torch.isfinite(scores.time_weight("osediff", s, z_hat, z_hat)).all()  # N = 0


def score_gradient(models, z_hat, z_hq=None, n=3, **settings):
    method, logs = ScoreDistillation(ScoreDistillationConfig(**(PLAIN | settings))), {}
    return method._score_gradient(models, z_hat, z_hq, Draws(0, 0, tuple(range(n))), logs), logs


def test_nothing_moves_where_student_and_teacher_agree_unless_guided():
    """With guidance of the real score alone, the gradient is not zero; this is no mistake."""
    z_hat, real = latents()[0], Gaussian(0.3, 0.9, null_mean=0.1)
    same, _ = score_gradient({"real": real, "fake": Gaussian(0.3, 0.9)}, z_hat)
    guided, logs = score_gradient({"real": real, "fake": Gaussian(0.3, 0.9)}, z_hat, cfg_real=7.5)
    assert not same.any() and guided.abs().min() > 1e-3 and logs["guidance_part"] > 0
    closer, _ = score_gradient({"real": real, "fake": Gaussian(2.0, 0.9)}, z_hat, weight="kl")
    assert (closer > 0).all()  # a student whose mean is too high is moved down


@pytest.mark.parametrize("s", [0.14, 0.3, 0.5, 0.7, 0.98])
def test_target_score_matching_attracts_at_every_time(s):
    """In velocities, as TSD-SR's code has it, it repels for s < tau^2 / (1 + tau^2)."""
    tau, difference = 1.0, 0.7
    z_hat, _, noise, _ = latents()
    times, a, real = torch.full((3,), s, dtype=torch.float64), 1 - s, Gaussian(0.2, tau)
    points = tuple(flow.interpolate(z, noise, times) for z in (z_hat, z_hat - difference))
    v = tuple(real.velocity(z, times) for z in points)
    found = scores.target_gradient(torch.ones(3, dtype=torch.float64), times, points, v)
    variance = a**2 * tau**2 + s**2
    assert torch.allclose(found, torch.full_like(found, a * s / variance * difference), atol=1e-10)
    assert (found > 0).all()
    in_velocities = (v[0] - v[1]).mean().item()
    assert in_velocities == pytest.approx((s / variance - 1) * difference)
    assert in_velocities < -1e-3 if s < 0.5 else in_velocities > -1e-9


SIZES = {"width": 16, "depth": 2, "heads": 2, "latent_channels": 12, "lora_rank": 2}


def models_of(method, dtype=torch.float64, noisy=True, effective=(), **net):
    """Models on small networks in which every adapter set has an effect if `noisy`.

    A role on the base `prior` judges pictures.

    effective: parts of the names of further parameters that start at zero and get an effect too. net: settings.
    """
    config, models = TinyConfig(**SIZES, train="lora", base="random", **net), {}
    g = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.rand(2, 3, 64, 64, generator=g) * 2 - 1)] * 8
    for roles in places(method.roles()).values():
        if roles[0].base == "prior":
            backbone = PixelCnn(PixelCnnConfig(width=4, depth=2), roles=roles)
        else:
            backbone = Tiny(config, roles=roles)
            backbone.fit(pairs)
            backbone.codec.to(dtype)
        for name, p in backbone.net.named_parameters():
            if noisy and any(part in name for part in ("lora_B", *effective)):
                own = torch.Generator().manual_seed(sum(map(ord, name)))
                p.data.copy_(torch.randn(p.shape, generator=own) * 0.2)
        backbone.net.to(dtype)
        models |= {role.name: Model(backbone, role) for role in roles}
    method.check_models(models)
    return models


def built(layout="one_base", student="dual", dtype=torch.float64, noisy=True, net=None, **settings):
    """A method and its models on small networks in which every adapter set has an effect if `noisy`."""
    method = ScoreDistillation(ScoreDistillationConfig(layout=layout, student=student, **(PLAIN | settings)))
    return method, models_of(method, dtype, noisy, **(net or {}))


def batch(n=3, dtype=torch.float64) -> Batch:
    g = torch.Generator().manual_seed(1)
    x_hq, x_lq = (torch.rand(2, n, 3, 32, 32, generator=g, dtype=dtype) * 2 - 1).unbind(0)
    return Batch(x_hq, x_lq, [str(i) for i in range(n)])


def trained(models):
    return {name: models[name].backbone.trained(name) for name in ("student", "fake") if name in models}


def gradients(models):
    return {role: {n: p.grad for n, p in own.items() if p.grad is not None} for role, own in trained(models).items()}


def run(method, models, rows=batch(), seen=lambda role: None):  # noqa: B008 - only read
    def backward(role, value):
        value.backward()
        seen(role)

    return backpropagate(method, models, [rows], 0, NOW, backward)


@pytest.mark.parametrize("settings", [{}, TSD, {"student": "single"}], ids=["vsd", "tsd", "single"])
def test_each_loss_reaches_its_own_network_alone(settings):
    """Released TSD-SR computes its loss under no_grad: a constant. Here the scores' part alone moves the student."""
    method, models = built(lambda_mse=0.0, **settings)
    after, calls, call = {}, [], models["student"].backbone.call

    def recorded(role, part, z_t, t, z_lq=None, *rest):
        out = call(role, part, z_t, t, z_lq, *rest)
        calls.append((role.name, out.requires_grad, z_lq is not None))
        return out

    models["student"].backbone.call = recorded
    run(method, models, seen=lambda role: after.setdefault(role, gradients(models)))
    assert not after["student"]["fake"] and max(g.abs().max() for g in after["student"]["student"].values()) > 1e-6
    assert all(torch.equal(g, after["fake"]["student"][n]) for n, g in after["student"]["student"].items())
    assert after["fake"]["fake"].keys() == trained(models)["fake"].keys()
    base = models["student"].backbone
    assert all(p.grad is None for n, p in base.net.named_parameters() if base.owner(n, p) is None)
    assert sum(graph for _, graph, _ in calls) == 2 and not any(graph for name, graph, _ in calls if name == "real")
    assert all(not sees_lq for name, _, sees_lq in calls if name != "student")
    scored = {"vsd": 1, "tsd": 4}.get("tsd" if "dasm_weights" in settings else "vsd")
    assert len(calls) == 2 + scored * (3 if "lambda_tsm" in settings else 2)


def adamw(models, rate=1e-2):
    return {name: torch.optim.AdamW(own.values(), lr=rate) for name, own in trained(models).items()}


def train(method, models, updates=5):
    optimizers = adamw(models)
    for update in range(updates):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        backpropagate(method, models, [batch()], update, NOW, lambda role, value: value.backward())
        for optimizer in optimizers.values():
            optimizer.step()
    return {name: {n: p.detach() for n, p in own.items()} for name, own in trained(models).items()}


def farthest(a, b):
    return max((a[role][n] - p).abs().max().item() for role in b for n, p in b[role].items())


@pytest.mark.parametrize("student", ["dual", "single"])
def test_plain_torch_in_the_published_order_gives_the_same_weights(student):
    """Student step, then fake step, written from OSEDiff's formulas, against one joint step; and one base = copies."""
    joint = train(*built(student=student, noisy=False))
    for layout in ("two_copies", "three_copies"):
        assert farthest(joint, train(*built(layout, student, noisy=False))) < 1e-9, layout
    method, models = built(student=student, noisy=False)
    nets = {name: model.backbone.net for name, model in models.items()}
    roles, encode = {role.name: role for role in method.roles()}, models["student"].encode
    optimizers, x = adamw(models), batch()
    for update in range(5):
        draws, one = Draws(update, 0, (0, 1, 2)), torch.ones(3)
        z_lq = encode(x.x_lq)
        if student == "dual":
            eps = draws.normal("one-step noise", z_lq)
            z_hat = eps - nets["student"](eps, one, z_lq, 0 * one, role=roles["student"])
        else:
            z_hat = z_lq - nets["student"](z_lq, one, role=roles["student"])
        pixels = F.mse_loss(models["student"].decode(z_hat), x.x_hq)
        with torch.no_grad():
            s, n = draws.uniform("score time", 0.02, 0.98), draws.normal("score noise", z_hat)
            s = s.view(-1, 1, 1, 1)
            z_s = (1 - s) * z_hat + s * n
            x_real, x_fake = (z_s - s * nets[r](z_s, s.flatten(), role=roles[r]) for r in ("real", "fake"))
            g = (x_fake - x_real) / (z_hat - x_real).abs().mean((1, 2, 3), keepdim=True)
        optimizers["student"].zero_grad()
        (pixels + F.mse_loss(z_hat, (z_hat - g).detach())).backward()
        optimizers["student"].step()
        t, n = draws.uniform("fake time").view(-1, 1, 1, 1), draws.normal("fake noise", z_hat)
        z = z_hat.detach()
        v = nets["fake"]((1 - t) * z + t * n, t.flatten(), role=roles["fake"])
        optimizers["fake"].zero_grad()
        F.mse_loss(v, n - z).backward()
        optimizers["fake"].step()
    plain = {name: {n: p.detach() for n, p in own.items()} for name, own in trained(models).items()}
    assert farthest(joint, plain) < 1e-8
    assert min(max(p.abs().max() for n, p in own.items() if "lora_B" in n) for own in plain.values()) > 1e-3


def test_every_layer_of_the_fake_set_learns_and_the_teacher_stays_as_it_was():
    """Not only the middle block, as in OSEDiff's code; the real score is the base, bit for bit, before and after."""
    method, models = built(noisy=False, net={"gradient_checkpointing": True})
    z, t = latents(2)[0].repeat(1, 6, 1, 1), torch.tensor([0.2, 0.8])
    with torch.no_grad():
        before = models["real"].velocity(z, t)
        assert torch.equal(models["fake"].velocity(z, t), before)  # a fake set at zero is the teacher
    logs = run(method, models)
    assert logs["score_difference"] == 0 and logs["vsd"] == 0  # no text: distillation starts at exactly zero
    train(method, models, updates=2)
    found = gradients(models)["fake"]
    assert found.keys() == trained(models)["fake"].keys() and all(g.any() for g in found.values())
    assert len(found) == 2 * (1 + 2 * 7)  # A and B of img_in and of all seven Linears of both blocks
    with torch.no_grad():
        assert torch.equal(models["real"].velocity(z, t), before)
        assert not torch.allclose(models["fake"].velocity(z, t), before)


@pytest.mark.parametrize("student", ["dual", "single"])
def test_recomputed_activations_have_the_adapters_of_their_own_pass(student):
    """Other sets run between the student's forward pass and its backward pass."""
    found = []
    for checkpointing in (False, True):
        method, models = built(student=student, net={"gradient_checkpointing": checkpointing}, **TSD)
        run(method, models)
        found.append(gradients(models))
    assert all(found[0][role].keys() == found[1][role].keys() for role in found[0])
    assert (
        farthest(found[0], found[1]) < 1e-12
        and farthest(found[0], {r: {n: 0 * g for n, g in own.items()} for r, own in found[0].items()}) > 1e-4
    )


@pytest.mark.parametrize("settings", [{}, TSD], ids=["vsd", "tsd"])
def test_every_sample_has_its_own_time(settings):
    """Released TSD-SR shows the time of sample 0 to the whole batch: here two samples give the mean of one each."""

    def of(samples):
        method, models = built(**settings)
        draws = Draws(0, 0, samples)
        for loss in method.losses(models, batch().rows(slice(samples[0], samples[-1] + 1)), draws, NOW):
            loss.value.backward()
        return gradients(models)

    both, first, second = of((0, 1)), of((0,)), of((1,))
    mean = {role: {n: (g + second[role][n]) / 2 for n, g in own.items()} for role, own in first.items()}
    assert farthest(both, mean) < 1e-12 and farthest(both, first) > 1e-6


def test_losses_of_the_fake_score_differ_by_powers_of_the_time():
    _, models = built()
    z, draws = latents()[0].repeat(1, 6, 1, 1), Draws(0, 0, (0, 1, 2))
    eps, t = draws.normal("fake noise", z), draws.uniform("fake time").double()
    z_t = flow.interpolate(z, eps, t)
    with torch.no_grad():
        v = models["fake"].velocity(z_t, t.float())
        for kind, found, wanted in (
            ("velocity", v, eps - z),
            ("x0", flow.z0_from_velocity(z_t, v, t), z),
            ("eps", flow.eps_from_velocity(z_t, v, t), eps),
        ):
            assert scores.fake_score_loss(models["fake"], z, draws, kind).item() == pytest.approx(
                F.mse_loss(found, wanted).item(), rel=1e-6
            ), kind


def test_sub_steps_follow_the_fake_score_and_stay_in_range():
    """Four sub-steps a stride apart before the shift; the gradient is the weighted sum along that path."""
    real, fake = Gaussian(0.2, 1.0), Gaussian(1.0, 0.6)
    z_hat, z_hq, _, _ = latents()
    settings = {"dasm_weights": (1.0, 0.3), "dasm_jitter": 0.0, "lambda_vsd": 0.7, "lambda_tsm": 0.3, "weight": "s2"}
    found, _ = score_gradient({"real": real, "fake": fake}, z_hat, z_hq, **settings)
    draws = Draws(0, 0, (0, 1, 2))
    s, noise, wanted = draws.uniform("score time", 0.02, 0.98), draws.normal("score noise", z_hat), 0
    z, h = flow.interpolate(z_hat, noise, s), flow.interpolate(z_hq, noise, s)
    for factor in (1.0, 0.3):
        w = flow.per_sample(factor * s**2, z)
        vr, vf, vh = real.velocity(z, s), fake.velocity(z, s), real.velocity(h, s)
        noises = (flow.eps_from_velocity(z, vr, s), flow.eps_from_velocity(h, vh, s))
        wanted = wanted + w * (0.7 * (vr - vf) + 0.3 * (noises[0] - noises[1]))
        later = (s - 0.05).clamp(min=0.02)
        z, h, s = flow.step(z, vf, s, later), flow.step(h, vh, s, later), later
    assert torch.allclose(found, wanted, atol=1e-6)
    method = ScoreDistillation(ScoreDistillationConfig(**TSD))
    times = torch.stack(method._times(Draws(0, 0, tuple(range(200))), real))
    assert times.shape == (4, 200) and times.min() >= scores.shifted(torch.tensor(0.05), 3) - 1e-6 and times.max() < 1
    assert (times[:-1] >= times[1:]).float().mean() > 0.95


def test_without_a_fake_score_there_is_nothing_more_to_train():
    """CSD: guidance alone is the gradient. SDS: the exact score of the result itself."""
    z_hat, real = latents()[0], Gaussian(0.3, 0.9, null_mean=-0.2)
    found, _ = score_gradient({"real": real}, z_hat, fake="null_prompt", cfg_real=7.5, weight="s2", layout="one_base")
    draws = Draws(0, 0, (0, 1, 2))
    s, noise = draws.uniform("score time", 0.02, 0.98), draws.normal("score noise", z_hat)
    z_s = flow.interpolate(z_hat, noise, s)
    direction = real.velocity(z_s, s) - real.velocity(z_s, s, Condition(text=real.null_text))
    assert torch.allclose(found, 7.5 * flow.per_sample(s**2, z_s) * direction, atol=1e-6)
    found, _ = score_gradient({"real": real}, z_hat, fake="sample", weight="kl")
    w = flow.per_sample(flow.tar_weight(s), z_s)
    assert torch.allclose(found, w * (real.velocity(z_s, s) - (noise - z_hat)), atol=1e-5)
    method, models = built(fake="sample")
    assert set(models) == {"student", "real"} and set(run(method, models)) >= {"mse", "vsd"}
    assert set(built(lambda_vsd=0.0)[1]) == {"student"}  # without score losses, no scores


class Net(nn.Module):
    """A small network of points [B, 2, 1, 1] and times, with the interface of a model."""

    role = None

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def snap(self, t):
        return t

    time_at = snap

    def velocity(self, z, t, condition=None):
        x = torch.cat((z.flatten(1), t[:, None], (3 * t[:, None]).sin()), 1)
        return self.layers(x)[..., None, None]


class Mixture:
    """The exact score of two narrow Gaussians at (-1, 0) and (1, 0)."""

    centres, deviation = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.25

    def velocity(self, z, t, condition=None):
        s, x = t[:, None], z.flatten(1)
        variance = ((1 - s) * self.deviation) ** 2 + s**2
        away = x[:, None] - (1 - s)[:, None] * self.centres
        share = torch.softmax(-away.square().sum(2) / (2 * variance), 1)
        score = -(share[..., None] * away).sum(1) / variance
        return (-(x + s * score) / (1 - s))[..., None, None]


def learnt(trains: bool) -> torch.Tensor:
    """Points of a student that was distilled from the mixture, with a trained fake score or as samples alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, fake, real = Net(), Net(), Mixture()
        steps = [torch.optim.Adam(net.parameters(), lr=rate) for net, rate in ((student, 1e-3), (fake, 3e-3))]
        for _ in range(500):
            eps, noise, e, s, t = *torch.randn(3, 128, 2, 1, 1), *(torch.rand(2, 128) * 0.96 + 0.02)
            one = torch.ones(128)
            z_hat = eps - student.velocity(eps, one)
            z = z_hat.detach()
            with torch.no_grad():
                z_s = flow.interpolate(z, noise, s)
                v_fake = fake.velocity(z_s, s) if trains else noise - z
                w = scores.time_weight("kl", s, z, z).clamp(max=10)
                g = scores.distribution_gradient(w, real.velocity(z_s, s), v_fake)
            denoising = fake.velocity(flow.interpolate(z, e, t), t) - (e - z)
            losses = (0.5 * (z_hat - (z_hat - g).detach()).square().mean(), denoising.square().mean())
            for step, loss in zip(steps, losses, strict=True):
                step.zero_grad()
                loss.backward()
                step.step()
        eps = torch.randn(2000, 2, 1, 1)
        return (eps - student.velocity(eps, torch.ones(2000))).detach().flatten(1)


def test_a_fake_score_that_learns_keeps_the_spread_and_samples_alone_collapse():
    """A two-mode teacher: the spread across the modes is .25 in the teacher's law."""
    spread = {trains: learnt(trains)[:, 1].std().item() for trains in (True, False)}
    assert 0.15 < spread[True] < 0.4 and spread[False] < 0.6 * spread[True], spread


def test_what_cannot_be_a_score_is_refused():
    """The branches of a U-Net were never trained without an LQ image; a network from scratch is no teacher either."""
    method = ScoreDistillation(ScoreDistillationConfig(layout="three_copies"))
    roles = method.roles()
    sizes = {"width": 16, "depth": 1, "heads": 2, "latent_channels": 12}
    for backbone in (UNet(UNetConfig(base="random"), roles=roles[1:2]), Tiny(TinyConfig(**sizes), roles=roles[1:2])):
        with pytest.raises(ValueError, match="never trained without one: use the backbone tiny with a prior"):
            method.check_models({"real": Model(backbone, roles[1])})
    for settings in ({"cfg_real": 7.5}, {"fake": "null_prompt"}, {"cfg_fake": 2.0}):
        with pytest.raises(ValueError, match="this backbone has no null prompt"):
            built(**settings)
    for settings, message in (
        ({"lambda_vsd": 0.0, "lambda_mse": 0.0, "lambda_lpips": 0.0}, "nothing to train"),
        ({"s_range": (0.0, 1.0)}, "s_range"), ({"dasm_weights": ()}, "dasm_weights"),
        ({"layout": "three_copies", "fake": "sample"}, "two_copies or one_base"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ScoreDistillationConfig(**settings)


def test_it_restores_in_one_step_and_says_why_not_in_more():
    for branches, z in itertools.product(("dual", "single"), latents()[:1]):
        _, models = built(student=branches, dtype=torch.float64)
        z_lq, eps = z.repeat(1, 6, 1, 1), latents()[1].repeat(1, 6, 1, 1)
        sampler = OneStep(branches)
        found = sampler.sample(models["student"], z_lq, eps, 1)
        one = torch.ones(3)
        v = models["student"].velocity(eps, one, Condition(z_lq, 0 * one)) if branches == "dual" else None
        wanted = eps - v if branches == "dual" else z_lq - models["student"].velocity(z_lq, one)
        assert torch.equal(found, wanted.detach())
        with pytest.raises(ValueError, match="trains the jump from time 1 to 0 alone"):
            sampler.sample(models["student"], z_lq, eps, 4)
