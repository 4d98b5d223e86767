"""Check on one GPU what can only be counted without one: seconds, memory and correctness. Needs no weights and no hub.

    python bench/gpu_check.py --out results/gpu                       # all steps in order of value, about 6 minutes
    python bench/gpu_check.py --out results/gpu --only machine teasr-nf4
    python bench/gpu_check.py --out results/gpu --tiny                # rehearsal with tiny networks, on any CPU

Every step runs in its own process with a time limit, and its result is appended to OUT/results.jsonl at once; what it
printed is in OUT/log.txt. A step that fails or takes too long does not stop the others. `--budget` ends the check: a
step starts only if its limit still fits. docs/memory.md has the results of one H200.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
PRESETS = HERE.parent / "launch/presets"
GIB = 2**30
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
CHECKPOINTING = "backbone.gradient_checkpointing=true"
TINY = (  # replaces the published sizes
    "backbone.transformer={num_layers: 2, attention_head_dim: 16, num_attention_heads: 2, joint_attention_dim: 32, "
    "axes_dims_rope: [4, 6, 6], in_channels: 16, out_channels: 4, patch_size: 2}",
    "backbone.vae={base_dim: 8, z_dim: 4, dim_mult: [1, 1, 1, 1], num_res_blocks: 1, latents_mean: [0, 0, 0, 0], "
    "latents_std: [1, 1, 1, 1]}",
    "backbone.lora_rank=4",
    "backbone.modulation_table=20",
    "backbone.model=random",
    "backbone.prompt=random",
)


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
    layout: str = "teasr"
    memory_gib: float | None = None  # let PyTorch use no more than this


ONE = ("train.batch=1",)
FOUR = ("train.batch=4", "train.micro_batch=4", CHECKPOINTING)
SWAP = (CHECKPOINTING, "backbone.swap_blocks=60")
STEPS = (
    Step("machine", "machine", 45),
    Step("teasr-bf16", "update", 75, "qwen_teasr", ONE),
    Step("teasr-nf4", "update", 75, "qwen_teasr_24gb", ONE),
    Step("vsd-bf16", "update", 120, "qwen_teasr", ONE, layout="vsd"),
    Step("swap-bf16", "update", 75, "qwen_teasr", (*ONE, *SWAP)),
    Step("swap-check", "swap_check", 75),
    Step("losses", "losses", 60, "tiny_teasr"),
    Step("restore-bf16", "restore", 60, "qwen_teasr"),
    Step("teasr-bf16-four-at-once", "update", 75, "qwen_teasr", FOUR, updates=1),
    Step("swap-bf16-four-at-once", "update", 75, "qwen_teasr", (*FOUR, *SWAP), updates=1),
    Step("teasr-nf4-1024px", "update", 75, "qwen_teasr_24gb", ONE, size_px=1024, updates=1),
    Step("swap-nf4-in-8gb", "update", 75, "qwen_teasr_24gb", (*ONE, *SWAP), updates=1, memory_gib=7.5),
    Step("teasr-zero3-offload", "update", 120, "qwen_teasr_zero3_offload", ONE, updates=1),
    Step("teasr-bf16-compiled", "update", 150, "qwen_teasr", (*ONE, "backbone.compile=true"), updates=1),
    Step("teasr-fp8", "update", 75, "qwen_teasr_24gb", (*ONE, "backbone.quantise=fp8"), updates=1),
    Step("joint-bf16", "update", 90, "qwen_teasr", ONE, layout="joint"),
)


def main() -> int:
    """Run the steps, or one step in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results.jsonl and log.txt")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument(
        "--budget", type=float, default=480, metavar="S", help="seconds of the whole check (default: 480)"
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny networks")
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step = next(step for step in STEPS if step.name == options.step)
        print("RESULT " + json.dumps(run(tiny(step) if options.tiny else step)), flush=True)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    ends, failed = time.monotonic() + options.budget, 0
    for step in (step for step in STEPS if step.name in options.only):
        left = ends - time.monotonic()
        if left < step.limit_s:
            row = {"step": step.name, "skipped": f"{left:.0f} s are left, and the step may take {step.limit_s} s"}
        else:
            row = run_apart(step, options)
        failed += "failed" in row
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    return min(failed, 1)


def run_apart(step: Step, options: argparse.Namespace) -> dict:
    """Return the result of a step that ran in a process of its own."""
    argv = [sys.executable, __file__, "--out", str(options.out), "--step", step.name, *["--tiny"] * options.tiny]
    started, log = time.monotonic(), options.out / "log.txt"
    with log.open("ab") as file:
        file.write(f"\n==== {step.name}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=ENVIRONMENT)
        try:
            code = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            code = f"stopped after {step.limit_s} s"
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    text = log.read_bytes()[begin:].decode(errors="replace")
    row = {"step": step.name, "wall_s": round(time.monotonic() - started, 1)}
    results = [line for line in text.splitlines() if line.startswith("RESULT ")]
    if results:
        return row | json.loads(results[-1].removeprefix("RESULT "))
    last = [line for line in text.splitlines() if line.strip()][-3:]
    return row | {"failed": f"exit code {code}" if isinstance(code, int) else code, "said": " | ".join(last)[-400:]}


def tiny(step: Step) -> Step:
    """Return the same step for networks that a CPU runs in seconds."""
    keep = tuple(text.replace("=60", "=2") for text in step.overrides if "quantise" not in text)
    sizes = TINY if step.preset.startswith("qwen") else ()
    plain = ("backbone.quantise=null", "backbone.dtype=fp32") if sizes else ()
    return replace(step, overrides=(*keep, *sizes, *plain), size_px=64, memory_gib=None)


def run(step: Step) -> dict:
    """Run one step in this process."""
    kinds = {"machine": machine, "update": update, "losses": losses, "restore": restore, "swap_check": swap_check}
    return kinds[step.kind](step)


def update(step: Step) -> dict:
    """Seconds, peaks and locked host memory of whole updates of 20 B parameters with random weights."""
    import torch
    from train_step import in_layout, measure

    from teasr.training.engine import engine_settings

    if step.memory_gib and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(
            step.memory_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    config = in_layout(load(step), step.layout).with_random_weights()
    with Watch() as watch:
        row = measure(config, engine_settings(config.train, 1), step.size_px, step.updates)
    return row | {"batch": config.train.batch, "size_px": step.size_px} | watch.result()


def load(step: Step):
    """The run config of a step."""
    from teasr import run_config

    os.chdir(HERE.parent)  # presets name files of ds_configs
    return run_config.load(PRESETS / f"{step.preset}.yaml", list(step.overrides))


class Watch:
    """Records the most memory that the driver reports in use on the GPU while a block of code runs."""

    def __init__(self):
        self.most, self.done = 0, threading.Event()

    def __enter__(self) -> Watch:
        import torch

        self.cuda = torch.cuda.is_available()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        import torch

        while self.cuda and not self.done.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            self.most = max(self.most, total - free)

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()

    def result(self) -> dict:
        """Peak bytes of the driver, and bytes of the host: most in use, and locked."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        host = {key: int(status[key].split()[0]) * 1024 for key in ("VmHWM", "VmLck", "VmPin") if key in status}
        return {"driver_peak": self.most, "host": host}


def machine(step: Step) -> dict:
    """Versions, copy and matmul rates, and the cost of pinned memory."""
    import platform
    import resource

    import torch

    row = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    row |= {"cores": os.cpu_count(), "locked_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]}
    if not torch.cuda.is_available():
        return row | {"device": "no GPU"}
    from train_step import matmul_rate

    about = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,pcie.link.gen.current",
         "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()  # fmt: skip
    row |= {"device": about, "memory": torch.cuda.get_device_properties(0).total_memory}
    row["matmul"] = {str(d): matmul_rate(torch.device("cuda"), d) for d in (torch.bfloat16, torch.float32)}
    one, two = (torch.zeros(2 * GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    row["device_copy"] = 2 * one.nbytes / seconds(lambda: one.copy_(two))  # read and written
    row["to_gpu"], row["to_host"] = {}, {}
    for size in (117_000_000, 227_000_000, 453_000_000):
        on_gpu = torch.empty(size, dtype=torch.uint8, device="cuda")
        for kind, host in (("pinned", torch.empty(size, dtype=torch.uint8, pin_memory=True)),
                           ("pageable", torch.ones(size, dtype=torch.uint8))):  # fmt: skip
            name = f"{kind} {size}"
            row["to_gpu"][name] = size / seconds(partial(on_gpu.copy_, host, non_blocking=True))
            row["to_host"][name] = size / seconds(partial(host.copy_, on_gpu, non_blocking=True))
    plain = torch.ones(4 * GIB, dtype=torch.uint8)
    at = time.perf_counter()
    error = int(torch.cuda.cudart().cudaHostRegister(plain.data_ptr(), plain.nbytes, 0))
    row["register_s_per_gib"] = (time.perf_counter() - at) / 4 if not error else f"error {error}"
    if not error:
        on_gpu = torch.empty(453_000_000, dtype=torch.uint8, device="cuda")
        rate = 453e6 / seconds(lambda: on_gpu.copy_(plain[:453_000_000], non_blocking=True))
        row["to_gpu"]["registered 453000000"] = rate
        torch.cuda.cudart().cudaHostUnregister(plain.data_ptr())
    at = time.perf_counter()
    pinned = torch.empty(2 * GIB + 1, dtype=torch.uint8, pin_memory=True)
    row["pin_memory_s_per_gib"] = (time.perf_counter() - at) / 2
    del pinned
    return row


def seconds(act) -> float:
    """The shortest of five runs, after a warm-up."""
    import torch

    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        at = time.perf_counter()
        act()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - at)
    return best


def losses(step: Step) -> dict:
    """Loss of ten updates of a small network: on the CPU in fp32, and on the GPU in fp32 and bf16, ZeRO-1 and 3."""
    kinds = {"cpu": ("cpu", "zero1", "fp32"), "zero1": ("gpu", "zero1", "fp32"), "zero3": ("gpu", "zero3", "fp32"),
             "zero2_offload": ("gpu", "zero2_offload", "fp32"), "bf16": ("gpu", "zero1", "bf16")}  # fmt: skip
    if not Path("/dev/nvidiactl").exists():
        kinds = {name: ("cpu", zero, dtype) for name, (_, zero, dtype) in kinds.items() if "offload" not in name}
    started = {}
    for name, (device, zero, dtype) in kinds.items():
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        argv = [sys.executable, str(HERE / "gpu_losses.py"), step.preset, f"train.dtype={dtype}",
                f"train.deepspeed=ds_configs/{zero}.json"]  # fmt: skip
        started[name] = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
    row = {}
    for name, process in started.items():
        lines = process.communicate()[0].splitlines()
        row[name] = json.loads(lines[-1]) if lines and process.returncode == 0 else f"exit code {process.returncode}"
    return row


def swap_check(step: Step) -> dict:
    """Compare outputs and gradients of swapped blocks with those of resident blocks (bench/swap_check.py)."""
    rehearsal = ["--tiny", "--device", "cpu"] if step.size_px < 512 else []
    done = subprocess.run([sys.executable, str(HERE / "swap_check.py"), *rehearsal], capture_output=True, text=True)
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {"cases": cases, "exit_code": done.returncode, "said": done.stderr[-300:] if done.returncode else ""}


def restore(step: Step) -> dict:
    """Measure seconds and peak memory of restoring one picture in 1 and 4 steps with random weights, at two sizes."""
    import torch

    from teasr.methods.sampler import restore as restored
    from teasr.training.networks import Networks
    from teasr.util.distributed import World

    config = load(step).with_random_weights()
    device = World.from_environment().device
    method = config.build_method()
    networks = Networks(config, method)
    networks.student.to(device)
    model, row = networks.models["student"], {}
    for size in (step.size_px, 2 * step.size_px):
        x = torch.rand(1, 3, size, size, device=device) * 2 - 1
        for steps in (1, 4):
            times = []
            for _ in range(3):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                at = time.perf_counter()
                y = restored(model, method.sampler(), x, steps, 0)
                assert bool(torch.isfinite(y).all())
                times.append(time.perf_counter() - at)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            row[f"{size} px, {steps} step(s)"] = {"seconds": sorted(times)[1], "allocated": peak}
    return row


if __name__ == "__main__":
    sys.exit(main())
