"""Stable Diffusion's U-Net as a backbone: diffusers' real classes at tiny random size, against plain computations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import partitioning, small_recipe
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from test_training import close, rows, start

from teasr import Upscaler
from teasr.backbones import lora_file
from teasr.backbones.model import Model
from teasr.backbones.roles import Role
from teasr.backbones.sd_unet.backbone import SdUnet, SdUnetConfig
from teasr.commands.export import main as export
from teasr.data.batch import Batch
from teasr.diffusion import sd_times
from teasr.methods.base import Progress
from teasr.methods.score_distillation import ScoreDistillation, ScoreDistillationConfig
from teasr.methods.tadsr import Tadsr, TadsrConfig, one_step
from teasr.util import scratch
from teasr.util.randomness import Draws
from teasr.util.scratch import Scratch
from teasr.util.seed import seed_of
from teasr.util.tensor_file import pack

STUDENT = Role("student", branches="single", encoder=True, timed=False)
TIMED = Role("student", branches="single", encoder=True)
FAKE, REAL = Role("fake", branches="single", rank=2), Role("real", branches="single", trains="nothing")
CRITIC = Role("critic", branches="single", blocks=3, head=True)
INDICES = torch.tensor([40, 700])
T = sd_times.time_of(INDICES.float())
ZERO = ("zero1", "zero3")
X = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def save_model(folder, prediction="epsilon"):
    """Save U-Net, VAE, scheduler and two prompts of a few thousand parameters, in diffusers' layout."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 24), layers_per_block=1, cross_attention_dim=12, attention_head_dim=[2, 3],
        use_linear_projection=True, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**sizes, **kinds).save_pretrained(folder / "vae")
    scheduler(prediction).save_pretrained(folder / "scheduler")
    for name in ("prompt", "null"):
        (folder / f"{name}.safetensors").write_bytes(pack({"prompt_embeds": torch.randn(7, 12)}, {}))
    return folder


def scheduler(prediction="epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type=prediction
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def settings(model, **changes) -> dict:
    prompts = {"prompt": str(model / "prompt.safetensors"), "null_prompt": str(model / "null.safetensors")}
    return {"model": str(model), "dtype": "fp32", "lora_rank": 3, "lora_alpha": 6} | prompts | changes


def built(model, roles, **changes) -> SdUnet:
    """A backbone on which every adapter has an effect."""
    made = SdUnet(SdUnetConfig(**settings(model, **changes)), roles=roles)
    for name, p in made.net.named_parameters():
        if p.requires_grad and not p.any():
            p.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed_of(name)))
    made.to(torch.device("cpu"))
    return made


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_velocity_is_what_diffusers_scheduler_makes_of_the_prediction(tmp_path, latents, prediction):
    """z0 and noise of diffusers' own scheduler at its index; ours from the state of the flow at the same point."""
    model = save_model(tmp_path, prediction)
    b = built(model, (STUDENT, REAL))
    noise, steps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4)), scheduler(prediction)
    state = steps.add_noise(latents, noise, INDICES)
    a, s = steps.alphas_cumprod[INDICES].sqrt(), (1 - steps.alphas_cumprod[INDICES]).sqrt()
    assert torch.allclose(T, s / (a + s), atol=1e-6)
    z_t = (1 - T.view(-1, 1, 1, 1)) * latents + T.view(-1, 1, 1, 1) * noise
    stock = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    out = stock(state, INDICES, b.net.prompt.expand(2, -1, -1)).sample
    found = Model(b, REAL).velocity(z_t, T)
    for i in range(2):
        one_a, one_s = a[i], s[i]
        z0 = (state[i] - one_s * out[i]) / one_a if prediction == "epsilon" else one_a * state[i] - one_s * out[i]
        eps = out[i] if prediction == "epsilon" else one_s * state[i] + one_a * out[i]
        assert torch.allclose(found[i], eps - z0, atol=2e-4 / one_a)


@torch.no_grad()
def test_a_role_without_lora_is_diffusers_own_forward_bit_for_bit(model, latents):
    b = built(model, (STUDENT, FAKE, REAL, CRITIC))
    seen = {}
    b.net.view_of(REAL).register_forward_pre_hook(lambda _, args: seen.update(inputs=args))
    v = Model(b, REAL).velocity(latents, T)
    stock = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    assert torch.equal(v, (stock(*seen["inputs"]).sample - latents) / (1 - b.snap(T).view(-1, 1, 1, 1)))
    assert torch.allclose(seen["inputs"][0], latents * sd_times.scale_of(T).view(-1, 1, 1, 1))
    assert not torch.allclose(Model(b, FAKE).velocity(latents, T), v, atol=1e-3)


@torch.no_grad()
def test_each_layer_of_a_role_has_its_own_lora(model, latents):
    """Compared with the stock U-Net, to whose layers hooks add the set in their own way."""
    b = built(model, (STUDENT, FAKE, REAL))
    stock, layers = UNet2DConditionModel.from_pretrained(model, subfolder="unet"), dict(b.net.unet.named_modules())

    def add(layer):
        def hook(stock_layer, args, out):
            first, second = layer.lora_A["fake"], layer.lora_B["fake"]
            if isinstance(stock_layer, torch.nn.Linear):
                return out + layer.scaling["fake"] * args[0] @ (second.weight @ first.weight).T
            low = F.conv2d(args[0], first.weight, stride=stock_layer.stride, padding=stock_layer.padding)
            return out + layer.scaling["fake"] * F.conv2d(low, second.weight)

        return hook

    hooked = [n for n, layer in layers.items() if "fake" in getattr(layer, "lora_A", {})]
    assert any("downsamplers" in n for n in hooked) and any("attn2.to_k" in n for n in hooked) and "conv_in" in hooked
    for name in hooked:
        stock.get_submodule(name).register_forward_hook(add(layers[name]))
    x = latents * sd_times.scale_of(T).view(-1, 1, 1, 1)
    wanted = (stock(x, INDICES, b.net.prompt.expand(2, -1, -1)).sample - latents) / (1 - T.view(-1, 1, 1, 1))
    assert torch.allclose(Model(b, FAKE).velocity(latents, T), wanted, atol=1e-3)


def gradients(b, act) -> dict[str, torch.Tensor]:
    b.net.zero_grad()
    act().square().mean().backward()
    return {n: p.grad.clone() for n, p in b.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("role", [TIMED, FAKE, CRITIC], ids=lambda role: role.name)
def test_recomputed_activations_see_the_set_of_their_own_pass(model, latents, role):
    """Another role runs between forward and backward pass; each parameter of the role gets its gradient, no other."""
    found = {}
    for checkpointing in (False, True):
        b = built(model, (TIMED, FAKE, REAL, CRITIC), gradient_checkpointing=checkpointing)

        def act(b=b):
            m = Model(b, role)
            if role.head:
                out = m.logits(latents, T)
            else:
                z = m.start_from(m.encode(X, T), T) if role.encoder else latents
                out = m.velocity(z, T)
            Model(b, TIMED if role == FAKE else FAKE).velocity(latents, T)
            Model(b, TIMED).encode(X, T.flip(0))
            return out

        found[checkpointing] = gradients(b, act)
        assert set(found[checkpointing]) == set(b.trained(role.name))
    assert all(torch.allclose(found[True][n], g, atol=1e-6) and g.any() for n, g in found[False].items())


@torch.no_grad()
def test_the_encoder_starts_as_the_vae_and_knows_the_time(model):
    b = SdUnet(SdUnetConfig(**settings(model)), roles=(TIMED,))
    b.to(torch.device("cpu"))
    student, vae = Model(b, TIMED), AutoencoderKL.from_pretrained(model, subfolder="vae")
    plain = vae.encode(X).latent_dist.mode() * vae.config.scaling_factor
    assert torch.equal(student.encode(X), plain) and torch.equal(student.encode(X, T), plain)
    b = built(model, (TIMED,))
    student = Model(b, TIMED)
    assert torch.equal(student.encode(X), plain)  # the frozen encoder has no adapters
    a, b2 = student.encode(X, T), student.encode(X, T.flip(0))
    assert not torch.allclose(a, plain, atol=1e-3) and not torch.allclose(a, b2, atol=1e-3)
    assert all(torch.allclose(a[i : i + 1], student.encode(X[i : i + 1], T[i : i + 1]), atol=1e-5) for i in range(2))
    assert torch.allclose(b.decode(plain), vae.decode(plain / vae.config.scaling_factor).sample, atol=1e-5)


@torch.no_grad()
def test_features_end_where_the_role_does(model, latents):
    b = built(model, (TIMED, CRITIC))
    before = Model(b, CRITIC).features(latents, T)
    assert before.shape == (2, 24, 2, 3) and Model(b, CRITIC).logits(latents, T).shape == (2, 2, 3)
    assert not any("up_blocks" in n or "conv_out" in n for n in b.trained("critic"))
    b.net.unet.up_blocks[0].resnets[0].conv1.base_layer.weight.add_(1.0)
    assert torch.equal(Model(b, CRITIC).features(latents, T), before)
    alone = SdUnet(SdUnetConfig(**settings(model)), roles=(Role("critic", branches="single", blocks=2, head=True),))
    alone.to(torch.device("cpu"))
    assert not len(alone.net.unet.up_blocks) and alone.net(latents, T, role=alone.roles[0], part="logits").shape == (
        2,
        2,
        3,
    )
    with pytest.raises(ValueError, match="allows 1 to 3"):
        SdUnet(SdUnetConfig(**settings(model)), roles=(Role("critic", branches="single", blocks=4, head=True),))


def written_out(model, b, student, fake, x_lq, x_hq, prompt, null, noise, index):
    """OSEDiff's update of the generator as its paper states it, in Stable Diffusion's own terms."""
    steps, vae = scheduler(), AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    acp, factor = steps.alphas_cumprod, vae.config.scaling_factor
    zq = b.net.parts["student"]["encoder"](F.pixel_unshuffle(x_lq, 8), torch.ones(2))
    a, s = acp[999].sqrt(), (1 - acp[999]).sqrt()
    z_hat = (zq - s * student(zq, torch.tensor([999, 999]), prompt).sample) / a
    mse = F.mse_loss(vae.decode(z_hat / factor).sample, x_hq)
    with torch.no_grad():
        stock = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        a, s = (x.sqrt().view(-1, 1, 1, 1) for x in (acp[index], 1 - acp[index]))
        z_t = a * z_hat + s * noise
        guided = stock(z_t, index, null).sample
        guided = guided + 7.5 * (stock(z_t, index, prompt).sample - guided)
        x_real, x_fake = (z_t - s * guided) / a, (z_t - s * fake(z_t, index, prompt).sample) / a
        g = (x_fake - x_real) / (z_hat - x_real).abs().mean((1, 2, 3), keepdim=True)
    return z_hat, mse, F.mse_loss(z_hat, (z_hat - g).detach())


def test_one_update_of_osediff_is_the_one_written_out(model):
    """Losses and gradients of the student and of the fake score, whose own loss is that of the noise."""
    config = ScoreDistillationConfig(
        student="single", encoder=True, cfg_real=7.5, lambda_lpips=0.0, fake_loss="eps", layout="one_base"
    )
    method, draws = ScoreDistillation(config), Draws(0, 0, (0, 1))
    b = built(model, method.roles())
    models = {role.name: Model(b, role) for role in method.roles()}
    method.check_models(models)
    x_hq = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    found, logs = {}, {}
    for loss in method.losses(models, Batch(x_hq, X, ["", ""]), draws, Progress(0, 1)):
        b.net.zero_grad()
        loss.value.backward()
        found |= {n: p.grad.clone() for n, p in b.trained(loss.role).items()}
        logs |= loss.logs
    prompt, null = (x.expand(2, -1, -1) for x in (b.net.prompt, b.net.null_prompt))
    index = (1000 * draws.uniform("score time", 0.02, 0.98)).round().long()
    noise = draws.normal("score noise", torch.empty(2, 4, 4, 6))
    student, fake = (b.net.view_of(role) for role in (method.roles()[0], method.roles()[2]))
    b.net.zero_grad()
    z_hat, mse, vsd = written_out(model, b, student, fake, X, x_hq, prompt, null, noise, index)
    (mse + vsd).backward()
    acp, index = scheduler().alphas_cumprod, (1000 * draws.uniform("fake time")).round().long()
    a, s = (x.sqrt().view(-1, 1, 1, 1) for x in (acp[index], 1 - acp[index]))
    noise = draws.normal("fake noise", z_hat)
    denoising = F.mse_loss(fake(a * z_hat.detach() + s * noise, index, prompt).sample, noise)
    denoising.backward()
    assert logs["mse"].item() == pytest.approx(mse.item(), rel=1e-4)
    assert logs["fake"].item() == pytest.approx(denoising.item(), rel=1e-4)
    wanted = {n: p.grad for role in ("student", "fake") for n, p in b.trained(role).items()}
    assert wanted.keys() == found.keys() and any("encoder" in n for n in wanted)
    for name, g in wanted.items():
        assert (found[name] - g).abs().max() <= 2e-3 * g.abs().max() and g.any(), name


@torch.no_grad()
def test_the_step_of_tadsr_is_the_published_one(model):
    """z_hat = z_in / a - eps(z_in, i), with the encoder's latent itself as the U-Net's state."""
    config = TadsrConfig(step="published", lambda_lpips=0.0)
    method = Tadsr(config)
    b = built(model, method.roles())
    student = Model(b, method.roles()[0])
    method.check_models({"student": student})
    found = one_step(student, config, student.encode_lq(X), T)
    z_in, a = student.encode(X, T), scheduler().alphas_cumprod[INDICES].sqrt().view(-1, 1, 1, 1)
    eps = b.net.view_of(student.role)(z_in, INDICES, b.net.prompt.expand(2, -1, -1)).sample
    assert torch.allclose(found, z_in / a - eps, atol=1e-4 / a.min())


class Counted(Scratch):
    """Temporary files for all latents, and the bytes that they had at most."""

    most = 0

    def zeros(self, shape, dtype):
        made = super().zeros(shape, dtype)
        self.most = max(self.most, sum(map(len, self._maps)))
        return made


def test_temporary_files_take_no_more_than_is_asked_for(model, tmp_path, monkeypatch):
    """Regression test: the picture that an adapted encoder takes was left out, which is larger than all latents."""
    method = Tadsr(TadsrConfig(step="published", lambda_lpips=0.0))
    b = built(model, method.roles())
    upscaler = Upscaler(Model(b, method.roles()[0]), method.sampler())
    monkeypatch.setattr(scratch, "LARGE", 1000)
    files = Counted(tmp_path)
    upscaler(np.zeros((32, 40, 3), np.uint8), scratch=files)
    asked = upscaler._bytes_of_frame(128, 160, 1)
    assert 0.6 * asked < files.most <= asked


def test_what_it_cannot_do_is_said(model, tmp_path):
    for roles, message in (((Role("student"),), "set method.student=single"),):
        with pytest.raises(ValueError, match=message):
            SdUnet(SdUnetConfig(**settings(model)), roles=roles)
    with pytest.raises(ValueError, match=r"backbone.quantise = fp8: the backbone sd_unet has no such mode"):
        SdUnetConfig(**settings(model, quantise="fp8"))
    with pytest.raises(ValueError, match=r"trains the encoder, so that latents of the LQ images cannot be cached"):
        built(model, (STUDENT,)).codec_sha256()
    folder = save_model(tmp_path)
    DDIMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match=r"its scheduler has .*: use Stable Diffusion 2.1-base or 2.1"):
        built(folder, (STUDENT,))
    assert built(folder, (STUDENT,), prediction="epsilon").net.prediction == "epsilon"
    with pytest.raises(ValueError, match=r"backbone.model = .* cannot be loaded"):
        built(tmp_path / "none", (STUDENT,))


OSEDIFF = {
    "name": "score_distillation", "student": "single", "encoder": True, "cfg_real": 7.5, "lambda_lpips": 0.0,
    "lambda_mse": 10.0,
}  # fmt: skip
METHODS = {
    "osediff": OSEDIFF,
    "three copies": OSEDIFF | {"layout": "three_copies"},
    "d3sr": {"name": "d3sr", "lambda_ea_dists": 0.0, "disc_blocks": 3},
    "d3sr copy": {"name": "d3sr", "lambda_ea_dists": 0.0, "disc_blocks": 3, "discriminator": "copy"},
    "tadsr": {"name": "tadsr", "step": "published", "clock": "index", "time_factor": 0.5, "lambda_lpips": 0.0},
}


@pytest.fixture(scope="module")
def runs(model, shards, tmp_path_factory):
    """Four updates of every method, with learning rates large enough for the adapters to have an effect."""
    folder = tmp_path_factory.mktemp("runs")
    common = {
        "backbone": {"name": "sd_unet"} | settings(model), "train__updates": 4, "train__learning_rate": 0.01,
        "preview": {"pictures": 1, "steps": [1]},
    }  # fmt: skip
    jobs = [
        small_recipe(
            shards, folder / f"{name} {zero}", method=method, train__deepspeed=str(partitioning(zero, folder)), **common
        )
        for name, method in METHODS.items()
        for zero in (ZERO[1:] if "cop" in name else ZERO)
    ]
    start(jobs, folder, 1)
    return folder


@pytest.mark.parametrize("method", ["osediff", "tadsr", "d3sr"])
def test_every_method_trains_in_both_ways_of_sharding(runs, method):
    close(rows(runs / f"{method} zero1"), rows(runs / f"{method} zero3"), relative=2e-3)
    one, three = (load_file(runs / f"{method} {zero}/checkpoints/step-00000004/weights.safetensors") for zero in ZERO)
    assert one.keys() == three.keys() and all("lora_B" not in n or x.any() for n, x in one.items())
    assert any(".encoder." in n for n in one) == (method != "d3sr")


def test_copies_of_the_base_train_as_adapters_on_one_base(runs):
    """The discriminator's copy ends with its last block."""
    for name, same in (("three copies", "osediff"), ("d3sr copy", "d3sr")):
        close(rows(runs / f"{name} zero3"), rows(runs / f"{same} zero3"), relative=2e-3)


def test_stopped_it_resumes_to_the_same_bits_and_two_ranks_train_as_one(runs, model, shards, tmp_path):
    """Two sets and an encoder of the U-Net under ZeRO-1, and D3SR's head under ZeRO-3."""
    common = {
        "backbone": {"name": "sd_unet"} | settings(model), "train__learning_rate": 0.01,
        "preview": {"pictures": 1, "steps": [1]},
    }  # fmt: skip

    def job(name, method, zero, updates):
        changes = common | {"train__updates": updates, "train__deepspeed": str(partitioning(zero, tmp_path))}
        return small_recipe(shards, tmp_path / name, method=METHODS[method], **changes)

    cases = {"osediff": "zero1", "d3sr": "zero3"}
    start([job(f"{m} parts", m, zero, n) for m, zero in cases.items() for n in (2, 4)], tmp_path, 1)
    start([job(f"{m} ranks", m, zero, 4) for m, zero in cases.items()], tmp_path, 2)
    for method, zero in cases.items():
        whole, parts = (
            folder / "checkpoints/step-00000004" for folder in (runs / f"{method} {zero}", tmp_path / f"{method} parts")
        )
        for file in whole.glob("*.safetensors"):
            assert file.read_bytes() == (parts / file.name).read_bytes(), file.name
        close(rows(runs / f"{method} {zero}"), rows(tmp_path / f"{method} ranks"), relative=2e-3)


@pytest.mark.parametrize("method", ["osediff", "tadsr", "d3sr"])
def test_an_export_restores_as_the_run_and_diffusers_loads_its_lora(runs, model, tmp_path, method):
    run = runs / f"{method} zero1"
    assert export([str(run), "--out", str(tmp_path / "out")]) == 0
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    wanted = Upscaler.from_pretrained(run)(picture)
    exported = Upscaler.from_pretrained(tmp_path / "out")
    assert wanted.shape == (80, 120, 3) and np.array_equal(exported(picture), wanted)
    assert np.abs(exported(picture, tile_px=64).astype(float) - wanted).mean() < 20
    if method == "tadsr":
        assert not np.array_equal(exported(picture, dials={"strength": 0.1}), wanted)
    card = (tmp_path / "out/README.md").read_text()
    assert all(part in card for part in ("instead of noise", "in one step", "one-step]", "--steps 1"))
    stock, x = UNet2DConditionModel.from_pretrained(model, subfolder="unet"), torch.randn(1, 4, 4, 4)
    stock.load_lora_adapter(tmp_path / "out", weight_name=lora_file.NAME, prefix="unet", use_safetensors=True)
    net, index = exported.backbone.net, torch.tensor([500])
    with torch.no_grad():
        ours = net.view_of(exported.model.role)(x, index, net.prompt).sample
        assert torch.allclose(stock(x, index, net.prompt).sample, ours, atol=1e-4)
        assert not torch.allclose(net.view_of(REAL)(x, index, net.prompt).sample, ours, atol=1e-3)
