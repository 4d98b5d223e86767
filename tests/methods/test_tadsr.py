"""TADSR: reductions to VSD bit for bit, pairing of times, blur, gradients, what no score may see, and the dial."""

import pytest
import torch
import torch.nn.functional as F
from test_score_distillation import NOW, Gaussian, batch, farthest, gradients, latents, models_of, train, trained

from teasr.backbones.model import Condition
from teasr.diffusion import blur, flow, losses, sd_times
from teasr.methods import scores
from teasr.methods.sampler import AnyStep
from teasr.methods.score_distillation import ScoreDistillation, ScoreDistillationConfig
from teasr.methods.tadsr import Tadsr, TadsrConfig, TimedStep, one_step
from teasr.training.update import backpropagate
from teasr.util.randomness import Draws

PLAIN = {"lambda_lpips": 0.0}
VSD = {"student": "single", "lambda_lpips": 0.0}
AS_VSD = {"encoder": False, "blur": "none", "t_min": 0.99999999, "time_factor": 0.0}  # t_s = 1, t_v = time_offset
DRAWS = Draws(0, 0, (0, 1, 2))


def built(noisy=True, **settings):
    method = Tadsr(TadsrConfig(**(PLAIN | settings)))
    return method, models_of(method, noisy=noisy, effective=("encoder.last",))


def run(method, models, draws=DRAWS):
    """Back-propagate one micro-batch; return the logged values."""
    logs = {}
    for loss in method.losses(models, batch().rows(slice(draws.samples[0], draws.samples[-1] + 1)), draws, NOW):
        loss.value.backward()
        logs |= loss.logs
    return logs


@pytest.mark.parametrize("weight", ["osediff", "kl"])
def test_at_a_fixed_time_it_is_vsd_bit_for_bit(weight):
    """With lambda 0 the score time is gamma; without encoder and blur, and at t_s = 1, all of it is OSEDiff."""
    method, models = built(**AS_VSD, time_offset=0.3, weight=weight)
    vsd = ScoreDistillation(ScoreDistillationConfig(**VSD, s_range=(0.3, 0.3 + 1e-12), weight=weight))
    same = models_of(vsd)
    ours, theirs = run(method, models), run(vsd, same)
    assert {name: value.item() for name, value in theirs.items()} == {name: ours[name].item() for name in theirs}
    a, b = gradients(models), gradients(same)
    assert all(a[role].keys() == b[role].keys() and a[role] for role in ("student", "fake"))
    assert all(torch.equal(g, b[role][n]) for role in a for n, g in a[role].items())


def test_with_lambda_1_the_score_time_is_the_students():
    models, z_hat = {"real": Gaussian(0.2, 1.0), "fake": Gaussian(1.0, 0.6)}, latents()[0]
    vsd = ScoreDistillation(ScoreDistillationConfig(**VSD, s_range=(0.4, 0.4 + 1e-12)))
    for t_s, settings in ((0.4, {"time_factor": 1.0}), (0.9, {"time_factor": 0.0, "time_offset": 0.4})):
        method = Tadsr(TadsrConfig(**PLAIN, **settings))
        found = method._score_gradient(models, z_hat, torch.full((3,), t_s), DRAWS, {})
        assert torch.equal(found, vsd._score_gradient(models, z_hat, None, DRAWS, {}))


def test_for_a_student_blind_to_its_time_coupling_is_a_range_of_times():
    """The mean over t_s of the coupled gradient is that of VSD over [gamma, gamma + lambda]: the same grid, scaled."""
    models, z_hat = {"real": Gaussian(0.2, 1.0), "fake": Gaussian(1.0, 0.6)}, latents()[0]
    method, plain = (Tadsr(TadsrConfig(**PLAIN, time_factor=f, time_offset=o)) for f, o in ((0.5, 0.1), (1.0, 0.0)))
    steps = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    means = [
        sum(m._score_gradient(models, z_hat, t.repeat(3), DRAWS, {}) for t in times) / len(times)
        for m, times in ((method, steps), (plain, 0.1 + 0.5 * steps))
    ]
    assert torch.allclose(*means, atol=1e-12) and means[0].abs().max() > 1e-2


def test_published_pairs_of_times():
    """Index 500 with lambda 0.5 has the scores at index 250, flow time 0.410; 0.66 in flow time is nearly the same."""
    index = torch.tensor([100.0, 200, 250, 300, 500, 999])
    times = torch.tensor([0.256, 0.364, 0.410, 0.454, 0.618, 0.936])
    assert torch.allclose(sd_times.time_of(index), times, atol=5e-4)
    assert torch.allclose(sd_times.index_of(sd_times.time_of(index + 0.25)), (index + 0.25).clamp(max=999), atol=0.02)
    by_index = Tadsr(TadsrConfig(clock="index", time_factor=0.5))
    t_v, tau = by_index._teacher_time(sd_times.time_of(index))
    assert t_v[4] == pytest.approx(0.410, abs=5e-4) and tau[4] == pytest.approx(0.25, abs=1e-5)
    by_flow, _ = Tadsr(TadsrConfig())._teacher_time(sd_times.time_of(index))
    assert (t_v / by_flow)[[1, 4, 5]] == pytest.approx([1.06, 1.0, 1.0], abs=0.02)
    assert Tadsr(TadsrConfig())._teacher_time(torch.zeros(1))[0].item() == pytest.approx(0.02)  # clamped


@pytest.mark.parametrize("settings", [{}, {"student": "dual"}, {"clock": "index", "blur": "steps"}])
def test_every_sample_has_its_own_times_and_blur(settings):
    """Two samples give the mean of one each."""
    found = []
    for samples in ((0, 1), (0,), (1,)):
        method, models = built(**settings)
        run(method, models, Draws(0, 0, samples))
        found.append(gradients(models))
    both, first, second = found
    mean = {role: {n: (g + second[role][n]) / 2 for n, g in own.items()} for role, own in first.items()}
    assert farthest(both, mean) < 1e-12 and farthest(both, first) > 1e-6


def test_guidance_grows_with_the_time_of_the_scores():
    models = {"real": Gaussian(0.3, 0.9, null_mean=-0.2), "fake": Gaussian(0.3, 0.9)}
    z_hat, t_s = latents()[0], torch.tensor([0.2, 0.5, 1.0])
    method = Tadsr(TadsrConfig(**PLAIN, cfg_real=7.5, cfg_slope=5.0, weight="s2"))
    found = method._score_gradient(models, z_hat, t_s, DRAWS, {})
    t_v = 0.66 * t_s
    z_v = flow.interpolate(z_hat, DRAWS.normal("score noise", z_hat), t_v)
    text, null = (models["real"].velocity(z_v, t_v, c) for c in (None, Condition(text=torch.ones(1))))
    g = flow.per_sample(7.5 + 5 * t_v - 1, z_v)
    assert torch.allclose(found, flow.per_sample(t_v**2, z_v) * g * (text - null), atol=1e-6)


def test_the_blur_is_the_published_one_or_continuous():
    index = torch.tensor([1.0, 199, 200, 500, 999], dtype=torch.float64)
    sigma, radius = blur.published(index)
    assert sigma.tolist() == pytest.approx([1.0, 2.0, 2.0, 3.5, 6.0], abs=0.006)
    assert (2 * radius + 1).tolist() == [5, 5, 9, 13, 21]
    alternating = torch.tensor([(-1.0) ** k for k in range(2 * blur.REACH + 1)], dtype=torch.float64)
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    published, continuous = (blur.weights(*size) for size in ((sigma, radius), blur.smooth(t)))
    for w in (published, continuous):
        assert torch.allclose(w.sum(1), torch.ones(len(w), dtype=w.dtype)) and torch.equal(w, w.flip(1))
    assert (published @ alternating)[:3].tolist() == pytest.approx([0.023, 0.113, 0.014], abs=1.5e-3)
    assert (continuous @ alternating).abs().max() < 0.03
    x = torch.ones(2, 3, 32, 32, dtype=torch.float64) * torch.tensor([-0.5, 0.9]).view(2, 1, 1, 1)
    assert torch.allclose(blur.blurred(x, *blur.smooth(torch.tensor([0.0, 1.0]))), x)
    checks = torch.tensor([(-1.0) ** k for k in range(40)], dtype=torch.float64).expand(1, 3, 40, 40)
    found = blur.blurred(checks, sigma[:1], radius[:1])[..., 15:25, 15:25]
    assert torch.allclose(found, (published[0] @ alternating) * checks[..., 15:25, 15:25])


def test_the_blurred_error_falls_with_the_time_and_is_that_of_blurred_pictures():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 4, 3, 40, 40, generator=g, dtype=torch.float64).unbind()
    sizes = [blur.smooth(torch.full((4,), t, dtype=torch.float64)) for t in (0.0, 0.3, 0.7, 1.0)]
    errors = [blur.mse(x, y, *size).item() for size in sizes]
    assert losses.mse(x, y).item() > errors[0] and errors == sorted(errors, reverse=True)
    assert errors[1] == pytest.approx(F.mse_loss(blur.blurred(x, *sizes[1]), blur.blurred(y, *sizes[1])).item())


@pytest.mark.parametrize("settings", [{}, {"student": "dual"}, {"step": "flow", "t_min": 0.2}, {"coupled": False}])
def test_the_gradient_is_that_of_the_joint_loss_also_through_the_encoder(settings):
    """Plain autograd on MSE(blurred) + mse(z_hat, sg(z_hat - g)): z_in reaches z_hat directly and through the net."""
    method, models = built(**settings)
    run(method, models)
    found = {n: g.clone() for n, g in gradients(models)["student"].items()}
    assert sum("encoder" in n for n in found) == sum("encoder" in n for n in trained(models)["student"]) > 5
    for p in trained(models)["student"].values():
        p.grad = None
    student, c, x = models["student"], method.config, batch()
    t_s = DRAWS.uniform("student time", c.t_min, 1.0)
    z_lq = student.encode(x.x_lq)
    z_in = student.adapt(z_lq, t_s)
    v = student.velocity(z_in, t_s, *([Condition(z_lq, 0 * t_s)] if c.student == "dual" else []))
    z_hat = z_in - (v if c.step == "residual" else t_s.view(-1, 1, 1, 1) * v)
    with torch.no_grad():
        t_v = 0.66 * (t_s if c.coupled else DRAWS.uniform("score time", c.t_min, 1.0))
        s = t_v.clamp(0.02, 0.98).view(-1, 1, 1, 1)
        z_v = (1 - s) * z_hat + s * DRAWS.normal("score noise", z_hat)
        x_real, x_fake = (z_v - s * models[r].velocity(z_v, s.flatten()) for r in ("real", "fake"))
        g = (x_fake - x_real) / (z_hat - x_real).abs().mean((1, 2, 3), keepdim=True)
    error = blur.blurred(student.decode(z_hat) - x.x_hq, *blur.smooth(t_s))
    (error.square().mean() + F.mse_loss(z_hat, (z_hat - g).detach())).backward()
    joint = gradients(models)["student"]
    assert joint.keys() == found.keys() and max((found[n] - g).abs().max() for n, g in joint.items()) < 1e-10
    assert max(g.abs().max() for g in found.values()) > 1e-4


def test_the_encoder_starts_as_the_identity_and_all_of_it_learns():
    method, models = built(noisy=False)
    student = models["student"]
    z, times = latents()[0].repeat(1, 6, 1, 1), [torch.full((3,), t) for t in (0.02, 0.5, 1.0)]
    with torch.no_grad():
        before = models["real"].velocity(z, times[1])
        assert all(torch.equal(student.adapt(z, t), z) for t in times)
    after = train(method, models, updates=3)
    with torch.no_grad():
        low, _, high = (student.adapt(z, t) for t in times)
        assert (low - high).abs().max() > 1e-4
        assert torch.equal(models["real"].velocity(z, times[1]), before)
    found = gradients(models)
    for role, own in found.items():
        assert own.keys() == after[role].keys() and all(g.any() for g in own.values()), role


@pytest.mark.parametrize("student", ["single", "dual"])
def test_each_loss_reaches_its_own_network_and_no_score_sees_the_picture(student):
    """The calls of real and fake score are recorded: the same z_v and t_v give the same, whatever the LQ picture."""
    method, models = built(student=student)
    call, calls, after = models["student"].backbone.call, [], {}

    def recorded(role, part, z_t, t, z_lq=None, *rest):
        out = call(role, part, z_t, t, z_lq, *rest)
        calls.append((role.name, part, out.requires_grad, z_lq is not None))
        return out

    models["student"].backbone.call = recorded
    backpropagate(
        method, models, [batch()], 0, NOW,
        lambda role, value: (value.backward(), after.setdefault(role, gradients(models))),
    )  # fmt: skip
    assert not after["student"]["fake"] and after["student"]["student"]
    assert all(torch.equal(g, after["fake"]["student"][n]) for n, g in after["student"]["student"].items())
    assert after["fake"]["fake"].keys() == trained(models)["fake"].keys()
    assert calls == [
        ("student", "encoder", True, False), ("student", "velocity", True, student == "dual"),
        ("real", "velocity", False, False), ("fake", "velocity", False, False), ("fake", "velocity", True, False),
    ]  # fmt: skip


def test_without_scores_the_blur_alone_trains_one_network():
    method, models = built(lambda_vsd=0.0)
    assert set(models) == {"student"} and "vsd" not in run(method, models)


def test_where_student_and_teacher_agree_the_gradient_is_finite_at_small_times():
    g = Gaussian(0.3, 0.9)
    found = Tadsr(TadsrConfig())._score_gradient(
        {"real": g, "fake": g}, torch.full((3, 12, 4, 4), 0.3), torch.zeros(3), DRAWS, {}
    )
    assert torch.isfinite(found).all() and not found.any()
    w = scores.time_weight("osediff", torch.full((3,), 0.02), latents()[0], latents()[0])
    assert torch.isfinite(w).all()


def test_at_the_low_end_of_the_dial_the_residual_form_changes_as_much_as_at_the_high_end():
    """On the flow's path the network's output weighs t_s = 0.02 there: the step is fifty times shorter."""
    method, models = built(encoder=False)
    z, t_s = latents()[0].repeat(1, 6, 1, 1), torch.full((3,), 0.02)
    as_flow = TadsrConfig(**PLAIN, encoder=False, step="flow")
    with torch.no_grad():
        v = models["student"].velocity(z, t_s)
        assert torch.equal(one_step(models["student"], method.config, z, t_s), z - v)
        assert torch.allclose(one_step(models["student"], as_flow, z, t_s), z - 0.02 * v)


@pytest.mark.parametrize("student", ["single", "dual"])
def test_the_dial_sets_the_time_of_the_one_step(student):
    method, models = built(student=student)
    sampler, z_lq = method.sampler(), latents()[0].repeat(1, 6, 1, 1)
    at = {s: sampler.sample(models["student"], z_lq, z_lq, 1, {"strength": s}) for s in (0.0, 0.02, 0.3, 0.62, 1.0)}
    assert torch.equal(at[0.0], at[0.02])  # the smallest time of the training
    assert torch.equal(at[0.62], sampler.sample(models["student"], z_lq, 0 * z_lq, 1))  # the default, and no noise
    with torch.no_grad():
        wanted = one_step(models["student"], method.config, z_lq, torch.full((3,), 0.3))
    assert torch.equal(at[0.3], wanted) and (at[0.3] - at[1.0]).abs().max() > 1e-3
    for dials, message in (({"strength": 1.5}, "between 0 and 1"), ({"fidelity": 0.5}, "its settings are strength")):
        with pytest.raises(ValueError, match=message):
            sampler.check(1, dials)
    with pytest.raises(ValueError, match="restores in 1 step"):
        sampler.check(4)
    with pytest.raises(ValueError, match="no setting strength: its settings are fidelity"):
        AnyStep().check(1, {"strength": 0.5})
    assert TimedStep(method.config).times(1) == [(0.62, 0.0)]


def test_what_cannot_be_trained_is_named():
    with pytest.raises(ValueError, match="cfg_slope = 5 compare two prompts"):
        built(cfg_slope=5.0)
    for settings, message in (
        ({"lambda_vsd": 0.0, "lambda_mse": 0.0, "lambda_lpips": 0.0}, "nothing to train"),
        ({"s_range": (0.0, 1.0)}, "s_range"),
    ):
        with pytest.raises(ValueError, match=message):
            TadsrConfig(**settings)
