"""backbones/qwen_image.py: a tiny model of the real classes through shards, training, resuming and restoring.

Only the config differs from that of a real run.
"""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import warm
from conftest import ROOT, partitioning, small_recipe, velocity
from test_training import start
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from teasr import run_config as recipe
from teasr.backbones.generic.network import DiffusersNet
from teasr.backbones.lora import inject_peft_lora
from teasr.backbones.memory import quantised
from teasr.backbones.qwen_image.backbone import QwenImage, QwenImageConfig
from teasr.backbones.qwen_image.transformer import DualBranchTransformer, lora_targets, pack, unpack
from teasr.backbones.qwen_image.vae import QwenCodec
from teasr.data.prep.latents import LatentsConfig, cache_latents
from teasr.restore.upscaler import Upscaler
from teasr.training.trainer import Trainer
from teasr.util import tensor_file
from teasr.util.distributed import free_port


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
    (folder / "prompt.safetensors").write_bytes(tensor_file.pack({"prompt_embeds": torch.randn(5, 48)}, story))
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
    v = velocity(b, z, t, z, -t)
    assert v.shape == z.shape and v.dtype == torch.float32
    with pytest.raises(ValueError, match="multiples of 16"):
        b.encode(torch.zeros(1, 3, 40, 48))
    trained = [n for n, p in b.net.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)


def test_full_size_has_the_published_counts():
    """Counted on the meta device, with LoRA rank 128.

    20.43 B parameters, 584.7 M in the LoRA, 31.7 TFLOP for one forward pass at 512 px with condition.
    """
    with torch.device("meta"):
        transformer = DualBranchTransformer().to(torch.bfloat16)
        assert sum(p.numel() for p in transformer.parameters()) == 20_430_401_088
        inject_peft_lora(transformer, lora_targets(transformer), 128, 128)
        lora = sum(p.numel() for n, p in transformer.named_parameters() if "lora_" in n)
        assert lora == 584_720_384
        net = DiffusersNet(transformer, torch.zeros(1, 5, 3584, dtype=torch.bfloat16))
        z, t = torch.zeros(1, 16, 64, 64), torch.ones(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert net(z, t, z, -t).shape == z.shape
    assert counter.get_total_flops() / 1e12 == pytest.approx(31.67, abs=0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_trains_resumes_and_restores(model, shards, tmp_path, ranks):
    """The ZeRO stages agree, and a resumed run (3 + 3 updates) is bit-identical to 6 updates.

    With cached latents, the losses are the same. Its checkpoint restores images and can be scored.
    """
    cached = LatentsConfig(str(shards), str(model), str(tmp_path / "latents"), dtype="fp32")
    cache_latents(cached, QwenCodec.from_pretrained(str(model), torch.float32), torch.device("cpu"))
    jobs = [
        small_recipe(
            shards, tmp_path / "cached", train__updates=6, backbone=config(model), data__latents=cached.out,
            train__deepspeed=str(partitioning("zero1", tmp_path)),
        )
    ]  # fmt: skip
    for stage in ("zero1", "zero2", "zero3"):
        common = {"backbone": config(model), "train__deepspeed": str(partitioning(stage, tmp_path))}
        common |= {"train__save_every_updates": 3, "train__keep_checkpoints": 5}
        jobs.append(small_recipe(shards, tmp_path / f"{stage}-whole", train__updates=6, **common))
        if stage != "zero2":
            jobs += [small_recipe(shards, tmp_path / f"{stage}-halves", train__updates=n, **common) for n in (3, 6)]
    start(jobs, tmp_path, ranks)
    one = rows(tmp_path / "zero1-whole")
    assert len(one) == 6
    for a, b in zip(one, rows(tmp_path / "cached"), strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-3) for name in ("loss", "grad_norm", "flow", "cons", "mse"))
    for other in ("zero2-whole", "zero3-whole"):
        for a, b in zip(one, rows(tmp_path / other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    for stage in ("zero1", "zero3"):
        whole, halves = (tmp_path / f"{stage}-{kind}/checkpoints/step-00000006" for kind in ("whole", "halves"))
        for name in ("weights.safetensors", "ema.safetensors"):
            assert (whole / name).read_bytes() == (halves / name).read_bytes()
    lq = np.ascontiguousarray(skimage.data.coffee()[:20, :28])
    upscaler = Upscaler.from_pretrained(tmp_path / "zero3-whole")
    restored = upscaler(lq, steps=2)
    assert restored.shape == (80, 112, 3) and restored.std() > 0
    saved = upscaler.save_pretrained(tmp_path / "saved")
    assert np.array_equal(Upscaler.from_pretrained(saved)(lq, steps=2), restored)
    scoring = ["--data", str(shards), "--steps", "1", "--out", str(tmp_path / "scores")]
    done = warm.run([sys.executable, str(ROOT / "eval/benchmark.py"), str(tmp_path / "zero3-whole"), *scoring])
    assert done.returncode == 0 and (tmp_path / "scores/scores.json").is_file()


def test_the_preset_runs_on_random_weights(shards, tmp_path):
    """`deepspeed launch/train.py` with the preset of the 80 GB run; only sizes and paths differ."""
    sizes = json.dumps(SIZES["transformer"]), json.dumps(SIZES["vae"])
    changes = [
        "backbone.model=random",
        f"backbone.transformer={sizes[0]}",
        f"backbone.vae={sizes[1]}",
        "backbone.lora_rank=4",
    ]
    changes += [
        f"run_dir={tmp_path}/run",
        f"data.shards={shards}",
        "data.streams=4",
        "train.updates=2",
        "train.cpu_threads=1",
    ]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1", "--master_port", str(free_port())]
    preset = ["launch/train.py", "--config", "launch/presets/qwen_teasr.yaml", "--random-init", "tracking.mlflow=false"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env = clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = warm.run([*launcher, *preset, *changes], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    _, first, _ = rows(tmp_path / "run")  # the preview before the first update has a row too
    assert first["lpips"] > 0 and len(list((tmp_path / "run/previews").iterdir())) == 2


def test_mistakes_name_the_cure(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        backbone(tmp_path, prompt=str(model / "prompt.safetensors"))
    with pytest.raises(ValueError, match=r"teasr cache-prompt"):
        backbone(model, prompt=str(tmp_path / "none.safetensors"))
    story = {"prompt": "", "model": "x", "dtype": "fp32", "libraries": {}}
    (tmp_path / "wide.safetensors").write_bytes(tensor_file.pack({"prompt_embeds": torch.randn(5, 64)}, story))
    with pytest.raises(ValueError, match="has embeddings of width 64"):
        backbone(model, prompt=str(tmp_path / "wide.safetensors"))


SIZES = {
    "transformer": {
        "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 48, "axes_dims_rope": [8, 12, 12],
    },
    "vae": {"base_dim": 16, "num_res_blocks": 1},
}  # fmt: skip


def random_backbone(**changes):
    """A backbone on the CPU, ready to run, with a LoRA that has a non-zero effect."""
    b = QwenImage(QwenImageConfig("random", "random", **(SIZES | {"lora_rank": 4, "lora_alpha": 4} | changes)))
    b.to(torch.device("cpu"))
    for name, p in b.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return b


def test_random_networks_take_weights_before_they_have_memory():
    """Regression test: a resumed benchmark run silently started with other weights."""
    trained = {name: p.detach().clone() for name, p in random_backbone().net.named_parameters() if p.requires_grad}
    resumed = QwenImage(QwenImageConfig("random", "random", **(SIZES | {"lora_rank": 4, "lora_alpha": 4})), seed=1)
    resumed.load_weights(trained)
    resumed.to(torch.device("cpu"))
    for name, p in resumed.net.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, trained[name]), name


def velocity_and_gradients(b):
    generator = torch.Generator().manual_seed(3)
    z, z_lq = (torch.randn(2, 16, 8, 6, generator=generator) for _ in range(2))
    t, r = torch.tensor([0.7, 0.25]), torch.tensor([-0.7, 0.0])
    v = velocity(b, z, t, z_lq, r)
    v.square().mean().backward()
    return v.detach(), {n: p.grad for n, p in b.net.named_parameters() if p.requires_grad}


def largest_difference(a, b):
    assert a.keys() == b.keys() and len(a) > 20
    return max((a[n] - b[n]).abs().max().item() / b[n].abs().max().item() for n in a)


@pytest.mark.parametrize(("dtype", "at_most"), [("fp32", 1e-5), ("bf16", 0.0)])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_modulation_table_is_the_layers(dtype, at_most, checkpointing):
    """Equal to the layers; in fp32 only up to the order of summation, since one product computes the whole table.

    The modulation weights, a third of all weights, are no longer kept.
    """
    tabulated = random_backbone(dtype=dtype, gradient_checkpointing=checkpointing)
    layers = random_backbone(dtype=dtype, gradient_checkpointing=checkpointing, modulation_table=None)
    (v, grads), (v_layers, grads_layers) = velocity_and_gradients(tabulated), velocity_and_gradients(layers)
    assert (v - v_layers).abs().max() <= at_most and largest_difference(grads, grads_layers) <= 10 * at_most
    assert not any(
        "_mod" in n and "lora_" not in n for n, _ in [*tabulated.net.named_parameters(), *tabulated.net.named_buffers()]
    )


def test_times_off_the_table_are_refused_and_snap_brings_them_on():
    b = random_backbone(modulation_table=10)
    z = torch.randn(1, 16, 4, 4)
    for t, r in ((0.123, 0.0), (1.0, -1.1)):
        with pytest.raises(ValueError, match="not in the modulation table of 10 steps"):
            velocity(b, z, torch.tensor([t]), z, torch.tensor([r]))
    t = b.snap(torch.tensor([0.123, -0.77, 1.0, 0.0]))
    assert t.tolist() == pytest.approx([0.1, -0.8, 1.0, 0.0])
    assert torch.equal(random_backbone(modulation_table=None).snap(t), t)


@pytest.mark.parametrize(("kind", "rms"), [("fp8", 0.03), ("nf4", 0.10)])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_quantised_weights(kind, rms, size):
    """The rounding error is as documented at any scale of the weights.

    Output and gradient are bit-identical to those of the dequantised weight.
    """
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96, dtype=torch.bfloat16)
    linear.weight.data.normal_(0, size)
    packed = quantised.KINDS[kind](linear)

    def weight_in(dtype):
        scale = packed.out_scale(dtype)
        return packed.weight_in(dtype) * (1 if scale is None else scale[:, None])

    weight = weight_in(torch.float32)
    assert (weight - linear.weight.float()).square().mean().sqrt() < rms * size
    x = torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    expanded = torch.nn.functional.linear(x, weight_in(torch.bfloat16), linear.bias)
    (reference,) = torch.autograd.grad(expanded.square().sum(), x)
    (ours,) = torch.autograd.grad(packed(x).square().sum(), x)
    assert torch.equal(packed(x), expanded) and torch.equal(ours, reference)
    assert sum(b.nbytes for b in packed.buffers()) < {"fp8": 1.1, "nf4": 0.6}[kind] * 128 * 96 + 96 * 6
    assert not packed.state_dict() and not list(packed.parameters())


@pytest.mark.parametrize(("kind", "at_most"), [("fp8", 0.1), ("nf4", 0.4)])
def test_quantised_networks_stay_near(kind, at_most):
    full, small = random_backbone(dtype="fp32"), random_backbone(dtype="fp32", quantise=kind)
    v, v_small = velocity_and_gradients(full)[0], velocity_and_gradients(small)[0]
    assert 0 < (v - v_small).square().mean().sqrt() / v.std() < at_most


def test_random_sizes_that_cannot_be_are_named():
    for change, message in [
        ({"transformer": {"layers": 3}}, "cannot be built"),
        ({"modulation_table": 0}, "modulation_table = 0"),
        ({"lora_rank": 0}, "lora_rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            random_backbone(**change)
    with pytest.raises(ValueError, match=r"only for backbone\.model=random"):
        QwenImageConfig("Qwen/Qwen-Image", "p", transformer={"num_layers": 2})


def test_small_memory_bases_train_under_offload_and_zero3(shards, tmp_path):
    """NF4 under ZeRO-1 and ZeRO-2 with offload, fp8 under ZeRO-1 and ZeRO-3: all stages give the same losses."""
    jobs = []
    for kind, stages in (("nf4", ("zero1", "zero2_offload")), ("fp8", ("zero1", "zero3", "zero3_offload"))):
        base = {
            "name": "qwen_image",
            "model": "random",
            "prompt": "random",
            "lora_rank": 4,
            "lora_alpha": 4,
            "quantise": kind,
        }
        for stage in stages:
            common = {
                "backbone": base | SIZES,
                "train__deepspeed": str(partitioning(stage, tmp_path)),
                "train__updates": 3,
            }
            jobs.append(small_recipe(shards, tmp_path / f"{kind}-{stage}", **common))
    start(jobs, tmp_path, 1)
    for job in jobs:
        kind = job["backbone"]["quantise"]
        ours, reference = rows(Path(job["run_dir"])), rows(tmp_path / f"{kind}-zero1")
        assert len(ours) == 3
        for a, b in zip(ours, reference, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_autocast_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"computes in backbone\.dtype"):
        Trainer(
            recipe.parse(
                small_recipe(
                    shards,
                    tmp_path,
                    backbone={"name": "qwen_image", "model": "random", "prompt": "random"} | SIZES,
                    train__dtype="bf16",
                )
            )
        )


@pytest.mark.parametrize("quantise", [None, "fp8", "nf4"])
def test_blocks_compile_once_for_all_and_without_graph_breaks(quantise):
    """With `fullgraph`, a graph break raises an error. The last block has its own graph, all others share one."""
    many = SIZES["transformer"] | {"num_layers": 6}
    b = random_backbone(dtype="fp32", quantise=quantise, gradient_checkpointing=False, transformer=many)
    v, grads = velocity_and_gradients(b)
    b.net.zero_grad()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in b.net.transformer.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    v_compiled, grads_compiled = velocity_and_gradients(b)
    assert (v - v_compiled).abs().max() < 1e-5 and largest_difference(grads_compiled, grads) < 1e-4
    assert counter.frame_count <= 3


def test_two_ranks_compute_the_same_and_no_rank_holds_all_weights(tmp_path):
    """Bit-identical under ZeRO-1, 2 and 3, with LoRA and without.

    Loading under ZeRO-3 takes each rank only its share of private memory.
    """
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    large = {"num_layers": 20, "num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}
    QwenImageTransformer2DModel(joint_attention_dim=48, **large).to(torch.bfloat16).save_pretrained(
        tmp_path / "large/transformer"
    )
    AutoencoderKLQwenImage(base_dim=16, num_res_blocks=1).save_pretrained(tmp_path / "large/vae")
    base = {
        "name": "qwen_image",
        "model": "random",
        "prompt": "random",
        "dtype": "fp32",
        "modulation_table": 4,
        **SIZES,
    }
    settings = small_recipe(tmp_path, tmp_path / "run", backbone=base | {"lora_rank": 2, "lora_alpha": 2})
    (tmp_path / "recipe.json").write_text(json.dumps(settings))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = ["--num_gpus", "2", "--master_port", str(free_port()), str(ROOT / "tests/run_on_ranks.py")]
    done = warm.run(
        [
            str(Path(sys.executable).parent / "deepspeed"), *command,
            str(tmp_path / "recipe.json"), str(tmp_path / "large"),
        ],
        env=clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("[{"))
    ranks = json.loads(line)
    for rank in ranks:
        assert rank["velocity"] == {stage: [0.0, 0.0] for stage in "123"}
        assert rank["private"]["end"] < rank["private"]["weights"] / 2 + 80e6 < 0.9 * rank["private"]["weights"]
    # Without a GPU, rank 1 receives rank 0's weights into its mapped pages, which then temporarily count as its private
    # memory.
    assert ranks[0]["private"]["most"] < ranks[0]["private"]["weights"] / 2 + 80e6
