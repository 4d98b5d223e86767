"""backbones/tiny.py: decoupled times, a condition branch that does not affect the noise branch, the codec, learning."""

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from conftest import velocity

from teasr.backbones.lora import add_branch_lora, inject_peft_lora
from teasr.backbones.model import Model
from teasr.backbones.roles import STUDENT
from teasr.backbones.tiny import DualBlock, PCACodec, Tiny, TinyConfig, TinyDiT, attend, precondition
from teasr.data.batch import Batch
from teasr.degradation import degrade, preset
from teasr.diffusion import flow
from teasr.imaging.exact_metrics import psnr as psnr_y
from teasr.imaging.images import to_tensor, upsample
from teasr.methods.base import Progress
from teasr.methods.teasr import Teasr, TeasrConfig
from teasr.restore.pretrained import save
from teasr.restore.upscaler import Upscaler
from teasr.run_config import RunConfig, parse
from teasr.util.randomness import Draws

SMALL = {"width": 32, "depth": 3, "heads": 2, "latent_channels": 16, "lora_rank": 4}


def pairs(n=8, size=64):
    """Crops of a photograph, each with a blurred and noisy version of it."""
    photo = to_tensor(skimage.data.astronaut())
    g = torch.Generator().manual_seed(0)
    for _ in range(n):
        y, x = (int(torch.randint(0, 512 - size, (), generator=g)) for _ in range(2))
        hq = photo[:, y : y + size, x : x + size]
        blurred = torch.nn.functional.avg_pool2d(hq[None], 9, 1, 4, count_include_pad=False)[0]
        yield hq, blurred + 0.1 * torch.randn(hq.shape, generator=g)


def make(randomise=True, **settings) -> Tiny:
    backbone = Tiny(TinyConfig(**(SMALL | settings)))
    backbone.fit(pairs())
    if randomise:
        g = torch.Generator().manual_seed(1)
        for name, parameter in backbone.net.named_parameters():
            if "lora_B" in name or "proj_out" in name:
                parameter.data.normal_(0, 0.3, generator=g)
    return backbone


def a_recipe(backbone: dict) -> RunConfig:
    train = {"updates": 1, "batch": 1, "micro_batch": 1, "learning_rate": 1}
    return parse(
        {"run_dir": "r", "backbone": backbone, "method": {"name": "teasr"}, "data": {"shards": "s"}, "train": train}
    )


def saved_prior(folder) -> Tiny:
    """A prior with its own random weights, saved in a folder."""
    prior = make(conditional=False)
    save(prior, [name for name, _ in prior.net.named_parameters()], a_recipe({"name": "tiny", **SMALL}), folder)
    return prior


def inputs(n=2, channels=16, size=4):
    g = torch.Generator().manual_seed(2)
    z_t, z_lq = torch.randn(2, n, channels, size, size, generator=g).unbind(0)
    return z_t, torch.rand(n, generator=g) * 0.8 + 0.1, z_lq


def seen_by_first_attention(backbone: Tiny, *arguments) -> torch.Tensor:
    """Noise-branch tokens at the input of the projections of the first attention, [B, L, D]."""
    seen = []
    layer = backbone.net.blocks[0].to_v.base_layer
    handle = layer.register_forward_hook(lambda _module, args, _out: seen.append(args[0][:, 0].detach().clone()))
    with torch.no_grad():
        velocity(backbone, *arguments)
    handle.remove()
    return seen[0]


def test_condition_lora_and_target_time_leave_the_noise_branch_alone_before_attention():
    """DTC: whatever the LoRA, t_tar and z_lq are, noise tokens enter the first attention unchanged."""
    backbone = make()
    z_t, t, z_lq = inputs()
    reference = seen_by_first_attention(backbone, z_t, t, z_lq, t)
    for name, parameter in backbone.net.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(-3.7)
    assert torch.equal(seen_by_first_attention(backbone, z_t, t, z_lq, t), reference)
    assert torch.equal(seen_by_first_attention(backbone, z_t, t, -z_lq, -t), reference)
    assert not torch.equal(seen_by_first_attention(backbone, z_t, t / 2, z_lq, t), reference)


def test_fused_timestep_ablation_does_reach_the_noise_branch():
    backbone = make(decoupled_timestep=False)
    z_t, t, z_lq = inputs()
    one, other = (seen_by_first_attention(backbone, z_t, t, z_lq, r) for r in (t, -t))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("decoupled", [True, False])
def test_velocity_tells_the_sign_and_value_of_the_target_time(decoupled):
    backbone = make(decoupled_timestep=decoupled)
    z_t, s, z_lq = inputs()
    with torch.no_grad():
        real, fake, zero = (velocity(backbone, z_t, s, z_lq, r) for r in (s, -s, 0 * s))
    scale = real.std()
    assert (real - fake).abs().mean() > 1e-3 * scale and (real - zero).abs().mean() > 1e-3 * scale


def test_condition_and_lora_do_reach_the_output():
    backbone = make()
    z_t, t, z_lq = inputs()
    with torch.no_grad():
        before = velocity(backbone, z_t, t, z_lq, t)
        for name, parameter in backbone.net.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert not torch.allclose(velocity(backbone, z_t, t, z_lq, t), before, atol=1e-4)


def test_starts_at_the_lq_picture():
    """With a zero output and the skip, the one-step estimate (eq. 6) is z_lq before any training."""
    backbone = make(randomise=False)
    z_t, _, z_lq = inputs()
    one = torch.ones(2)
    with torch.no_grad():
        z_hat = flow.z0_from_velocity(z_t, velocity(backbone, z_t, one, z_lq, 0 * one), one)
    assert torch.allclose(z_hat, z_lq, atol=1e-5)


def test_preconditioning_is_the_posterior_mean_of_the_velocity():
    """Against a regression of v on z_t over many samples of the Gaussian model from which it is derived."""
    backbone = make(randomise=False)
    sigma = backbone.net.residual.double()
    g = torch.Generator().manual_seed(0)
    n, t = 200_000, 0.6
    d, eps = (
        sigma[:1] * torch.randn(n, generator=g, dtype=torch.float64),
        torch.randn(n, generator=g, dtype=torch.float64),
    )
    y, v = (1 - t) * d + t * eps, eps - d
    slope = (y @ v) / (y @ y)
    ones = torch.ones(1, 16, 1, 1)
    with torch.no_grad():
        out = velocity(backbone, ones, torch.tensor([t]), 0 * ones, torch.tensor([t]))[0, 0, 0, 0]
    assert out.item() == pytest.approx(slope.item(), abs=0.01)


def test_checkpointing_changes_nothing():
    z_t, t, z_lq = inputs()
    grads = []
    for on in (False, True):
        backbone = make(gradient_checkpointing=on)
        velocity(backbone, z_t, t, z_lq, -t).square().mean().backward()
        grads.append([p.grad for p in backbone.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_every_trained_parameter_gets_a_gradient_and_no_other(train):
    """A parameter without a gradient would break data-parallel training; a frozen base must stay frozen."""
    backbone = make(train=train, base="random")
    z_t, t, z_lq = inputs()
    velocity(backbone, z_t, t, z_lq, t / 2).square().mean().backward()
    for name, parameter in backbone.net.named_parameters():
        wanted = train == "full" or "lora_" in name
        assert parameter.requires_grad == wanted, name
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == wanted, name


def test_lora_needs_a_prior_and_starts_from_one(tmp_path):
    """The prior's weights and codec are kept bit for bit; the residual, which depends on LQ, is fitted again."""
    with pytest.raises(ValueError, match=r"backbone\.base"):
        TinyConfig(train="lora")
    with pytest.raises(ValueError, match="nowhere"):
        Tiny(TinyConfig(**SMALL, train="lora", base=str(tmp_path / "nowhere")))
    prior = saved_prior(tmp_path / "prior")
    backbone = Tiny(TinyConfig(**SMALL, train="lora", base=str(tmp_path / "prior")))
    own = {name.replace(".base_layer", ""): p for name, p in backbone.net.named_parameters() if "lora_" not in name}
    assert own.keys() == dict(prior.net.named_parameters()).keys()
    assert all(torch.equal(own[name], p) for name, p in prior.net.named_parameters())
    assert backbone.needs_fit
    backbone.fit((hq, -hq) for hq, _ in pairs())
    assert torch.equal(backbone.codec.basis, prior.codec.basis) and not backbone.needs_fit
    assert (backbone.codec.residual > 1.5 * prior.codec.spread).all()
    with pytest.raises(ValueError, match="cannot be loaded"):
        Tiny(TinyConfig(**(SMALL | {"width": 40}), base=str(tmp_path / "prior")))


def test_a_prior_of_another_size_can_share_the_codec_of_a_prior(tmp_path):
    """Fitting to other pairs of images leaves this codec unchanged, so both models have the same latents."""
    prior = saved_prior(tmp_path / "prior")
    settings = SMALL | {"width": 64, "codec": str(tmp_path / "prior"), "conditional": False}
    larger = Tiny(TinyConfig(**settings))
    larger.fit((-hq, lq) for hq, lq in pairs())
    assert all(torch.equal(getattr(larger.codec, n), getattr(prior.codec, n)) for n in ("mean", "basis", "scale"))
    assert torch.equal(larger.net.spread, prior.net.spread)
    larger.share_codec(prior)
    with pytest.raises(ValueError, match=r"backbone\.codec = .*nowhere cannot be loaded"):
        Tiny(TinyConfig(**(settings | {"codec": str(tmp_path / "nowhere")})))
    with pytest.raises(ValueError, match=r"backbone\.codec = .*prior cannot be loaded"):
        Tiny(TinyConfig(**(settings | {"latent_channels": 8})))
    with pytest.raises(ValueError, match=r"has its own codec: remove backbone\.codec"):
        TinyConfig(**(SMALL | {"codec": "a", "base": "b"}))


def test_a_prior_is_blind_to_the_condition_and_its_model_is_refused_as_a_base(tmp_path):
    prior = make(conditional=False)
    z_t, t, z_lq = inputs()
    with torch.no_grad():
        assert torch.equal(velocity(prior, z_t, t, z_lq, t), velocity(prior, z_t, t, -z_lq, -t))
    assert not any("lora" in name for name, _ in prior.net.named_parameters())
    with pytest.raises(ValueError, match="unconditional prior"):
        Upscaler(Model(prior))
    with pytest.raises(ValueError, match=r"leave backbone\.base"):
        TinyConfig(conditional=False, base="elsewhere")
    settings = {"name": "tiny", **SMALL}
    save(make(), [name for name, _ in make().net.named_parameters()], a_recipe(settings), tmp_path / "whole")
    with pytest.raises(ValueError, match="is not a prior"):
        Tiny(TinyConfig(**SMALL, base=str(tmp_path / "whole")))


def test_a_lora_can_start_at_the_prior_instead_of_the_lq_picture(tmp_path):
    """Without the skip and before training, the output for noise is the prior's; the condition enters by attention."""
    prior = saved_prior(tmp_path / "prior")
    settings = SMALL | {"train": "lora", "base": str(tmp_path / "prior"), "output_skip": False}
    backbone = Tiny(TinyConfig(**settings))
    backbone.fit(pairs())
    z_t, t, z_lq = inputs()
    one = torch.ones(2)
    out = torch.zeros_like(z_t)
    mean = flow.z0_from_velocity(z_t, precondition(out, z_t, one, out, prior.net.spread), one)
    assert torch.allclose(mean, out, atol=1e-5)
    with torch.no_grad():
        assert not torch.equal(velocity(backbone, z_t, t, z_lq, t), velocity(backbone, z_t, t, -z_lq, t))


def test_the_share_of_its_own_place_is_zero_or_learnt(tmp_path):
    """A zero share equals the network without it, and a non-zero share changes the output.

    The share of each token's own position is trained with a frozen base too. A prior has no such share.
    """
    z_t, t, z_lq = inputs()
    with torch.no_grad():
        without, zero, half = (velocity(make(pair=share), z_t, t, z_lq, 0 * t) for share in (None, 0.0, 0.5))
    assert torch.allclose(zero, without, atol=1e-6) and not torch.allclose(half, without, atol=1e-3)
    saved_prior(tmp_path / "prior")
    backbone = Tiny(TinyConfig(**SMALL, train="lora", base=str(tmp_path / "prior"), pair=0.5))
    backbone.fit(pairs())
    velocity(backbone, z_t, t, z_lq, 0 * t).square().mean().backward()
    shares = [p for name, p in backbone.net.named_parameters() if name.endswith(".pair")]
    assert len(shares) == 3 and all(bool((p.grad != 0).all()) for p in shares)
    with pytest.raises(ValueError, match=r"backbone\.pair"):
        TinyConfig(conditional=False, pair=0.5)


@pytest.mark.parametrize("length", [64, 600])
def test_attention_in_bf16_on_the_cpu_is_attention(length):
    """Two matrix products up to 512 tokens, the fused kernel beyond: both are as accurate as bf16 allows."""
    q, k, v = torch.randn(3, 2, 4, length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    low = attend(*(x.bfloat16() for x in (q, k, v)))
    assert low.dtype == torch.bfloat16
    assert (low - exact).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert (attend(q, k, v) - exact).abs().max() < 0.03


def test_positions_are_shared_between_branches():
    """Shifting both latents would only shift the output if positions had no effect; they do have one."""
    backbone = make()
    z_t, t, z_lq = inputs()
    with torch.no_grad():
        v = velocity(backbone, z_t, t, z_lq, t)
        rolled = velocity(backbone, z_t.roll(1, -1), t, z_lq.roll(1, -1), t)
    assert not torch.allclose(v.roll(1, -1), rolled, atol=1e-3)


def test_same_seed_same_weights_other_seed_other():
    a, b, c = (Tiny(TinyConfig(**SMALL), seed=s).net.blocks[0].fc1.base_layer.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_codec_keeps_photographs():
    codec = PCACodec(48, whiten=0.5)
    with pytest.raises(ValueError, match="no images"):
        codec.fit([])
    codec.fit(list(pairs(12)))
    assert torch.allclose(codec.basis @ codec.basis.T, torch.eye(48), atol=1e-5)
    x = torch.stack([hq for hq, _ in pairs(12)])
    z = codec.encode(x)
    assert z.shape == (12, 48, 8, 8)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    assert (codec.decode(z) - x).square().mean() < 4 * 10 ** (-35 / 10)  # 35 dB; the range [-1, 1] is 2 wide
    assert torch.allclose(codec.encode(codec.decode(z)), z, atol=1e-4)
    whole = PCACodec(192, whiten=0.0)
    whole.fit(list(pairs(12)))
    assert torch.allclose(whole.decode(whole.encode(x)), x, atol=1e-4)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"60x64 px.*multiples of 8"):
        make().encode(torch.zeros(1, 3, 64, 60))
    with pytest.raises(ValueError, match="width"):
        TinyConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="latent_channels"):
        TinyConfig(latent_channels=193)


def test_last_block_reads_condition_tokens_only_through_keys_and_values():
    block = DualBlock(16, 2, 2)
    x = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    angles = torch.zeros(8, 4)
    out = block(x, torch.zeros(1, 2, 16), angles.cos(), angles.sin(), STUDENT.adapters, last=True)
    assert out.shape == (1, 4, 16)


def test_overfitting_one_batch_at_one_step_exceeds_bicubic_by_3_db():
    """The full objective on one batch of 8 crops: the one-step PSNR-Y must exceed that of the LQ image by far."""
    photo, rng = skimage.data.coffee(), np.random.default_rng(0)
    hq = [np.ascontiguousarray(photo[100 + 35 * i : 164 + 35 * i, 60 * i : 60 * i + 64]) for i in range(7)] + [
        photo[:64, :64]
    ]
    lq = [degrade(np.ascontiguousarray(x), preset("osediff"), rng)[0] for x in hq]
    up = [upsample(x, 4) for x in lq]
    batch = Batch(torch.stack([to_tensor(x) for x in hq]), torch.stack([to_tensor(x) for x in up]), ["x"] * 8)
    backbone = Tiny(TinyConfig(width=64, depth=3, heads=4, lora_rank=8))
    backbone.fit(zip(batch.x_hq, batch.x_lq, strict=True))
    method = Teasr(TeasrConfig(lambda_lpips=0.0, lambda_mse=10.0, ramps={}, w_cap=10.0))
    optimizer = torch.optim.Adam(backbone.net.parameters(), lr=3e-3)
    for update in range(260):
        for loss in method.losses(
            {"student": Model(backbone)}, batch, Draws(0, update, tuple(range(8))), Progress(update, 260)
        ):
            loss.value.backward()
        torch.nn.utils.clip_grad_norm_(backbone.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    upscaler = Upscaler(Model(backbone))
    ours = [psnr_y(upscaler(x, steps=1), y) for x, y in zip(lq, hq, strict=True)]
    bicubic = [psnr_y(x, y) for x, y in zip(up, hq, strict=True)]
    assert np.mean(ours) >= np.mean(bicubic) + 3, (np.mean(ours), np.mean(bicubic))


def test_lora_starts_and_acts_as_pefts():
    """The same names, initial bits and draws from the generator, and the same output with non-zero weights."""
    outputs, starts = [], []
    for add in (add_branch_lora, inject_peft_lora):
        torch.manual_seed(0)
        net = TinyDiT(TinyConfig(width=32, depth=2, heads=2))
        add(net, net.lora_targets(STUDENT), 4, 8)
        starts.append({name: x.clone() for name, x in net.state_dict().items()} | {"next draw": torch.randn(3)})
        for name, parameter in net.named_parameters():
            if "lora_B" in name or "proj_out" in name:
                torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        z, t = torch.randn(2, 48, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.9])
        outputs.append(net(z, t, z, -t).detach())
    assert list(starts[0]) == list(starts[1]) and all(torch.equal(starts[0][name], x) for name, x in starts[1].items())
    assert torch.equal(*outputs) and outputs[0].std() > 0.1
