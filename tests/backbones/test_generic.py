"""Every backbone that uses backbones/generic (Qwen-Image has files of its own): tiny random weights, the real classes.

The reference is diffusers' own forward where there is no condition, and the network written out in plain PyTorch
(large.py) where there is one.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from conftest import partitioning, small_recipe
from large import CASES, VAE, give_effect, settings
from safetensors.torch import load_file
from test_training import start

from teasr import Upscaler, registry
from teasr.backbones import lora_file
from teasr.backbones.generic.codec import KLCodec
from teasr.backbones.model import Condition, Model
from teasr.backbones.roles import STUDENT, Role
from teasr.commands.export import main as export

REAL, FAKE = Role("real", branches="single", trains="nothing"), Role("fake", branches="single", rank=2)
CRITIC = Role("critic", branches="single", blocks=1, head=True)
ROLES = (STUDENT, FAKE, REAL, CRITIC)
T = torch.tensor([1.0, 0.0, 0.3])  # both ends, where a time that is mapped wrongly is another time
TAR = torch.tensor([0.0, -1.0, -0.3])


@pytest.fixture(scope="module", params=sorted(CASES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    return CASES[name].save(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def latents():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 4, 8, 6, generator=generator) for _ in range(2)]


def build(name, folder=None, roles=ROLES, effect=True, **changes):
    own = settings(name, folder, **changes)
    own.pop("name")
    kind, cls = registry.BACKBONES[name]()
    made = cls(kind(**own), roles=roles)
    made.to(torch.device("cpu"))
    if effect:
        give_effect(made.net)
    return made


def stock(name, folder, dtype=torch.float32):
    import diffusers

    return getattr(diffusers, CASES[name].stock).from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)


def text_of(backbone):
    return backbone.net.prompt.expand(3, -1, -1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_condition_it_is_diffusers_own_forward_bit_for_bit(name, folder, latents, dtype):
    """For a role without LoRA, beside roles whose LoRA has an effect, and at both ends of time.

    In bf16 the norms of queries and keys are rounded once instead of twice, so only nearly so.
    """
    backbone = build(name, folder, dtype=dtype)
    kind = backbone.net.prompt.dtype
    theirs = CASES[name].run_stock(stock(name, folder, kind), latents[0].to(kind), T, text_of(backbone)).float()
    ours = Model(backbone, REAL).velocity(latents[0], T)
    assert ours.shape == latents[0].shape and ours.dtype == torch.float32
    if dtype == "fp32":
        assert torch.equal(ours, theirs)
    else:
        assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


def factors(net, which):
    """The LoRA factors of a set by layer: {layer: (A, B)}, as leaves of their own."""
    found = {}
    for key, p in net.transformer.named_parameters():
        layer, _, rest = key.partition(".lora_")
        if rest.endswith(f".{which}.weight"):
            found.setdefault(layer, []).append(p.detach().clone().requires_grad_())
    return {layer: tuple(pair) for layer, pair in found.items()}


@pytest.mark.parametrize("role", [STUDENT, FAKE], ids=lambda role: role.name)
def test_forward_and_one_update_are_those_of_the_network_written_out(name, folder, latents, role):
    """The condition tokens alone (for a single branch: the noise tokens alone) carry the LoRA, at their own time."""
    backbone, case = build(name, folder), CASES[name]
    weights = stock(name, folder).state_dict()
    lora = factors(backbone.net, "default" if role == STUDENT else role.name)
    assert len(lora) == case.adapted[role == FAKE]
    z, z_lq = latents
    if role == STUDENT:
        wanted = case.plain(weights, lora, 1, z, T, text_of(backbone), z_lq, TAR)
        found = Model(backbone, role).velocity(z, T, Condition(z_lq, TAR))
    else:
        wanted = case.plain(weights, lora, 0, z, T, text_of(backbone))
        found = Model(backbone, role).velocity(z, T)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    update_both(backbone, role, lora, found, wanted)


def update_both(backbone, role, lora, found, wanted):
    """One step down the gradient of the same loss: our parameters and the leaves written out move alike."""
    ours, which = backbone.trained(role.name), role.adapter_set
    for value, leaves in ((found, list(ours.values())), (wanted, [p for pair in lora.values() for p in pair])):
        value.square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in leaves)
        torch.optim.SGD(leaves, lr=0.1).step()
    assert not any(p.grad is not None for n, p in backbone.net.named_parameters() if n not in ours)
    for layer, pair in lora.items():
        for factor, p in zip("AB", pair, strict=True):
            mine = ours[f"transformer.{layer}.lora_{factor}.{which}.weight"]
            assert (mine - p).abs().max() < 1e-5 * p.abs().max(), layer


def gradients(backbone, role, latents):
    backbone.net.zero_grad()
    condition = Condition(latents[1], TAR) if role.branches == "dual" else Condition()
    model = Model(backbone, role)
    out = model.logits(latents[0], T) if role.head else model.velocity(latents[0], T, condition)
    Model(backbone, FAKE if role == STUDENT else STUDENT).velocity(
        latents[0], T, Condition() if role == STUDENT else Condition(latents[1], TAR)
    )
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in backbone.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": False}, {"swap_blocks": 2}, {"attention_backend": "native"}], ids=str
)
def test_recomputation_swap_and_the_attention_backend_change_no_bit(name, folder, latents, changes):
    """Another role runs between a role's forward and backward pass; each parameter still gets its own gradient."""
    for role in (STUDENT, FAKE, CRITIC):
        a, b = build(name, folder), build(name, folder, **changes)
        (x, g), (y, h) = gradients(a, role, latents), gradients(b, role, latents)
        assert torch.equal(x, y) and set(g) == set(h) == set(a.trained(role.name))
        assert all(torch.equal(g[n], h[n]) for n in g) and all(value.any() for value in g.values())


@torch.no_grad()
@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.15), ("nf4", 0.5)])
def test_quantised_weights_stay_near(name, folder, latents, kind, most):
    full, small = build(name, folder), build(name, folder, quantise=kind)
    v, w = (Model(b).velocity(latents[0], T, Condition(latents[1], TAR)) for b in (full, small))
    assert 0 < (v - w).square().mean().sqrt() / v.std() < most


@torch.no_grad()
def test_features_end_where_the_role_does(name, folder, latents):
    backbone = build(name, folder)
    before = Model(backbone, CRITIC).features(latents[0], T)
    assert before.shape == (3, backbone.net.transformer.inner_dim, 4, 3)
    assert Model(backbone, CRITIC).logits(latents[0], T).shape == (3, 4, 3)
    for p in backbone.net.transformer.blocks[1].parameters():
        p.add_(1.0)
    assert torch.equal(Model(backbone, CRITIC).features(latents[0], T), before)


@torch.no_grad()
def test_the_codec_is_diffusers_vae_with_its_scale_and_shift(folder):
    import diffusers

    codec = KLCodec.from_pretrained(str(folder), torch.float32)
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    z = codec.encode(x)
    shift, scale = VAE["shift_factor"], VAE["scaling_factor"]
    assert (z - (vae.encode(x).latent_dist.mode() - shift) * scale).abs().max() < 1e-6
    assert (codec.decode(z) - vae.decode(z / scale + shift).sample).abs().max() < 1e-5
    half = KLCodec.from_pretrained(str(folder), torch.bfloat16)
    assert half.encode(x).dtype == torch.float32 and half.sha256() == codec.sha256()


def test_the_contract_and_mistakes(name, folder, tmp_path):
    backbone = build(name, folder, roles=(STUDENT,))
    x = torch.rand(1, 3, 48, 32) * 2 - 1
    assert backbone.decode(backbone.encode(x)).shape == x.shape
    assert backbone.latent_channels == 4 and backbone.has_prior and backbone.takes_text
    with pytest.raises(ValueError, match="multiples of 16"):
        backbone.encode(torch.zeros(1, 3, 40, 48))
    with pytest.raises(RuntimeError, match="condition tokens only"):
        backbone.net.transformer.fuse_lora()
    with pytest.raises(ValueError, match="cannot be loaded"):
        build(name, folder, model=str(tmp_path))
    with pytest.raises(ValueError, match="cannot be built"):
        build(name, transformer={"layers": 3})


def test_it_trains_resumes_exports_and_restores(name, folder, shards, tmp_path):
    """Resumed, the weights are the same to the bit; the export is a LoRA that diffusers' own class reads."""
    own = settings(name, folder)

    def job(run, updates, stage="zero1"):
        zero = str(partitioning(stage, tmp_path))
        return small_recipe(
            shards, tmp_path / run, backbone=own, train__updates=updates, train__deepspeed=zero,
            train__learning_rate=0.05, train__save_every_updates=2,
        )  # fmt: skip

    start([job("whole", 4), job("halves", 2), job("halves", 4), job("zero3", 4, "zero3")], tmp_path, 1)
    files = [tmp_path / run / "checkpoints/step-00000004/ema.safetensors" for run in ("whole", "halves", "zero3")]
    assert files[0].read_bytes() == files[1].read_bytes()
    trained, sharded = load_file(files[0]), load_file(files[2])
    assert max((trained[n] - sharded[n]).abs().max() for n in trained) < 0.05
    assert export([str(tmp_path / "whole"), "--out", str(tmp_path / "lora")]) == 0
    theirs = stock(name, folder)
    theirs.load_lora_adapter(tmp_path / "lora", weight_name=lora_file.NAME, prefix="transformer")
    assert len([n for n, _ in theirs.named_parameters() if "lora_" in n]) == len(trained)
    card = (tmp_path / "lora/README.md").read_text()
    assert "condition tokens only" in card and name.replace("_", "-") in card
    lq = np.ascontiguousarray(skimage.data.coffee()[:20, :28])
    wanted = Upscaler.from_pretrained(tmp_path / "whole")(lq, steps=2)
    assert wanted.shape == (80, 112, 3) and wanted.std() > 0
    assert np.array_equal(Upscaler.from_pretrained(tmp_path / "lora")(lq, steps=2), wanted)


def test_the_first_check_with_real_weights_tells_a_prior_from_random_weights(name, folder, tmp_path, capsys):
    """Random weights explain nothing; a stand-in that knows the answer is found to know pictures."""
    import check_backbone
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(skimage.data.coffee()[:64, :48])).save(tmp_path / "x.png")
    own = [f"backbone={json.dumps(settings(name, folder))}"]
    assert check_backbone.main(["sd35_teasr_16gb", "--photo", str(tmp_path / "x.png"), *own]) == 1
    out = capsys.readouterr().out
    assert "VAE: PSNR" in out and out.count("a linear guess") == 4 and "NOT a trained model" in out
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))

    class Knowing(Model):
        def velocity(self, z_t, t_cur, condition=None):
            return eps - z

    share, linear = check_backbone.explained(Knowing(build(name, folder, roles=(REAL,)), REAL), z, 0.7)
    assert share == pytest.approx(1, abs=1e-5) and 0.05 < linear < 0.5
