"""Check on one GPU what can only be counted without one: seconds, memory and correctness. Needs no weights and no hub.

    bench/gpu_check.sh --wheels wheels --out results/gpu --minutes 8    # installs what is missing first
    python bench/gpu_check.py --out results/gpu                         # all steps in order of value
    python bench/gpu_check.py --out results/gpu --only machine teasr-nf4
    python bench/gpu_check.py --out results/gpu --train mine.yaml       # the time left for a training (resumable)
    python bench/gpu_check.py --out results/gpu --tiny                  # rehearsal with tiny networks, on any CPU

Every step runs in its own process with a time limit, and its result is appended to OUT/results.jsonl at once; what it
printed is in OUT/log.txt. A step that fails or takes too long does not stop the others. `--minutes` ends the check: a
step starts only if its limit still fits. docs/memory.md has the results of one H200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from apart import Starter

HERE = Path(__file__).resolve().parent
CHECKPOINTING = "backbone.gradient_checkpointing=true"
KEEPING = "backbone.gradient_checkpointing=false"
LEAST_TRAINING_S = 20  # with less time left, no training is started
SMALL_VAE = (
    "backbone.vae={block_out_channels: [8, 8, 8, 8], norm_num_groups: 4, latent_channels: 4, layers_per_block: 1, "
    "down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D], "
    "up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D]}"
)
SIZES = {  # which replace the published ones in a rehearsal, by the begin of a preset's name
    "qwen": (
        "backbone.transformer={num_layers: 2, attention_head_dim: 16, num_attention_heads: 2, joint_attention_dim: 32, "
        "axes_dims_rope: [4, 6, 6], in_channels: 16, out_channels: 4, patch_size: 2}",
        "backbone.vae={base_dim: 8, z_dim: 4, dim_mult: [1, 1, 1, 1], num_res_blocks: 1, latents_mean: [0, 0, 0, 0], "
        "latents_std: [1, 1, 1, 1]}",
        "backbone.modulation_table=20",
        "backbone.quantise=null",
    ),
    "sd35": (
        "backbone.transformer={num_layers: 2, num_attention_heads: 2, attention_head_dim: 16, joint_attention_dim: 24, "
        "caption_projection_dim: 32, pooled_projection_dim: 20, in_channels: 4, out_channels: 4, pos_embed_max_size: "
        "16, dual_attention_layers: [0]}",
        SMALL_VAE,
    ),
    "zimage": (
        "backbone.transformer={in_channels: 4, dim: 48, n_layers: 2, n_refiner_layers: 1, n_heads: 2, n_kv_heads: 2, "
        "cap_feat_dim: 24, axes_dims: [8, 8, 8], axes_lens: [64, 32, 32]}",
        SMALL_VAE,
    ),
    "sd21": (
        "backbone.transformer={block_out_channels: [8, 8, 8, 8], layers_per_block: 1, cross_attention_dim: 12, "
        "attention_head_dim: [2, 2, 2, 2], norm_num_groups: 4}",
        SMALL_VAE,
    ),
}
TINY = (
    "backbone.lora_rank=4",
    "backbone.model=random",
    "backbone.prompt=random",
    "backbone.dtype=fp32",
    "train.cpu_threads=1",
)
NO_PERCEPTION = ("lambda_lpips", "lambda_ea_dists")  # building VGG takes longer than all the rest of a rehearsal


@dataclass(frozen=True)
class Step:
    """One step: what it runs, its limit in seconds, and for updates the preset, overrides, size and layout."""

    name: str
    kind: str
    limit_s: int
    preset: str = ""
    overrides: tuple[str, ...] = ()
    size_px: int = 512
    updates: int = 2
    layout: str | None = None  # of bench/train_step.py, in place of the preset's method
    memory_gib: float | None = None  # let PyTorch use no more than this
    needs_gib: float = 0  # of the card's memory; it is skipped on a smaller one
    is_tiny: bool = False


ONE = ("train.batch=1", "train.micro_batch=1")
FOUR = ("train.batch=4", "train.micro_batch=4", CHECKPOINTING)
SWAP = (CHECKPOINTING, "backbone.swap_blocks=60")
BY_BLOCK = ("method.order=blocks", "backbone.host_checkpoints=true")
SCALED = ("train.batch=4", "train.micro_batch=4")
TADSR, D3SR = (f"method={{name: {name}, student: dual}}" for name in ("tadsr", "d3sr"))
STEPS = (  # starting an update of 20 B parameters takes 45 to 60 s of its limit, of 2 to 6 B 10 to 20 s
    Step("machine", "machine", 45),
    Step("swap-check", "swap_check", 120),
    Step("swap-nf4-by-block-in-8gb", "update", 130, "qwen_teasr_12gb", (*ONE, *SWAP, *BY_BLOCK), memory_gib=7.5),
    Step("sd35-teasr", "update", 60, "sd35_teasr_16gb", ONE),
    Step("zimage-teasr", "update", 80, "zimage_teasr_24gb", ONE),
    Step("losses", "losses", 90, "tiny_teasr"),
    Step("teasr-nf4", "update", 130, "qwen_teasr_24gb", ONE),
    Step("sd21-tadsr", "update", 60, "sd21_tadsr", SCALED),
    Step("sd21-d3sr", "update", 60, "sd21_d3sr", SCALED),
    Step("small-model", "small", 60),
    Step("swap-nf4-1024px-in-12gb", "update", 130, "qwen_teasr_12gb", (*ONE, *SWAP), 1024, updates=1, memory_gib=11.3),
    Step("sd35-teasr-by-block", "update", 60, "sd35_teasr_16gb", (*ONE, "backbone.swap_blocks=24", *BY_BLOCK)),
    Step("sd35-teasr-fake-set", "update", 60, "sd35_teasr_16gb", (*ONE, "method.fake=set")),
    Step("sd35-teasr-fake-copy", "update", 60, "sd35_teasr_16gb", (*ONE, "method.fake=copy")),
    Step("sd35-tadsr", "update", 60, "sd35_teasr_16gb", (*ONE, TADSR)),
    Step("sd35-d3sr", "update", 60, "sd35_teasr_16gb", (*ONE, D3SR)),
    Step("teasr-bf16-four-at-once", "update", 130, "qwen_teasr", FOUR, updates=1),
    Step("restore-bf16", "restore", 120, "qwen_teasr", ONE),
    Step("swap-nf4-in-8gb", "update", 130, "qwen_teasr_8gb", (*ONE, *SWAP), updates=1, memory_gib=7.5),
    Step("vsd-bf16", "update", 130, "qwen_teasr", (*ONE, KEEPING), layout="vsd", needs_gib=120),
    Step("vsd-one-base-bf16", "update", 120, "qwen_teasr", (*ONE, KEEPING), layout="vsd1"),
    Step("teasr-bf16", "update", 120, "qwen_teasr", (*ONE, KEEPING)),
    Step("teasr-fp8", "update", 130, "qwen_teasr_24gb", (*ONE, "backbone.quantise=fp8"), updates=1),
    Step("swap-bf16", "update", 130, "qwen_teasr", (*ONE, *SWAP)),
    Step("swap-bf16-by-block", "update", 130, "qwen_teasr", (*ONE, *SWAP, *BY_BLOCK)),
    Step("swap-bf16-four-at-once", "update", 130, "qwen_teasr", (*FOUR, *SWAP), updates=1),
    Step("teasr-zero3-offload", "update", 180, "qwen_teasr_zero3_offload", ONE, updates=1),
    Step("teasr-bf16-compiled", "update", 180, "qwen_teasr", (*ONE, KEEPING, "backbone.compile=true"), updates=1),
    Step("joint-bf16", "update", 130, "qwen_teasr", (*ONE, KEEPING), layout="joint", needs_gib=100),
)


def main() -> int:
    """Run the steps, or one step in this process."""
    options = _options()
    if options.step:
        from gpu_steps import run

        step = next(step for step in STEPS if step.name == options.step)
        print("RESULT " + json.dumps(run(tiny(step) if options.tiny else step)), flush=True)
        return 0
    ends, failed = time.monotonic() + 60 * options.minutes, 0
    options.out.mkdir(parents=True, exist_ok=True)
    starter, card_gib = Starter(), memory_of_card()
    for step in ((tiny(step) if options.tiny else step) for step in STEPS if step.name in options.only):
        left = ends - time.monotonic() - 60 * options.train_minutes
        if left < step.limit_s:
            row = {"skipped": f"{left:.0f} s are left, and the step may take {step.limit_s} s"}
        elif card_gib is not None and card_gib < step.needs_gib:
            row = {"skipped": f"it needs {step.needs_gib:g} GiB, and the card has {card_gib:.0f}"}
        else:
            argv = [
                str(HERE / "gpu_check.py"),
                "--out",
                str(options.out),
                "--step",
                step.name,
                *["--tiny"] * options.tiny,
            ]
            row = run_apart(starter, step.name, argv, step.limit_s, options.out)
        failed += note(step.name, row, options.out)
    if options.train:
        failed += note("train", train(starter, options, ends - time.monotonic()), options.out)
    return min(failed, 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results.jsonl and log.txt")
    parser.add_argument(
        "--only", nargs="*", choices=names, default=names, metavar="STEP", help="which steps: " + ", ".join(names)
    )
    parser.add_argument("--minutes", type=float, default=8, metavar="M", help="of the whole check (default: 8)")
    parser.add_argument(
        "--train", nargs="+", metavar="CONFIG", help="use the time left to train this config, with these key=value"
    )
    parser.add_argument(
        "--train-minutes", type=float, default=0, metavar="M", help="of --minutes, keep so many for --train"
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny networks")
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args()


def memory_of_card() -> float | None:
    """Return the memory of the first GPU in GiB, or None if there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]) / 1024
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None


def run_apart(starter: Starter, name: str, argv: list[str], limit_s: float, out: Path) -> dict:
    """Return the result of a program that ran in a process of its own: what it printed after RESULT."""
    started, path = time.monotonic(), out / "log.txt"
    with path.open("ab") as log:
        log.write(f"\n==== {name}\n".encode())
        log.flush()
        begin = log.tell()
        code = starter.wait(starter.start(argv, log), limit_s)
    lines = path.read_bytes()[begin:].decode(errors="replace").splitlines()
    row = {"wall_s": round(time.monotonic() - started, 1)}
    results = [line for line in lines if line.startswith("RESULT ")]
    if results:
        return row | json.loads(results[-1].removeprefix("RESULT "))
    if code == 0:
        return row
    said = " | ".join([line for line in lines if line.strip()][-3:])[-400:]
    return row | {"failed": f"stopped after {limit_s:.0f} s" if code is None else f"exit code {code}", "said": said}


def train(starter: Starter, options: argparse.Namespace, left_s: float) -> dict:
    """Train a config for the time left. Its checkpoint is in OUT/training, and the same command continues it."""
    if left_s < LEAST_TRAINING_S:
        return {"skipped": f"only {left_s:.0f} s are left"}
    run_dir = (options.out / "training").resolve()
    config, *overrides = options.train
    for_saving = min(15, left_s / 4)
    argv = [str(HERE.parent / "launch/train.py"), "--config", config, f"run_dir={run_dir}", *overrides]
    argv.append(f"train.max_hours={(left_s - for_saving) / 3600:.5f}")
    row = run_apart(starter, "train", argv, left_s, options.out)
    return row | {"checkpoints": sorted(path.name for path in run_dir.glob("checkpoints/*"))}


def note(name: str, row: dict, out: Path) -> bool:
    """Write the result of a step; returns whether it failed."""
    row = {"step": name} | row
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return "failed" in row


def tiny(step: Step) -> Step:
    """Return the same step for networks that a CPU runs in seconds."""
    keep = tuple(
        text.replace("=60", "=2").replace("=24", "=2")
        for text in step.overrides
        if not text.startswith("backbone.compile")
    )
    from teasr import run_config

    sizes = SIZES.get(step.preset.partition("_")[0])
    if sizes is not None:
        keep += (*sizes, *TINY)
        config = run_config.load(HERE.parent / f"launch/presets/{step.preset}.yaml", list(keep))
        keep += tuple(f"method.{name}=0" for name in NO_PERCEPTION if hasattr(config.method, name))
    side = 64 if step.preset.startswith("sd21") else 32  # the U-Net halves the sides three times
    small = replace(step, overrides=keep, size_px=side, updates=1, memory_gib=None, is_tiny=True)
    return replace(small, limit_s=10 * step.limit_s)  # the machine of a rehearsal may be busy


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    sys.path.insert(1, str(HERE.parent))
    sys.exit(main())
