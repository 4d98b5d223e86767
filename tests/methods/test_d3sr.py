"""D3SR: the optimal discriminator in closed form, what reaches which network, and plain torch as the reference."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_score_distillation import NOW, models_of
from torch.distributions import Normal

from teasr.backbones.model import Condition, Model
from teasr.backbones.pixel_cnn import PixelCnn, PixelCnnConfig
from teasr.backbones.tiny import Tiny, TinyConfig
from teasr.backbones.unet.backbone import UNet, UNetConfig
from teasr.data.batch import Batch
from teasr.diffusion import flow, losses, perceptual
from teasr.methods.base import Progress, Ramp
from teasr.methods.d3sr import BINS, D3sr, D3srConfig, _accuracy
from teasr.training.update import backpropagate
from teasr.util.randomness import Draws

AT_ONCE = Ramp(0, 0)
PLAIN = {"lambda_ea_dists": 0.0, "adv_ramp": AT_ONCE, "lambda_adv": 0.5}
REAL, FAKE = (0.4, 0.8), (1.3, 0.5)  # mean and deviation of originals and of results


class Optimal:
    """The best discriminator between two normal laws of the clean latent: one logit for each element."""

    def __init__(self, real=REAL, fake=FAKE):
        self.laws = real, fake

    def snap(self, t):
        return t

    time_at = snap

    def noised(self, law, t):
        a = (1 - t).double()
        return Normal(a * law[0], ((a * law[1]) ** 2 + t.double() ** 2).sqrt())

    def logits(self, z, t):
        t = t.view(-1, 1, 1, 1)
        real, fake = (self.noised(law, t).log_prob(z) for law in self.laws)
        return (real - fake)[:, 0]

    def scores(self, z, t):
        """(score of originals, score of results) at z."""
        laws = [self.noised(law, t) for law in self.laws]
        return tuple((law.mean - z) / law.variance for law in laws)


def test_the_gradient_of_the_optimal_discriminator_is_kl_times_the_probability_of_fake():
    """d L_G / d z_hat = sigma(-l) (1 - t) (score_fake - score_real) / numel, to 12 digits."""
    method, disc, draws = D3sr(D3srConfig(**PLAIN)), Optimal(), Draws(0, 3, tuple(range(8)))
    g = torch.Generator().manual_seed(0)
    z_hat = FAKE[0] + FAKE[1] * torch.randn(8, 1, 5, 5, generator=g, dtype=torch.float64)
    value, found = method._adversarial_gradient(disc, z_hat, draws)
    t = method._times(draws, disc)
    z_t = flow.interpolate(z_hat, draws.normal("fake noise", z_hat), t)
    logits, (score_real, score_fake) = disc.logits(z_t, t), disc.scores(z_t, t.view(-1, 1, 1, 1))
    says_fake = torch.sigmoid(-logits)[:, None]
    wanted = says_fake * (1 - t.view(-1, 1, 1, 1)) * (score_fake - score_real) / z_hat.numel()
    assert (found - wanted).abs().max() < 1e-12 and wanted.abs().max() > 1e-4
    assert torch.allclose(value, -torch.sigmoid(logits).log().mean())
    _, too_high = method._adversarial_gradient(Optimal((0.0, 0.5), (2.0, 0.5)), z_hat, draws)
    assert (too_high > 0).all()  # results whose mean is too high are moved down


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_minimising_the_loss_of_the_discriminator_finds_the_ratio_of_the_laws(t):
    """Logistic regression on 1, y, y^2 at the quantiles of both laws, against log p_real - log p_fake."""
    optimal, u = Optimal(), (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    real, fake = (optimal.noised(law, torch.tensor(t)).icdf(u) for law in (REAL, FAKE))
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def logits(y):
        return w[0] + w[1] * y + w[2] * y**2

    def closure():
        optimizer.zero_grad()
        loss = losses.gan_discriminator(logits(real), logits(fake))
        loss.backward()
        return loss

    optimizer.step(closure)
    y = torch.linspace(-1, 2, 7, dtype=torch.float64)
    wanted = optimal.logits(y.view(1, 1, 1, -1), torch.tensor([t]))[0, 0]
    assert torch.allclose(logits(y), wanted, atol=0.02) and wanted.abs().max() > 0.1


def built(student="single", noisy=True, dists=None, net=None, **settings):
    """A method and its models on small networks in which every adapter set and the head have an effect if `noisy`."""
    method = D3sr(D3srConfig(student=student, **(PLAIN | {"disc_blocks": 1} | settings)), dists=dists)
    return method, models_of(method, noisy=noisy, effective=("head.last",), **(net or {}))


def batch(n=4) -> Batch:
    g = torch.Generator().manual_seed(1)
    x_hq, x_lq = (torch.rand(2, n, 3, 32, 32, generator=g, dtype=torch.float64) * 2 - 1).unbind(0)
    return Batch(x_hq, x_lq, [str(i) for i in range(n)])


def trained(models):
    return {name: model.backbone.trained(name) for name, model in models.items()}


def gradients(models):
    return {role: {n: p.grad for n, p in own.items() if p.grad is not None} for role, own in trained(models).items()}


def run(method, models, progress=NOW, seen=lambda role: None):
    def backward(role, value):
        value.backward()
        seen(role)

    return backpropagate(method, models, [batch()], 0, progress, backward)


def farthest(a, b):
    return max((a[role][n] - p).abs().max().item() for role in b for n, p in b[role].items())


def test_a_zero_head_starts_at_two_log_two_and_moves_nothing():
    logs = run(*built(noisy=False))
    assert logs["disc"].item() == pytest.approx(2 * math.log(2), abs=1e-6)
    assert logs["adv"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert logs["adv_to_pixels"] == 0 and logs["logit_real"] == logs["logit_fake"] == 0
    assert all(logs[name] == 0.5 for name in ("accuracy", *(f"accuracy_t{k + 1}" for k in range(BINS))))


@pytest.mark.parametrize(
    "settings", [{}, {"student": "dual"}, {"discriminator": "copy"}, {"discriminator": "prior"}], ids=str
)
def test_each_loss_reaches_its_own_network_alone(settings):
    """A plain backward pass of L_G would add to the discriminator's gradient, with the wrong sign."""
    method, models = built(**settings)
    after, held = {}, {name: [] for name in models}
    for name, model in models.items():
        base = model.backbone
        held[name] = {n: p.detach().clone() for n, p in base.net.named_parameters() if base.owner(n, p) is None}
    logs = run(method, models, seen=lambda role: after.setdefault(role, gradients(models)))
    assert logs["adv_to_pixels"] > 0
    assert not after["student"]["discriminator"]
    assert max(g.abs().max() for g in after["student"]["student"].values()) > 1e-6
    assert all(torch.equal(g, after["discriminator"]["student"][n]) for n, g in after["student"]["student"].items())
    found = after["discriminator"]["discriminator"]
    assert found.keys() == trained(models)["discriminator"].keys() and all(g.any() for g in found.values())
    for name, model in models.items():
        now = dict(model.backbone.net.named_parameters())
        assert all(now[n].grad is None and torch.equal(now[n], p) for n, p in held[name].items())


def train(method, models, updates):
    optimizers = {name: torch.optim.AdamW(own.values(), lr=1e-2) for name, own in trained(models).items()}
    for update in range(updates):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        backpropagate(method, models, [batch()], 0, Progress(update, updates), lambda role, value: value.backward())
        for optimizer in optimizers.values():
            optimizer.step()
    return {name: {n: p.detach() for n, p in own.items()} for name, own in trained(models).items()}


@pytest.mark.parametrize("student", ["single", "dual"])
def test_plain_torch_in_the_published_order_gives_the_same_weights(student):
    """One graph of the student's whole loss, its step, then the discriminator's: equal to one joint step."""
    torch.manual_seed(0)
    dists = perceptual.load_dists(weights=False).double()
    settings = {"student": student, "dists": dists, "lambda_ea_dists": 0.7, "perceptual_share": 0.25}
    joint = train(*built(**settings), updates=2)
    method, models = built(**settings)
    net, (s_role, d_role) = models["student"].backbone.net, method.roles()
    optimizers = {name: torch.optim.AdamW(own.values(), lr=1e-2) for name, own in trained(models).items()}
    x, encode, decode = batch(), models["student"].encode, models["student"].decode
    for update in range(2):
        draws = Draws(0, update, (0, 1, 2, 3))
        z_hq, z_lq, one = encode(x.x_hq), encode(x.x_lq), torch.ones(4)
        if student == "dual":
            eps = draws.normal("one-step noise", z_lq)
            z_hat = eps - net(eps, one, z_lq, 0 * one, role=s_role)
        else:
            z_hat = z_lq - torch.tensor(0.43).double() * net(z_lq, 0.43 * one, role=s_role)
        t = method._times(draws, models["discriminator"])
        t4, real_noise, fake_noise = (
            t.view(-1, 1, 1, 1),
            draws.normal("real noise", z_lq),
            draws.normal("fake noise", z_lq),
        )

        def logits(z, noise, t=t, t4=t4):
            return net((1 - t4) * z + t4 * noise, t, role=d_role, part="logits")

        x_hat = decode(z_hat)
        first = x_hat[:1], x.x_hq[:1]
        edges = (2 * losses.sobel((y + 1) / 2) - 1 for y in first)
        spatial = F.mse_loss(x_hat, x.x_hq) + 0.7 * (dists(*first) + dists(*edges)).mean()
        total = spatial + 0.5 * torch.log1p(torch.exp(-logits(z_hat, fake_noise))).mean()
        optimizers["student"].zero_grad()
        total.backward()
        optimizers["student"].step()
        real, fake = torch.sigmoid(logits(z_hq, real_noise)), torch.sigmoid(logits(z_hat.detach(), fake_noise))
        optimizers["discriminator"].zero_grad()
        (-real.log().mean() - (1 - fake).log().mean()).backward()
        optimizers["discriminator"].step()
    plain = {name: {n: p.detach() for n, p in own.items()} for name, own in trained(models).items()}
    assert farthest(joint, plain) < 1e-9
    assert farthest(joint, {name: {n: 0 * p for n, p in own.items()} for name, own in plain.items()}) > 1e-3


def test_the_discriminator_is_its_base_up_to_a_block_and_sees_the_time():
    method, models = built(noisy=False)
    disc, z = models["discriminator"], torch.randn(2, 12, 3, 5, dtype=torch.float64)
    t, role = torch.tensor([0.2, 0.8]), disc.role
    with torch.no_grad():
        stock = disc.backbone.net.features(z, t, None, replace(role, trains="head"))  # without its LoRA set
        assert torch.equal(disc.features(z, t), stock) and disc.logits(z, t).shape == (2, 3, 5)
    train(method, models, updates=3)
    found = gradients(models)["discriminator"]
    assert found.keys() == trained(models)["discriminator"].keys() and all(g.any() for g in found.values())
    assert not any("blocks.1." in name for name in found)  # nothing above the block
    with torch.no_grad():
        assert not torch.allclose(disc.features(z, t), stock, atol=1e-4)
        assert not torch.allclose(disc.logits(z, t), disc.logits(z, 1 - t), atol=1e-6)


def test_a_discriminator_of_pictures_sees_what_the_decoder_makes_and_the_noise_level():
    method, models = built(discriminator="prior", t_range=(0.0, 0.0))
    disc, student, draws = models["discriminator"], models["student"], Draws(0, 1, tuple(range(4)))
    x = batch().x_hq
    z, zero = student.encode(x).float().double(), torch.zeros(4)
    value, gradient = method._adversarial_gradient(disc, z, draws, student.decode)
    assert torch.allclose(value, F.softplus(-disc.logits(student.decode(z), zero)).mean())
    at_picture = losses.gradient_through(lambda x: losses.gan_generator(disc.logits(x, zero)), student.decode(z))[1]
    wanted = losses.gradient_through(lambda z: (student.decode(z) * at_picture).sum(), z)[1]
    assert torch.allclose(gradient, wanted, atol=1e-12) and wanted.abs().max() > 1e-8
    assert disc.logits(x, zero).shape == (4, 16, 16)  # one stage
    assert (disc.logits(x, zero) - disc.logits(x, zero + 0.5)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="use it in the section prior of the method d3sr"):
        PixelCnn(PixelCnnConfig())
    with pytest.raises(ValueError, match="disc_blocks = 5, but pixel_cnn has 4 stages"):
        PixelCnn(PixelCnnConfig(), roles=D3sr(D3srConfig(discriminator="prior", disc_blocks=5)).roles()[1:])


def test_every_sample_has_its_own_time_and_the_parts_are_hit_equally():
    method, disc = D3sr(D3srConfig(**PLAIN)), Optimal()
    times = torch.stack([method._times(Draws(0, update, (0, 1, 2, 3)), disc) for update in range(50)])
    parts = ((times - 0.02) / 0.96 * BINS).long()
    assert torch.equal(parts.sort(1).values, torch.arange(BINS).expand(50, BINS))
    assert times.min() >= 0.02 and times.max() <= 0.98 and (parts[:4, 0].sort().values == torch.arange(4)).all()

    def of(samples):
        method, models = built()
        draws = Draws(0, 0, samples)
        for loss in method.losses(models, batch().rows(slice(samples[0], samples[-1] + 1)), draws, NOW):
            loss.value.backward()
        return gradients(models)

    both, first, second = of((0, 1)), of((0,)), of((1,))
    mean = {role: {n: (g + second[role][n]) / 2 for n, g in own.items()} for role, own in first.items()}
    assert farthest(both, mean) < 1e-10 and farthest(both, first) > 1e-6
    still = D3sr(D3srConfig(**PLAIN, t_range=(0.0, 0.0)))
    assert not still._times(Draws(0, 0, (0, 1)), disc).any()  # without noise


def test_accuracy_by_parts_of_the_time():
    real, fake = torch.tensor([[[1.0, 1.0]], [[-1.0, 1.0]]]), torch.tensor([[[-1.0, -1.0]], [[1.0, 1.0]]])
    assert _accuracy(real, fake).tolist() == [1.0, 0.25]
    logs = run(*built())
    assert logs["accuracy"] != 0.5
    assert logs["accuracy"].item() == pytest.approx(sum(logs[f"accuracy_t{k + 1}"] for k in range(BINS)).item() / BINS)


def test_the_discriminator_trains_first_and_its_influence_rises():
    method, models = built(adv_ramp=Ramp(2, 4), lambda_adv=0.8)
    weights = [method.loss_weights(Progress(update, 9)) for update in (0, 2, 4, 9)]
    assert [w["adv"] for w in weights] == [0, 0, 0.4, 0.8] and all(w["disc"] == 1 for w in weights)
    assert (
        "adv" not in run(method, models) and max(p.abs().max() for p in gradients(models)["discriminator"].values()) > 0
    )
    half, whole = (run(*built(lambda_adv=0.8, adv_ramp=ramp), Progress(4, 9)) for ramp in (Ramp(2, 4), AT_ONCE))
    assert whole["adv_to_pixels"].item() == pytest.approx(2 * half["adv_to_pixels"].item(), rel=1e-6)
    alone, models = built(lambda_adv=0.0)
    assert set(models) == {"student"} and "disc" not in run(alone, models) and "disc" not in alone.loss_weights(NOW)


def test_perceptual_losses_of_a_share_are_those_of_the_first_pictures():
    torch.manual_seed(0)
    dists, x = perceptual.load_dists(weights=False).double(), batch()
    for share, n in ((0.5, 2), (0.01, 1)):
        method, models = built(dists=dists, lambda_dists=1.0, lambda_mse=0.0, perceptual_share=share, lambda_adv=0.0)
        z = models["student"].encode(x.x_lq)
        gradient, logs = method._pixel_gradient(models["student"], x, z)
        x_hat = models["student"].decode(z)
        assert torch.allclose(logs["dists"], dists(x_hat[:n], x.x_hq[:n]).mean())
        assert gradient[:n].any() and not gradient[n:].any()


@pytest.mark.parametrize("student", ["single", "dual"])
def test_it_restores_in_one_step_and_says_why_not_in_more(student):
    method, models = built(student)
    z_lq, eps = torch.randn(2, 3, 12, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler, model, one = method.sampler(), models["student"], torch.ones(3)
    found = sampler.sample(model, z_lq, eps, 1)
    with torch.no_grad():
        if student == "dual":
            wanted = eps - model.velocity(eps, one, Condition(z_lq, 0 * one))
        else:
            wanted = z_lq - 0.43 * model.velocity(z_lq, 0.43 * one)
    assert torch.allclose(found, wanted, atol=1e-6) and sampler.step_counts == (1,)
    assert sampler.times(1) == [(1.0 if student == "dual" else 0.43, 0.0)]
    start = "1" if student == "dual" else "0.43"
    with pytest.raises(ValueError, match=rf"steps = 4: this method trains the jump from time {start} to 0 alone"):
        sampler.sample(model, z_lq, eps, 4)


def test_what_makes_no_sense_is_refused():
    for settings, message in (
        ({"t_range": (0.5, 0.2)}, r"method\.t_range .* \[0, 0\] for no noise"),
        ({"t_range": (0.02, 1.0)}, "t_range"),
        ({"lambda_mse": 0.0, "lambda_ea_dists": 0.0}, "nothing would tie the result to the picture"),
    ):
        with pytest.raises(ValueError, match=message):
            D3srConfig(**settings)
    method = D3sr(D3srConfig(discriminator="copy"))
    roles = method.roles()[1:]
    sizes = {"width": 16, "depth": 2, "heads": 2, "latent_channels": 12}
    for backbone in (UNet(UNetConfig(base="random"), roles=roles), Tiny(TinyConfig(**sizes), roles=roles)):
        with pytest.raises(ValueError, match="never trained without an LQ image: use the backbone tiny with a prior"):
            method.check_models({"discriminator": Model(backbone, roles[0])})
