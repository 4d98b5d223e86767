"""Several roles on Qwen-Image's transformer.

Covers which LoRA set acts on which tokens, features and heads, text and guidance, and training.
"""

from pathlib import Path

import pytest
import torch
from conftest import partitioning, small_recipe
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file
from test_qwen_image import backbone, config, model  # noqa: F401 - model is a fixture
from test_training import close, rows, start

from teasr.backbones.model import Condition, Model
from teasr.backbones.qwen_image.backbone import QwenImage, QwenImageConfig
from teasr.backbones.qwen_image.transformer import pack, unpack
from teasr.backbones.roles import STUDENT, Role
from teasr.data.batch import Batch
from teasr.diffusion import flow
from teasr.methods.base import Progress
from teasr.methods.score_distillation import ScoreDistillation, ScoreDistillationConfig
from teasr.util.randomness import Draws
from teasr.util.seed import seed_of

FAKE, REAL = Role("fake", branches="single", rank=2), Role("real", branches="single", trains="nothing")
CRITIC = Role("critic", branches="single", blocks=1, head=True)
ROLES = (STUDENT, FAKE, REAL, CRITIC)
T = torch.tensor([0.7, 0.25])


def shared(model, roles=ROLES, **changes) -> QwenImage:  # noqa: F811
    """One base on which every adapter set has a non-zero effect."""
    settings = config(model, modulation_table=None, **changes)
    settings.pop("name")
    made = QwenImage(QwenImageConfig(**settings), roles=roles)
    for name, p in made.net.named_parameters():
        if "lora_B" in name or name.endswith("last.weight"):
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed_of(name)))
    made.to(torch.device("cpu"))
    return made


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(3))


def stock_velocity(transformer, prompt, z):
    out = transformer(pack(z), prompt.expand(2, -1, -1), None, T, [[(1, 4, 3)]] * 2, return_dict=False)[0]
    return unpack(out, 4, 3)


@torch.no_grad()
def test_a_teacher_is_diffusers_own_forward_bit_for_bit(model, latents):  # noqa: F811
    b = shared(model)
    stock = QwenImageTransformer2DModel.from_pretrained(model, subfolder="transformer")
    assert torch.equal(Model(b, REAL).velocity(latents, T), stock_velocity(stock, b.net.prompt, latents))
    assert torch.equal(
        Model(b, STUDENT).velocity(latents, T, Condition(latents, -T)),
        Model(shared(model, (STUDENT,))).velocity(latents, T, Condition(latents, -T)),
    )


@torch.no_grad()
def test_a_single_branch_has_its_lora_on_noise_tokens_alone(model, latents):  # noqa: F811
    """Compared with the stock model, to whose image Linears hooks add the set; text Linears have none."""
    b = shared(model)
    stock, layers = (
        QwenImageTransformer2DModel.from_pretrained(model, subfolder="transformer"),
        dict(b.net.transformer.named_modules()),
    )

    def add(layer):
        return lambda _, args, out: out + layer.lora_B["fake"](layer.lora_A["fake"](args[0])) * layer.scaling["fake"]

    hooked = [n for n, layer in layers.items() if "fake" in getattr(layer, "lora_A", {})]
    assert len(hooked) == 1 + 2 * 7 and not any("txt" in n or "add_" in n for n in hooked)
    for name in hooked:
        stock.get_submodule(name).register_forward_hook(add(layers[name]))
    assert (Model(b, FAKE).velocity(latents, T) - stock_velocity(stock, b.net.prompt, latents)).abs().max() < 2e-5


def gradients(b, act) -> dict[str, torch.Tensor]:
    b.net.zero_grad()
    act().square().mean().backward()
    return {n: p.grad.clone() for n, p in b.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("role", [STUDENT, FAKE, CRITIC], ids=lambda role: role.name)
def test_recomputed_activations_see_the_set_of_their_own_pass(model, latents, role):  # noqa: F811
    """Another role runs between this role's forward and backward pass.

    Each parameter of this role still gets its own gradient, and no other parameter gets one.
    """
    found = {}
    for checkpointing in (False, True):
        b = shared(model, gradient_checkpointing=checkpointing)

        def act(b=b):
            m = Model(b, role)
            out = (
                m.logits(latents, T)
                if role.head
                else m.velocity(latents, T, Condition(latents, -T) if role == STUDENT else Condition())
            )
            Model(b, STUDENT if role == FAKE else FAKE).velocity(
                latents, T, Condition(latents, T) if role == FAKE else Condition()
            )
            return out

        found[checkpointing] = gradients(b, act)
        assert set(found[checkpointing]) == set(b.trained(role.name))
    assert all(torch.equal(found[True][n], g) and g.any() for n, g in found[False].items())


@torch.no_grad()
def test_features_end_where_the_role_does(model, latents):  # noqa: F811
    b, d = shared(model), 64
    before = Model(b, CRITIC).features(latents, T)
    assert before.shape == (2, d, 4, 3) and Model(b, CRITIC).logits(latents, T).shape == (2, 4, 3)
    for p in b.net.transformer.transformer_blocks[1].parameters():
        p.add_(1.0)
    assert torch.equal(Model(b, CRITIC).features(latents, T), before)
    assert all("transformer_blocks.1." not in n for n in b.trained("critic"))


@torch.no_grad()
def test_text_and_guidance(model, latents):  # noqa: F811
    """Guidance with a separate factor for each sample, against two explicit evaluations."""
    real, g = Model(shared(model), REAL), torch.Generator().manual_seed(5)
    text, null = torch.randn(2, 7, 48, generator=g), torch.randn(1, 4, 48, generator=g)
    a, b = (real.velocity(latents, T, Condition(text=x)) for x in (text, null))
    assert not torch.allclose(a, real.velocity(latents, T), atol=1e-3) and not torch.allclose(a, b, atol=1e-3)
    guided = real.velocity(latents, T, Condition(text=text, null_text=null, guidance=torch.tensor([7.5, 1.0])))
    assert torch.allclose(guided[0], b[0] + 7.5 * (a[0] - b[0]), atol=1e-5) and torch.allclose(
        guided[1], a[1], atol=1e-5
    )


SIZES = {
    "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48,
    "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
RANDOM = {
    "lora_rank": 4, "lora_alpha": 4, "dtype": "fp32", "transformer": SIZES, "vae": {"base_dim": 8, "num_res_blocks": 1}
}  # fmt: skip


@pytest.mark.parametrize("student", ["dual", "single"])
def test_score_distillation_starts_as_guidance_and_reaches_both_sets(student):
    """With the fake set at zero, v_real - v_fake is (c - 1)(v_text - v_null); with equal prompts it is exactly zero."""
    settings = ScoreDistillationConfig(student=student, cfg_real=7.5, weight="s2", lambda_lpips=0.0)
    method, config = ScoreDistillation(settings), QwenImageConfig("random", "random", "random", **RANDOM)
    b = QwenImage(config, roles=method.roles())
    b.to(torch.device("cpu"))
    models = {role.name: Model(b, role) for role in method.roles()}
    method.check_models(models)
    z_hat, draws, logs = torch.randn(2, 16, 4, 4), Draws(0, 0, (0, 1)), {}
    found = method._score_gradient(models, z_hat, None, draws, logs)
    s = b.snap(draws.uniform("score time", 0.02, 0.98))
    z_s = flow.interpolate(z_hat, draws.normal("score noise", z_hat), s)
    with torch.no_grad():
        text, null = (models["real"].velocity(z_s, s, Condition(text=x)) for x in (None, b.null_text))
    wanted = 6.5 * flow.per_sample(s**2, z_s) * (text - null)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max() and wanted.any() and logs["guidance_part"] > 0
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    for loss in method.losses(models, Batch(x, x, ["", ""]), draws, Progress(0, 1)):
        loss.value.backward()
    for role in ("student", "fake"):
        assert all(p.grad is not None for p in b.trained(role).values()), role
    b.net.null_prompt = b.net.prompt
    assert method._score_gradient(models, z_hat, None, draws, logs).abs().max() < 1e-5
    assert QwenImage.inference_config(config, None, Path("none")).null_prompt is None


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"modulation_table": 20}, {"quantise": "fp8", "modulation_table": 20}], ids=str)
def test_all_roles_run_on_a_table_and_on_quantised_weights(latents, changes):
    table, layers = (
        QwenImage(QwenImageConfig("random", "random", **(RANDOM | c)), roles=ROLES)
        for c in (changes, changes | {"modulation_table": None})
    )
    for b in (table, layers):
        b.to(torch.device("cpu"))
        for name, p in b.net.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    t, near = table.snap(T), 1e-5 if "quantise" not in changes else 0.2
    for role in (FAKE, REAL):
        a, b = (Model(x, role).velocity(latents, t) for x in (table, layers))
        assert (a - b).abs().max() < near * b.abs().max(), role.name
    assert Model(table, CRITIC).logits(latents, t).shape == (2, 4, 3)


def test_two_roles_train_under_every_stage_and_resume(model, shards, tmp_path):  # noqa: F811
    """tests/two_roles.py on this backbone: the same losses under ZeRO-1 and ZeRO-3, bit-identical after resuming."""
    common = {"backbone": config(model), "method": {"name": "two_roles"}, "train__save_every_updates": 3}

    def job(name, stage, updates):
        return small_recipe(
            shards,
            tmp_path / name,
            train__updates=updates,
            train__deepspeed=str(partitioning(stage, tmp_path)),
            **common,
        )

    start(
        [job("zero1", "zero1", 6), job("zero3", "zero3", 6), job("halves", "zero3", 3), job("halves", "zero3", 6)],
        tmp_path,
        1,
    )
    close(rows(tmp_path / "zero1"), rows(tmp_path / "zero3"), relative=1e-3)
    whole, halves = (tmp_path / name / "checkpoints/step-00000006" for name in ("zero3", "halves"))
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (halves / file.name).read_bytes(), file.name
    critic = load_file(whole / "weights-critic.safetensors")
    assert critic and all(".critic." in n and "transformer_blocks.1." not in n for n in critic)
