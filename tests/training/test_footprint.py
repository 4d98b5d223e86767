"""footprint.py: its counts against real tensors, PyTorch's profiler and DeepSpeed, and the full-size presets."""

import json
import os
import sys
from collections import Counter

import card_table
import pytest
import torch
import warm
from conftest import ROOT, partitioning
from test_pairs import BACKBONES, METHODS
from torch.profiler import ProfilerActivity, profile

from teasr import run_config as recipe
from teasr.backbones.model import Model
from teasr.data.batch import Batch
from teasr.methods.base import Progress
from teasr.training import footprint, timing
from teasr.training.engine import engine_settings
from teasr.training.footprint import GIB, count
from teasr.training.networks import Networks
from teasr.training.update import backpropagate
from teasr.util.meter import Meter, Work
from teasr.util.randomness import Draws

TRANSFORMER = {
    "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4,
    "joint_attention_dim": 48, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip


def tiny_qwen(train=(), method=(), **backbone) -> recipe.RunConfig:
    sizes = {"transformer": TRANSFORMER, "vae": {"base_dim": 16, "num_res_blocks": 1}}
    common = {"name": "qwen_image", "model": "random", "prompt": "random", "lora_rank": 16, "lora_alpha": 16} | sizes
    return recipe.parse(
        {
            "run_dir": "unused",
            "backbone": common | backbone,
            "method": {"name": "teasr", "lambda_lpips": 0.0} | dict(method),
            "data": {"shards": "unused"},
            "train": {"updates": 5, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3} | dict(train),
        }
    )


def allocated_at_most(run) -> int:
    """Peak of the bytes allocated during run(), according to PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("quantise", [None, "fp8", "nf4"])
def test_meta_counts_what_real_tensors_take(checkpointing, quantise):
    """Peak memory and FLOPs of an update: on the meta device, on the CPU, and by PyTorch's profiler."""
    settings = tiny_qwen(gradient_checkpointing=checkpointing, quantise=quantise)
    counted = count(settings, {"zero_optimization": {"stage": 1}}, 128)
    method, network, meter = settings.build_method(), settings.build_backbone(), Meter("cpu")
    network.to(torch.device("cpu"))
    for p in network.net.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
        meter.ignore(*(x for x in (p, p.grad) if x is not None))
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    meter.ignore(x, *(t for group in network.memory_groups().values() for t in group))

    def run():
        for loss in method.losses(
            {"student": Model(network)}, Batch(x, x, ["", ""]), Draws(0, 0, (0, 1)), Progress(4, 5)
        ):
            loss.value.backward()
            del loss

    with meter:
        run()
    assert sum(counted.flops.values()) == meter.flops
    assert max(counted.peaks.values()) == pytest.approx(meter.peak, rel=0.03)
    assert max(counted.peaks.values()) == pytest.approx(allocated_at_most(run), rel=0.05)


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        ("sd_unet", "score_distillation"), ("sd_unet", "d3sr"), ("sd_unet", "tadsr"), ("sd3", "teasr"),
        ("sd3", "d3sr"), ("z_image", "teasr"), ("z_image", "tadsr"), ("qwen_image", "d3sr"), ("qwen_image", "tadsr"),
    ],
)  # fmt: skip
def test_every_kind_of_network_and_method_is_counted_as_it_runs(backbone, method):
    """All roles of an update: FLOPs exactly, and peak memory, on the meta device and on the CPU."""
    settings = recipe.parse(
        {
            "run_dir": "unused",
            "backbone": {"name": backbone} | BACKBONES[backbone],
            "method": {"name": method} | METHODS[method] | ({"student": "single"} if backbone == "sd_unet" else {}),
            "data": {"shards": "unused"},
            "train": {"updates": 5, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3},
        }
    )
    counted = count(settings, {"zero_optimization": {"stage": 1}}, 64)
    built = settings.build_method()
    networks, meter = Networks(settings, built), Meter("cpu")
    for base in networks.bases.values():
        base.to(torch.device("cpu"))
        for p in base.net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
            meter.ignore(*(x for x in (p, p.grad) if x is not None))
        meter.ignore(*(x for group in base.memory_groups().values() for x in group))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    meter.ignore(x)
    with meter:
        backpropagate(built, networks.models, [Batch(x, x, ["", ""])], 0, Progress(4, 5), lambda _, v: v.backward())
    assert sum(counted.flops.values()) == meter.flops
    assert max(counted.peaks.values()) == pytest.approx(meter.peak, rel=0.05)
    trained = sum(n for name, n in counted.parameters.items() if name.startswith("trained"))
    assert trained == sum(
        p.numel() for role in networks.trained_roles for p in networks.base(role.name).trained(role.name).values()
    )


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_deepspeed_holds_what_the_rules_say(zero, tmp_path):
    """On the CPU, host and device memory are the same, so their sum is compared."""
    path = partitioning(zero, tmp_path)
    file = json.loads(path.read_text())
    file["zero_optimization"]["reduce_bucket_size"] = 100_000
    path.write_text(json.dumps(file))
    settings = tiny_qwen(
        train={"deepspeed": str(path), "cpu_threads": 1},
        lora_rank=512,
        lora_alpha=512,
        dtype="fp32",
        modulation_table=4,
    )
    counted = count(settings, engine_settings(settings.train, 1), 32)
    items = {**counted.gpu, **{f"{k} (host)": v for k, v in counted.host.items()}}
    kept = ("trained", "gradients", "fp32", "EMA", "reduction")
    wanted = sum(n for name, n in items.items() if name.startswith(kept))
    flat = 0 if zero == "zero2_offload" else counted.parameters["trained"] * 4  # gradients of the step
    wanted += flat + (400_000 if "zero3" not in zero else 0)  # and the bucket
    (tmp_path / "recipe.json").write_text(json.dumps(settings.to_dict()))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, str(ROOT / "tests/run_metered.py"), str(tmp_path / "recipe.json")]
    done = warm.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(zero, int(done.stdout.split()[-1]) / counted.parameters["trained"], wanted / counted.parameters["trained"])
    assert int(done.stdout.split()[-1]) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("preset", "most_gib"), [("qwen_teasr", 60), ("qwen_teasr_24gb", 16), ("qwen_teasr_zero3_offload", 8)]
)
def test_presets_fit(preset, most_gib):
    """At full size and 512 px; these are the numbers in the README."""
    settings = recipe.load(ROOT / f"launch/presets/{preset}.yaml")
    counted = count(settings, engine_settings(settings.train, 1), 512)
    base = sum(counted.parameters[group] for group in ("image path", "text path", "modulation"))
    assert base == 20_430_401_088 + 5 * 3584 and counted.parameters["trained"] == 584_720_384
    assert counted.gpu_total < most_gib * GIB
    per_sample = sum(counted.flops.values()) / settings.train.batch
    assert per_sample == pytest.approx(532e12, rel=0.01)


@pytest.mark.parametrize(("preset", "size_px", "most_gib"), [("qwen_teasr_12gb", 1024, 12), ("qwen_teasr_8gb", 512, 8)])
def test_presets_of_small_cards_fit(preset, size_px, most_gib):
    """At full width, with 60 blocks extrapolated from networks of a few."""
    found = card_table.counted(preset, (f"backbone.swap_blocks={card_table.BLOCKS}",), size_px)
    assert 0.6 * most_gib * GIB < found.gpu_total < most_gib * GIB
    assert found.copied > 0 and found.on_host


def test_few_blocks_predict_many():
    """Bytes, FLOPs, calls and copies of 12 blocks, from those of 4 and 8."""
    few, more, many = (
        count(
            tiny_qwen(transformer=TRANSFORMER | {"num_layers": n}, swap_blocks=n),
            {"zero_optimization": {"stage": 1}},
            64,
        )
        for n in (4, 8, 12)
    )
    found = card_table.extrapolated(few, more, (4, 8, 12))
    assert found.gpu_total == pytest.approx(many.gpu_total, rel=0.01) and found.flops == many.flops
    assert sum(found.host.values()) == sum(many.host.values()) and found.copied == pytest.approx(many.copied, rel=0.01)
    for name, calls in many.calls.items():
        assert found.calls[name].views == calls.views and found.calls[name].kernels == calls.kernels


def test_predicted_time_follows_from_work_bytes_copies_and_calls():
    card, h = timing.Card(80, 1e12, 1e11, 1e10), timing.OF_MATMUL * timing.REACHED
    flops = footprint.Calls(Counter({Work(10**12, 8): 3}))
    slow_memory = footprint.Calls(Counter({Work(0, 10**11): 2}))
    small = footprint.Calls(Counter({Work(8, 8): 10**6}), views=10**6)
    swapped = footprint.Calls(Counter({Work(10**9, 8): 1}), copied=10**11)
    found = footprint.Footprint(64, calls={"a": flops, "b": slow_memory, "c": small, "d": swapped})
    parts = timing.predict(found, card).parts
    assert parts["compute"] == pytest.approx(3 / h)
    assert parts["memory"] == pytest.approx(2 / (timing.OF_BANDWIDTH * timing.REACHED))
    assert parts["launching"] == pytest.approx(2e6 * timing.LAUNCH_S)
    assert parts["PCIe"] == pytest.approx(10 * (1 + timing.COPY_COST))
    beside = footprint.Calls(Counter({Work(10**13, 8): 1}), copied=10**11)  # copies that are shorter than the computing
    beside = timing.predict(footprint.Footprint(64, calls={"e": beside}), card)
    assert beside.copying == 10 and beside.hidden == pytest.approx(10 * (1 - timing.COPY_COST))
    assert "7.0 of 10.0 s of copies hidden" in timing.table(
        footprint.Footprint(64, calls={"e": footprint.Calls(Counter({Work(10**18, 8): 1}), copied=24 * 10**10)}), 1
    )
    assert "4090" in timing.table(found, 1)


def test_layouts_of_score_distillation_differ_by_copies_of_the_base():
    """LoRA sets on one base, two copies, three copies: the same work and trained weights, once to thrice the base."""
    method = {"name": "score_distillation", "cfg_real": 7.5, "lambda_lpips": 0.0}
    one, two, three = (
        count(
            tiny_qwen(method=method | {"layout": layout}, null_prompt="random", lora_rank=4, modulation_table=None),
            {"zero_optimization": {"stage": 1}},
            64,
        )
        for layout in ("one_base", "two_copies", "three_copies")
    )
    assert [x.gpu["image path"] / one.gpu["image path"] for x in (one, two, three)] == [1, 2, 3]
    assert one.flops == two.flops == three.flops and set(one.flops) == {"generator", "fake"}
    for item in ("trained weights", "gradients of trained weights", "fp32 master weights and Adam's moments"):
        assert one.gpu[item] == two.gpu[item] == three.gpu[item]
    assert one.step == two.step == three.step  # two engines, which step one after another


def test_a_discriminator_with_its_head_is_counted():
    """D3SR: the student's gradient through half of the base, then the discriminator on originals and results."""
    method = {"name": "d3sr", "disc_blocks": 1, "adv_ramp": {"start": 0, "length": 0}, "dists_weights": "random"}
    found, alone = (
        count(tiny_qwen(method=method | {"lambda_adv": weight}), {"zero_optimization": {"stage": 1}}, 64)
        for weight in (0.01, 0.0)
    )
    assert set(found.flops) == {"generator", "discriminator"} and set(alone.flops) == {"generator"}
    assert found.flops["generator"] > alone.flops["generator"] and found.flops["discriminator"] > 0
    assert found.gpu["trained weights"] > alone.gpu["trained weights"] and found.gpu["DISTS"] > 50e6


def test_wrong_sizes_and_autocast_are_named():
    with pytest.raises(ValueError, match="multiples of 16"):
        count(tiny_qwen(), {"zero_optimization": {"stage": 1}}, 100)
    with pytest.raises(ValueError, match="autocast"):
        count(tiny_qwen(train={"dtype": "bf16"}), {"zero_optimization": {"stage": 1}}, 64)


def test_dry_run_of_any_preset_needs_no_files(capsys, tmp_path):
    """The tiny preset through the command, without shards or a run folder."""
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        import train
    finally:
        sys.path.remove(str(ROOT / "launch"))
    arguments = ["--config", str(ROOT / "launch/presets/tiny_teasr.yaml"), "--dry-run", "--size", "64"]
    assert train.main([*arguments, f"run_dir={tmp_path}/run", f"data.shards={tmp_path}/none"]) == 0
    out = capsys.readouterr().out
    assert "memory of one GPU" in out and "TFLOP" in out and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        train.main(["--config", str(ROOT / "launch/presets/tiny_teasr.yaml"), "--size", "64"])
    with pytest.raises(ValueError, match=r"backbone\.model = .* cannot be loaded .*config\.json"):
        count(tiny_qwen(model=str(tmp_path), transformer={}, vae={}), {"zero_optimization": {"stage": 1}}, 64)
    assert footprint.table(count(tiny_qwen(), {"zero_optimization": {"stage": 1}}, 64)).count("total") == 3
