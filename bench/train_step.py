"""Measure memory, phases and FLOP/s of one update with random weights: TEASR, one joint graph, VSD in three layouts.

    python bench/train_step.py --config launch/presets/qwen_teasr.yaml            # on a GPU of 80 GB; no weights needed
    python bench/train_step.py --config launch/presets/qwen_teasr_24gb.yaml --layouts teasr
    python bench/train_step.py train.dtype=fp32 backbone.train=lora --config launch/presets/small_teasr.yaml --size 64
    python bench/train_step.py --config launch/presets/qwen_teasr.yaml --predict  # counts only, no GPU

Layouts: teasr; joint (all its losses in one graph); vsd, vsd2 and vsd1 (OSEDiff with TEASR's student on three copies of
the network, two copies, and one base; the last two need backbone.train=lora). Each runs in its own process, one after
another, at any image size. `predicted` is the total of the dry run without its allowance for CUDA. On a GPU,
`allocated` and `reserved` are those of PyTorch; on a CPU, `allocated` is counted by meter.Meter in a separate update.
FLOP/s is the FLOP count of the dry run divided by the measured time; `of matmul` divides it by the rate of one large
matrix product in the network's dtype on the same device.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from peer_update import Joint

from teasr import run_config
from teasr.data.batch import Batch
from teasr.methods.score_distillation import ScoreDistillation, ScoreDistillationConfig
from teasr.methods.teasr import Teasr
from teasr.run_config import RunConfig
from teasr.tracking.environment import git_commit
from teasr.training import footprint
from teasr.training.engine import engine_settings, start_engine, start_ranks
from teasr.training.footprint import GIB
from teasr.training.networks import Networks
from teasr.training.update import Update
from teasr.util.distributed import World
from teasr.util.meter import Meter

TEASR = {"teasr": Teasr, "joint": Joint}
VSD = {"vsd": "three_copies", "vsd2": "two_copies", "vsd1": "one_base"}
LAYOUTS = (*TEASR, *VSD)


def main() -> None:
    """Measure or predict every layout and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML config, such as launch/presets/qwen_teasr.yaml"
    )
    parser.add_argument(
        "--size", type=int, default=512, metavar="PX", help="side of the images in pixels (default: 512)"
    )
    parser.add_argument(
        "--updates", type=int, default=5, help="number of measured updates, after one warm-up update (default: 5)"
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="layouts to measure (default: all)"
    )
    parser.add_argument(
        "--predict", action="store_true", help="only predict, by counting on the meta device; runs no update"
    )
    parser.add_argument(
        "--measure", action="store_true", help="only measure; skips the counting, which takes a minute at full size"
    )
    parser.add_argument("--only", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides, such as train.micro_batch=1"
    )
    options = parser.parse_intermixed_args()
    if options.predict and options.measure:
        parser.error("--predict only counts and --measure only measures: choose one of them")
    if options.only:
        print(json.dumps(one_layout(options)))
        return
    print(f"{options.config}, {options.size} px, commit {git_commit()}, torch {torch.__version__}, {device_name()}")
    rows = {name: run_apart(name) for name in options.layouts}
    print(table(rows, options.predict))


def run_apart(layout: str) -> dict:
    """Return the numbers of one layout, computed in a separate process."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", layout], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def one_layout(options: argparse.Namespace) -> dict:
    """Predict one layout and, unless --predict is given, measure it."""
    config = in_layout(run_config.load(options.config, options.overrides), options.only).with_random_weights()
    partitioning, row = engine_settings(config.train, 1), {}
    if not options.measure:
        counted = footprint.count(config, partitioning, options.size)
        row = {
            "predicted": counted.gpu_total - footprint.CUDA_BYTES,
            "host": sum(counted.host.values()),
            "flops": sum(counted.flops.values()),
        }
    if options.predict:
        return row
    try:
        return row | measure(config, partitioning, options.size, options.updates)
    except torch.OutOfMemoryError as error:
        return row | {"failed": f"out of memory: {str(error).splitlines()[0][:100]}"}


def in_layout(config: RunConfig, layout: str) -> RunConfig:
    """Return the config of this layout, from one of TEASR."""
    if layout in TEASR:
        run_config.METHODS.setdefault(layout, lambda: (type(config.method), TEASR[layout]))
        return replace(config, method_name=layout)
    run_config.METHODS.setdefault(layout, lambda: (ScoreDistillationConfig, ScoreDistillation))
    teasr = config.method
    shared = {name: getattr(teasr, name) for name in ("lambda_mse", "lambda_lpips", "lpips_net", "lpips_weights")}
    return replace(config, method_name=layout, method=ScoreDistillationConfig(layout=VSD[layout], **shared))


def measure(config: RunConfig, partitioning: dict, size_px: int, updates: int, counted: bool = True) -> dict:
    """Return median seconds by phase and peak bytes of real updates on this machine's device.

    `counted`: on a CPU, count the peak bytes in a further update.
    """
    world, start = World.from_environment(), {"begin": time.perf_counter()}
    start_ranks(config.train, world)
    start["ranks"] = now(world.device)
    cuda = world.device.type == "cuda"
    method = config.build_method()
    method.load()
    method.to(world.device)
    networks = Networks(config, method)
    x = torch.rand(config.train.micro_batch, 3, size_px, size_px, device=world.device) * 2 - 1
    if networks.student.needs_fit:
        networks.student.fit([(p, p) for p in x.cpu()] * 8)
    start["build"] = now(world.device)
    networks.share_codec()
    networks.place_frozen(world.device)
    if partitioning["zero_optimization"]["stage"] < 3:  # with ZeRO-3, the engine places what it partitions
        for base in networks.trained_bases.values():
            base.to(world.device)
    start["place"] = now(world.device)
    meter, held = nullcontext(), {}
    if not cuda:
        meter = Meter("cpu")
        held |= {id(t): t for group in method.memory_groups().values() for t in group}
        for base in networks.bases.values():
            base.to(world.device)
            held |= {id(t): t for group in base.memory_groups().values() for t in group}
        meter.ignore(*held.values())
    with meter:
        engines = {
            place: start_engine(base, config.train, partitioning, world)
            for place, base in networks.trained_bases.items()
        }
    start["engines"] = now(world.device)
    step = Update(method, networks, engines, config.train, config.seed, world)
    batches = [Batch(x, x, [""] * len(x))] * config.train.accumulation(1)
    phases: list[dict[str, float]] = []
    for update in range(updates + 1 if cuda or not counted else updates + 2):
        counting = update == updates + 1  # on a CPU; counting is slow, so it has its own update
        with meter if counting else nullcontext():
            phases.append(one_update(step, batches, config.train.updates - 1, x.device))
        if cuda and update == 0:
            torch.cuda.reset_peak_memory_stats()
    timed = phases[1 : updates + 1]
    row = {"seconds": {name: statistics.median(p[name] for p in timed) for name in timed[0]}}
    row["start"] = {name: at - before for (_, before), (name, at) in itertools.pairwise(start.items())}
    row["start"]["first update"] = sum(phases[0].values())
    if cuda:
        row |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    else:
        row["allocated"] = meter.peak + sum(t.nbytes for t in held.values())
    dtype = torch.bfloat16 if getattr(config.backbone, "dtype", "fp32") == "bf16" else torch.float32
    return row | {"matmul": matmul_rate(world.device, dtype)}


def one_update(step: Update, batches: list[Batch], update: int, device: torch.device) -> dict[str, float]:
    """Return the seconds of every loss, and of checks, clipping and the optimiser's step together."""
    seconds: dict[str, float] = {}
    last = now(device)

    def phase(name: str) -> None:
        nonlocal last
        at = now(device)
        seconds[name] = seconds.get(name, 0.0) + at - last
        last = at

    step(update, batches, {}, freed=phase)
    phase("step")
    return seconds


def now(device: torch.device) -> float:
    """Return the time in seconds, after all work on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of one large square matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = now(device)
        a @ b
        best = min(best, now(device) - started)
    del a, b
    gc.collect()
    return 2 * n**3 / best


def device_name() -> str:
    """Return the name of the GPU, or of the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))


def table(rows: dict[str, dict], predicted_only: bool) -> str:
    """Format one line per layout, with the phases below."""
    gib = lambda row, key: f"{row[key] / GIB:11.3f}" if key in row else f"{'-':>11s}"  # noqa: E731
    lines = [
        f"{'layout':8s}{'predicted':>11s}{'host':>11s}{'allocated':>11s}{'reserved':>11s} GiB"
        f"{'TFLOP':>10s}{'s/update':>10s}{'of matmul':>11s}"
    ]
    for name, row in rows.items():
        if "predicted" not in row and "seconds" not in row:
            lines.append(f"{name:8s} {row['failed']}")
            continue
        line = f"{name:8s}" + "".join(gib(row, key) for key in ("predicted", "host", "allocated", "reserved"))
        line += f"    {row['flops'] / 1e12:10.3f}" if "flops" in row else f"    {'-':>10s}"
        if "seconds" in row:
            total = sum(row["seconds"].values())
            line += f"{total:10.3f}"
            line += f"{row['flops'] / total / row['matmul']:11.1%}" if "flops" in row else f"{'-':>11s}"
        lines.append(line + ("" if "failed" not in row else f"  {row['failed']}"))
    for name, row in rows.items():
        if "seconds" in row:
            lines.append(f"{name}: " + ", ".join(f"{phase} {s:.3f} s" for phase, s in row["seconds"].items()))
    return "\n".join(lines + ["predictions only: counted on the meta device, nothing was run"] * predicted_only)


if __name__ == "__main__":
    main()
