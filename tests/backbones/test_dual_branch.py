"""backbones/dual_branch.py against diffusers' stock transformer and an independent reference with masked LoRA."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer

from teasr.backbones.lora import inject_peft_lora
from teasr.backbones.qwen_image.transformer import DualBranchTransformer, lora_targets, pack, unpack

SIZE = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3, "attention_head_dim": 32,
    "num_attention_heads": 4, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
B, H, W, T = 2, 4, 6, 5
L = H * W


def randomise(model):
    """Set vectors away from 0 and 1, so that a missing norm or bias would be noticed."""
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1, 0.3)
    return model


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return randomise(QwenImageTransformer2DModel(**SIZE)).eval()


@pytest.fixture
def dual(stock):
    model = DualBranchTransformer(**SIZE).eval()
    model.load_state_dict(stock.state_dict())
    return model.requires_grad_(False)


@pytest.fixture
def adapted(dual):
    """A model with a LoRA that has a non-zero effect."""
    torch.manual_seed(1)
    inject_peft_lora(dual, lora_targets(dual), 4, 4)
    for name, p in dual.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    return dual


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(2)
    times = {"t_cur": torch.tensor([0.7, 0.2]), "t_tar": torch.tensor([-0.5, 0.1])}
    return {"x": torch.randn(B, L, 64), "c": torch.randn(B, L, 64), "text": torch.randn(B, T, 64)} | times


def run(model, i, **changes):
    i = i | changes
    model.rope, model.cond_attention = i.get("rope", "shared"), i.get("cond_attention", "joint")
    c, t_tar = (None, None) if i["c"] is None else (unpack(i["c"], H, W), i["t_tar"])
    return pack(model(unpack(i["x"], H, W), i["t_cur"], i["text"], c, t_tar))


def run_stock(model, i, x=None, frames=1):
    x = i["x"] if x is None else x
    return model(x, i["text"], None, i["t_cur"], [[(1, H, W)] * frames] * B, return_dict=False)[0]


def lora_grads(model, i, **changes):
    model.zero_grad()
    run(model, i, **changes).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_without_condition_it_is_the_stock_model(stock, dual, inputs):
    assert torch.equal(run(dual, inputs, c=None), run_stock(stock, inputs))


@torch.no_grad()
def test_lora_does_not_touch_noise_and_text(stock, adapted, inputs):
    assert torch.equal(run(adapted, inputs, c=None), run_stock(stock, inputs))
    assert not torch.allclose(run(adapted, inputs), run_stock(stock, inputs), atol=1e-2)


@torch.no_grad()
def test_a_condition_at_time_zero_is_the_stock_models_second_picture(stock, dual, inputs):
    """Equal up to rounding, since the stock model processes both images in one product."""
    edit = QwenImageTransformer2DModel(**SIZE, zero_cond_t=True).eval()
    edit.load_state_dict(stock.state_dict())
    reference = run_stock(edit, inputs, torch.cat([inputs["x"], inputs["c"]], 1), frames=2)[:, :L]
    ours = run(dual, inputs, t_tar=torch.zeros(B), rope="frame_offset")
    assert (ours - reference).abs().max() < 1e-5
    # shared positions give another result
    assert (run(dual, inputs, t_tar=torch.zeros(B)) - reference).abs().max() > 1e-3


def masked_reference(stock, adapted, inputs):
    """The stock model on [noise, condition] with zero_cond_t.

    Its second time is replaced by t_tar, and hooks add the LoRA to condition rows only.
    """
    edit = QwenImageTransformer2DModel(**SIZE, zero_cond_t=True).eval()
    edit.load_state_dict(stock.state_dict())
    layers = dict(adapted.named_modules())

    def add(name):
        layer = layers[name]

        def hook(_, args, out):
            x = args[0]
            delta = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
            rows = torch.zeros_like(out)
            if x.ndim == 2:  # modulation: the second half of the batch belongs to the condition
                rows[B:] = 1
            else:
                rows[:, L:] = 1
            return out + rows * delta

        return hook

    hooked = [n for n, layer in layers.items() if isinstance(layer, BaseTunerLayer)]
    for name in hooked:
        edit.get_submodule(name).register_forward_hook(add(name))
    times = torch.cat([inputs["t_cur"], inputs["t_tar"]])
    edit.time_text_embed.register_forward_pre_hook(lambda _, args: (times, *args[1:]))
    edit.pos_embed.register_forward_hook(lambda _, args, out: (torch.cat([out[0][:L]] * 2), out[1]))  # share positions
    return run_stock(edit, inputs, torch.cat([inputs["x"], inputs["c"]], 1), frames=2)[:, :L], hooked


@torch.no_grad()
def test_it_is_masked_lora_with_two_times(stock, adapted, inputs):
    """Random LoRA and target times of both signs, against hooks on the stock model."""
    reference, hooked = masked_reference(stock, adapted, inputs)
    assert len(hooked) == 1 + 2 * 7 + 3
    assert (run(adapted, inputs) - reference).abs().max() < 2e-5


def test_every_adapter_gets_a_gradient_and_nothing_else_does(adapted, inputs):
    grads = lora_grads(adapted, inputs)
    assert len(grads) == 2 * 18 and all(g is not None and g.abs().max() > 0 for g in grads.values())
    assert all(p.grad is None for n, p in adapted.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("cond_attention", ["joint", "independent"])
def test_checkpointing_changes_nothing(adapted, inputs, cond_attention):
    plain = lora_grads(adapted, inputs, cond_attention=cond_attention)
    out = run(adapted, inputs, cond_attention=cond_attention)
    adapted.enable_gradient_checkpointing()
    again = lora_grads(adapted, inputs, cond_attention=cond_attention)
    assert torch.equal(out, run(adapted, inputs, cond_attention=cond_attention))
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def test_independent_condition_tokens_see_only_each_other(adapted, inputs):
    """Up to the last block, condition tokens do not depend on the noise tokens; with joint attention they do."""
    seen = {}

    def keep(_, args, name=None):
        seen[name] = args[2].detach()

    for mode in ("joint", "independent"):
        for which, x in (("a", inputs["x"]), ("b", inputs["x"] + 1)):
            handle = adapted.transformer_blocks[-1].register_forward_pre_hook(
                lambda m, a, n=(mode, which): keep(m, a, n)
            )
            run(adapted, inputs, x=x, cond_attention=mode)
            handle.remove()
    assert torch.equal(seen["independent", "a"], seen["independent", "b"])
    assert not torch.equal(seen["joint", "a"], seen["joint", "b"])


@torch.no_grad()
def test_saving_and_loading(stock, adapted, inputs, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    loaded = DualBranchTransformer.from_pretrained(tmp_path / "stock")
    assert loaded.config.num_layers == 3 and torch.equal(run(loaded, inputs, c=None), run_stock(stock, inputs))
    swapped = DualBranchTransformer.from_stock(QwenImageTransformer2DModel.from_pretrained(tmp_path / "stock"))
    assert torch.equal(run(swapped, inputs), run(loaded, inputs))
    adapted._hf_peft_config_loaded = True  # peft injected it directly, but diffusers' saver requires this flag
    adapted.save_lora_adapter(tmp_path / "lora", adapter_name="default")
    loaded.load_lora_adapter(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors", prefix=None)
    assert torch.equal(run(loaded, inputs), run(adapted, inputs))


def test_fusing_is_refused(adapted):
    with pytest.raises(RuntimeError, match="condition tokens only"):
        adapted.fuse_lora()


@torch.no_grad()
def test_times_reach_the_sinusoid_in_fp32(dual):
    """In bf16, 0.7 and 0.701 are the same number: diffusers rounds times before the sinusoid, we round after it."""
    model = dual.to(torch.bfloat16)
    a, b = (model.time_embedding(torch.tensor([t])) for t in (0.7, 0.701))
    assert a.dtype == torch.bfloat16 and not torch.equal(a, b)
    projected = model.time_text_embed.time_proj(torch.tensor([0.7], dtype=torch.float32))
    assert torch.equal(a, model.time_text_embed.timestep_embedder(projected.to(torch.bfloat16)))
    assert torch.tensor(0.7).bfloat16() == torch.tensor(0.701).bfloat16()
    assert not torch.equal(a, model.time_embedding(torch.tensor([-0.7])))


@torch.no_grad()
def test_bf16_and_other_attention_backends_run(adapted, inputs):
    reference = run(adapted, inputs)
    adapted.set_attention_backend("native")
    assert torch.equal(run(adapted, inputs), reference)
    half = {k: v.bfloat16() if k in ("x", "c", "text") else v for k, v in inputs.items()}
    out = run(adapted.to(torch.bfloat16), half)
    assert out.dtype == torch.bfloat16 and (out.float() - reference).abs().mean() < 0.1


def test_a_block_compiles_without_graph_breaks(adapted, inputs):
    """With `fullgraph`, a graph break raises an error."""
    reference = run(adapted, inputs)
    for block in adapted.transformer_blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    assert (run(adapted, inputs) - reference).abs().max() < 1e-5
