"""backbones/unet and methods/coarse.py: codec, preconditioning, separate times, locality, both stages of training."""

import csv

import numpy as np
import pytest
import skimage.data
import torch
from conftest import partitioning, small_recipe, velocity
from test_training import start

from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.backbones.unet.backbone import AXES, UNet, UNetConfig
from teasr.backbones.unet.network import residual_state, velocity_of
from teasr.data.batch import Batch
from teasr.imaging import images
from teasr.methods.base import Progress
from teasr.methods.coarse import Coarse, CoarseConfig
from teasr.methods.sampler import Restarts
from teasr.restore.upscaler import Upscaler
from teasr.util.randomness import Draws

SMALL = {"noise_widths": (12, 16, 20), "condition_widths": (8, 10, 12), "depth": 1, "trunk_width": 12, "trunk_depth": 2}


def make(randomise=True, **settings) -> UNet:
    backbone = UNet(UNetConfig(**(SMALL | {"base": "random"} | settings)))
    if randomise:  # layers that start at zero would hide every effect
        g = torch.Generator().manual_seed(1)
        for parameter in backbone.net.parameters():
            if not parameter.any():
                parameter.data.normal_(0, 0.1, generator=g)
    return backbone


def inputs(n=2, size=8):
    g = torch.Generator().manual_seed(2)
    z_t, z_lq = torch.randn(2, n, 48, size, size, generator=g).unbind(0)
    return z_t, torch.rand(n, generator=g) * 0.8 + 0.1, z_lq


def test_the_codec_is_invertible_and_its_axes_orthonormal():
    backbone, x = make(), torch.rand(2, 3, 32, 48) * 2 - 1
    z = backbone.encode(x)
    assert z.shape == (2, 48, 8, 12) and (backbone.decode(z) - x).abs().max() < 1e-5
    assert (AXES @ AXES.T - torch.eye(3)).abs().max() < 1e-6
    grey = backbone.encode(torch.full((1, 3, 16, 16), 0.5))
    assert (grey[:, :16] - 0.5 * 3**0.5 / 0.3).abs().max() < 1e-5 and grey[:, 16:].abs().max() < 1e-5
    with pytest.raises(ValueError, match="multiples of 16"):
        backbone.encode(torch.zeros(1, 3, 24, 32))


def test_untrained_one_step_gives_the_lq_image():
    backbone = make(randomise=False)
    z_lq, eps = inputs()[2], inputs()[0]
    one = torch.ones(2)
    assert (eps - velocity(backbone, eps, one, z_lq, 0 * one) - z_lq).abs().max() < 1e-5


def test_preconditioning_is_the_posterior_mean_and_finite_at_both_ends():
    """With z0 ~ N(start, sd^2), regress v on y by sampling; at t = 0 and 1 nothing diverges."""
    g = torch.Generator().manual_seed(0)
    n, start, sd = 200_000, torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    for value in (0.1, 0.5, 0.9):
        t = torch.full((1,), value, dtype=torch.float64)
        z0, eps = start + sd * torch.randn(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g).double()
        z_t, v = (1 - value) * z0 + value * eps, eps - z0
        y, variance = residual_state(z_t[None], t, start, sd)
        predicted = velocity_of(torch.zeros_like(y), y, variance, t, start, sd)[0]
        error = v - predicted
        assert abs((error * y[0]).mean()) < 5e-3 and abs(error.mean()) < 5e-3  # nothing linear is left to learn
        assert error.std() == pytest.approx(float(sd / variance.mean().sqrt()), rel=0.01)  # and F has unit variance
    backbone = make()
    for value in (0.0, 1.0):
        z_t, _, z_lq = inputs()
        assert velocity(backbone, z_t, torch.full((2,), value), z_lq, torch.zeros(2)).isfinite().all()


def test_each_branch_sees_its_own_time():
    """t_cur reaches the noise branch alone, t_tar (with its sign) the condition branch alone."""
    backbone, (z_t, t, z_lq) = make(), inputs()
    seen = {}
    for name in ("noise", "condition"):
        block = getattr(backbone.net.levels[0], name)[0]
        block.register_forward_hook(lambda _m, args, _out, name=name: seen.setdefault(name, []).append(args[1].clone()))
    for t_cur, t_tar in ((t, 0 * t), (t, t), (0.5 * t, t), (t, -t)):
        velocity(backbone, z_t, t_cur, z_lq, t_tar)
    noise, condition = seen["noise"], seen["condition"]
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[1], noise[3]) and not torch.equal(noise[1], noise[2])
    assert torch.equal(condition[1], condition[2]) and not torch.equal(condition[0], condition[1])
    assert not torch.equal(condition[1], condition[3])  # the sign
    with torch.no_grad():
        real, fake = (velocity(backbone, z_t, t, z_lq, s * t) for s in (1, -1))
    assert (real - fake).abs().max() > 1e-4
    fused = make(decoupled_timestep=False)
    block, seen = fused.net.levels[0].noise[0], {}
    block.register_forward_hook(lambda _m, args, _out: seen.setdefault("noise", []).append(args[1].clone()))
    velocity(fused, z_t, t, z_lq, t)
    velocity(fused, z_t, t, z_lq, 0 * t)
    assert not torch.equal(*seen["noise"])


def test_what_is_far_away_does_not_matter():
    """No attention and no statistics over positions: a crop with enough context gives the interior of the whole."""
    backbone = make()
    g = torch.Generator().manual_seed(3)
    z_t, z_lq = torch.randn(2, 1, 48, 72, 72, generator=g).unbind(0)
    t = torch.tensor([0.4])
    with torch.no_grad():
        whole = velocity(backbone, z_t, t, z_lq, 0 * t)
        part = velocity(backbone, z_t[..., :64, 8:], t, z_lq[..., :64, 8:], 0 * t)
    assert (whole[..., 28:36, 36:44] - part[..., 28:36, 28:36]).abs().max() < 1e-3


def test_a_frozen_trunk_is_evaluated_once_per_latent():
    backbone, (z_t, t, z_lq) = make(), inputs()
    calls = []
    backbone.net.trunk.first.register_forward_hook(lambda *_: calls.append(1))
    first = velocity(backbone, z_t, t, z_lq, t)
    assert torch.equal(velocity(backbone, z_t, t, z_lq, t), first) and len(calls) == 1
    assert not torch.equal(velocity(backbone, z_t, t, z_lq + 1, t), first) and len(calls) == 2
    trained = UNet(UNetConfig(**SMALL, train="trunk"))
    trained.net.trunk.first.register_forward_hook(lambda *_: calls.append(1))
    Model(trained).coarse(z_lq)[0].sum().backward()
    Model(trained).coarse(z_lq)
    assert len(calls) == 4 and trained.net.trunk.first.weight.grad is not None
    assert all(n.startswith("trunk.") for n in trained.trained("student"))
    assert not any(n.startswith("trunk.") for n in backbone.trained("student"))
    assert any(n.startswith("trunk.") for n in backbone.exported())


def test_a_network_without_lq_has_the_noise_branch_alone():
    backbone = UNet(UNetConfig(**SMALL, base="random"), roles=(Role("student", branches="single"),))
    z_t, t, _ = inputs()
    assert Model(backbone, backbone.roles[0]).velocity(z_t, t).shape == z_t.shape
    assert Model(backbone, backbone.roles[0]).features(z_t, t).shape == (2, 20, 2, 2)


def test_the_coarse_losses_train_their_own_outputs():
    """MSE trains the restoration alone; the likelihood trains the standard deviation alone, to the true error."""
    backbone = UNet(UNetConfig(**SMALL, train="trunk"))
    g = torch.Generator().manual_seed(0)
    x_lq = torch.rand(4, 3, 32, 32, generator=g) * 2 - 1
    batch = Batch(x_lq + 0.2 * torch.randn(x_lq.shape, generator=g), x_lq, list("abcd"))
    model, method = Model(backbone), Coarse(CoarseConfig(lambda_mse=1e-9, lambda_nll=1.0))

    def loss():
        return next(method.losses({"student": model}, batch, Draws(0, 0, (0, 1, 2, 3)), Progress(0, 1)))

    loss().value.backward()
    out, sd = backbone.net.trunk.to_image.out.weight.grad, backbone.net.trunk.to_log_sd.bias.grad
    assert out.abs().max() < 1e-6 and sd.abs().max() > 1e-3
    optimizer = torch.optim.Adam([backbone.net.trunk.to_log_sd.bias], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss().value.backward()
        optimizer.step()
    error = (backbone.encode(batch.x_hq) - model.coarse(backbone.encode(x_lq))[0]).detach().unflatten(1, (3, 16))
    expected = error.square().mean((0, 2, 3, 4)).sqrt().clamp(max=np.exp(1.5))
    assert backbone.net.trunk.to_log_sd.bias.detach().exp() == pytest.approx(expected, rel=0.05)


def rows(run):
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader((run / "metrics.csv").open())]


def test_both_stages_train_resume_and_restore(shards, tmp_path):
    """Trunk, then branches on it: ZeRO stages agree, a resumed run has the same bits, and the trunk stays as it was."""
    zero3 = str(partitioning("zero3", tmp_path))
    trunk = {"backbone": {"name": "unet", "train": "trunk", **SMALL}, "method": {"name": "coarse"}}
    branches = {
        "backbone": {"name": "unet", "base": str(tmp_path / "trunk"), **SMALL},
        "method": {
            "name": "teasr", "lambda_mse": 10.0, "lambda_lpips": 0.0, "w_cap": 10.0, "lambda_restart": 1.0,
            "mode": "split", "split": [0.25, 0.25, 0.25, 0.25], "sampler": "restart", "rectify_range": [0.05, 0.5],
            "ramps": {},
        },
        "train__batch": 4, "train__micro_batch": 4, "data__crop_px": 32,
    }  # fmt: skip
    jobs = [small_recipe(shards, tmp_path / "trunk", train__updates=4, preview={"steps": [1]}, **trunk)]
    jobs += [small_recipe(shards, tmp_path / "whole", train__updates=4, **branches)]
    shown = {"train__deepspeed": zero3, "preview": {"steps": [1], "pictures": 1}}  # with both ends of the dial
    jobs += [small_recipe(shards, tmp_path / "zero3", train__updates=4, **branches | shown)]
    jobs += [small_recipe(shards, tmp_path / "halves", train__updates=n, **branches) for n in (2, 4)]
    start(jobs, tmp_path, 1)
    whole = rows(tmp_path / "whole")
    assert {"flow", "cons", "adv", "rectify", "mse", "restart", "restart_mse"} <= set(whole[-1])
    before, *partitioned = rows(tmp_path / "zero3")
    assert {"preview/psnr_y_1", "preview/psnr_y_1_at_0", "preview/psnr_y_1_at_1"} <= set(before)
    for a, b in zip(whole, partitioned, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    weights = [tmp_path / run / "checkpoints/step-00000004/weights.safetensors" for run in ("whole", "halves")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    first, upscaler = (Upscaler.from_pretrained(tmp_path / run) for run in ("trunk", "whole"))
    trunks = [{n: p for n, p in u.backbone.net.named_parameters() if n.startswith("trunk.")} for u in (first, upscaler)]
    assert all(torch.equal(trunks[0][n], trunks[1][n]) for n in trunks[0])
    assert isinstance(upscaler.sampler, Restarts)
    lq = np.ascontiguousarray(skimage.data.coffee()[:20, :28])
    restored = upscaler(lq, steps=3)
    assert restored.shape == (80, 112, 3) and not np.array_equal(restored, upscaler(lq, steps=1))
    assert np.array_equal(Upscaler.from_pretrained(upscaler.save_pretrained(tmp_path / "saved"))(lq, steps=3), restored)
    with pytest.raises(ValueError, match="this model restores in 1 step"):
        first(lq, steps=2)
    coarse = images.to_uint8(
        first.backbone.decode(
            Model(first.backbone).coarse(first.backbone.encode(images.to_tensor(images.resize(lq, 80, 112))[None]))[0]
        )[0]
    )
    assert np.abs(first(lq).astype(int) - coarse).max() <= 1  # one step of the first stage is the coarse restoration


def test_mistakes(tmp_path):
    for settings, message in (
        ({"train": "trunk", "base": "random"}, "train the trunk without a base"),
        ({"train": "branches", "base": None}, "train the trunk without a base"),
        ({"noise_widths": (8, 8)}, "give one width per resolution in both"),
        ({"depth": 0}, "must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetConfig(**(SMALL | {"base": "random"} | settings))
    with pytest.raises(ValueError, match=r"backbone.base = .*nowhere cannot be loaded"):
        UNet(UNetConfig(**SMALL, base=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="must be > 0"):
        CoarseConfig(lambda_mse=0)
    from test_tiny import make as tiny

    with pytest.raises(ValueError, match="has no coarse restoration"):
        Model(tiny()).coarse(torch.zeros(1, 16, 4, 4))
