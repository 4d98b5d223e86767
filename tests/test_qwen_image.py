"""backbones/qwen_image.py: a tiny model of the real classes through shards -> train -> resume -> restore; only the config differs."""

import csv

import numpy as np
import pytest
import skimage.data
import torch
from conftest import partitioning, small_recipe
from test_training import start
from torch.utils.flop_counter import FlopCounterMode

from teasr import prompts
from teasr.backbones.branch_lora import add_branch_lora
from teasr.backbones.dual_branch import DualBranchTransformer, lora_targets
from teasr.backbones.qwen_image import QwenImage, QwenImageConfig, QwenNet, pack, unpack
from teasr.upscale import Upscaler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A diffusers model folder (transformer/ and vae/) with random weights, and a prompt of 5 tokens beside it."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLQwenImage(
        base_dim=16, z_dim=16, num_res_blocks=1, latents_mean=[0.1] * 16, latents_std=[2.0] * 16
    )
    vae.save_pretrained(folder / "vae")
    story = {"prompt": "", "model": "tiny", "dtype": "fp32", "libraries": {}}
    (folder / "prompt.safetensors").write_bytes(prompts.pack({"prompt_embeds": torch.randn(5, 48)}, story))
    return folder


def config(model, **changes):
    common = {"name": "qwen_image", "model": str(model), "prompt": str(model / "prompt.safetensors")}
    return common | {"dtype": "fp32", "lora_rank": 4, "lora_alpha": 4} | changes


def backbone(model, **changes):
    settings = config(model, **changes)
    settings.pop("name")
    return QwenImage(QwenImageConfig(**settings))


def rows(run):
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(open(run / "metrics.csv"))]


def test_packing_is_diffusers():
    from diffusers import QwenImagePipeline

    z = torch.randn(2, 16, 8, 12)
    tokens = pack(z)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(z[:, :, None], 2, 16, 8, 12))
    assert torch.equal(unpack(tokens, 4, 6), z)


def test_the_contract(model):
    b = backbone(model)
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    z = b.encode(x)
    assert z.shape == (2, 16, 8, 6) and b.decode(z).shape == x.shape
    t = torch.tensor([0.7, 0.2])
    v = b.velocity(z, t, z, -t)
    assert v.shape == z.shape and v.dtype == torch.float32
    with pytest.raises(ValueError, match="multiples of 16"):
        b.encode(torch.zeros(1, 3, 40, 48))
    trained = [n for n, p in b.net.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)


def test_full_size_has_the_published_counts():
    """On the meta device: 20.43 B parameters, 584.7 M in LoRA of rank 128, 31.7 TFLOP a forward pass of 512 px with condition."""
    with torch.device("meta"):
        transformer = DualBranchTransformer().to(torch.bfloat16)
        assert sum(p.numel() for p in transformer.parameters()) == 20_430_401_088
        add_branch_lora(transformer, lora_targets(transformer), 128, 128)
        lora = sum(p.numel() for n, p in transformer.named_parameters() if "lora_" in n)
        assert lora == 584_720_384
        settings = QwenImageConfig(model="none", prompt="none", gradient_checkpointing=False)
        net = QwenNet(transformer, torch.zeros(1, 5, 3584, dtype=torch.bfloat16), settings)
        z, t = torch.zeros(1, 16, 64, 64), torch.ones(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert net(z, t, z, -t).shape == z.shape
    assert counter.get_total_flops() / 1e12 == pytest.approx(31.67, abs=0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_trains_resumes_and_restores(model, shards, tmp_path, ranks):
    """ZeRO-1 and ZeRO-3 agree; three updates and three more give the bits of six; the checkpoint restores a picture."""
    jobs = []
    for stage in ("zero1", "zero3"):
        common = {"backbone": config(model), "train__deepspeed": str(partitioning(stage, tmp_path))}
        common |= {"train__save_every_updates": 3, "train__keep_checkpoints": 5}
        jobs.append(small_recipe(shards, tmp_path / f"{stage}-whole", train__updates=6, **common))
        jobs += [small_recipe(shards, tmp_path / f"{stage}-halves", train__updates=n, **common) for n in (3, 6)]
    start(jobs, tmp_path, ranks)
    one, three = rows(tmp_path / "zero1-whole"), rows(tmp_path / "zero3-whole")
    assert len(one) == 6
    for a, b in zip(one, three, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-2
        )
    for stage in ("zero1", "zero3"):
        whole, halves = (tmp_path / f"{stage}-{kind}/checkpoints/step-00000006" for kind in ("whole", "halves"))
        for name in ("weights.safetensors", "ema.safetensors"):
            assert (whole / name).read_bytes() == (halves / name).read_bytes()
    lq = np.ascontiguousarray(skimage.data.coffee()[:20, :28])
    restored = Upscaler.from_pretrained(tmp_path / "zero3-whole")(lq, steps=2)
    assert restored.shape == (80, 112, 3) and restored.std() > 0


def test_mistakes_name_the_cure(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        backbone(tmp_path, prompt=str(model / "prompt.safetensors"))
    with pytest.raises(ValueError, match=r"cache_prompt\.py"):
        backbone(model, prompt=str(tmp_path / "none.safetensors"))
    story = {"prompt": "", "model": "x", "dtype": "fp32", "libraries": {}}
    (tmp_path / "wide.safetensors").write_bytes(prompts.pack({"prompt_embeds": torch.randn(5, 64)}, story))
    with pytest.raises(ValueError, match="has 64 numbers a token"):
        backbone(model, prompt=str(tmp_path / "wide.safetensors"))
