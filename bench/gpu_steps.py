"""What the steps of bench/gpu_check.py do: updates of 20 B parameters, copies, losses, restoring, block swap."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from apart import Starter
from train_step import in_layout, matmul_rate, measure

from teasr import run_config
from teasr.methods.sampler import restore as restored
from teasr.training.engine import engine_settings
from teasr.training.footprint import GIB
from teasr.training.networks import Networks
from teasr.util.distributed import World, free_port

HERE = Path(__file__).resolve().parent
PRESETS = HERE.parent / "launch/presets"
ENDING_S = 5  # of the limit of a step, for what it does after its own processes have ended


def run(step) -> dict:
    """Run one step in this process."""
    kinds = {"machine": machine, "update": update, "losses": losses, "restore": restore, "swap_check": swap_check}
    return (kinds | {"small": small})[step.kind](step)


def update(step) -> dict:
    """Seconds, peaks and locked host memory of whole updates with random weights."""
    if step.memory_gib and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(
            step.memory_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    config = load(step)
    config = (in_layout(config, step.layout) if step.layout else config).with_random_weights()
    with Watch() as watch:
        row = measure(config, engine_settings(config.train, 1), step.size_px, step.updates, counted=not step.is_tiny)
    return row | {"batch": config.train.batch, "size_px": step.size_px} | watch.result()


def load(step):
    """The run config of a step."""
    os.chdir(HERE.parent)  # presets name files of ds_configs
    return run_config.load(PRESETS / f"{step.preset}.yaml", list(step.overrides))


class Watch:
    """Records the most memory that the driver reports in use on the GPU while a block of code runs."""

    def __init__(self):
        self.most, self.done = 0, threading.Event()

    def __enter__(self) -> Watch:
        self.cuda = torch.cuda.is_available()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
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


def machine(step) -> dict:
    """Versions, copy and matmul rates, and the cost of pinned memory."""
    import platform
    import resource

    row = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    row |= {"cores": os.cpu_count(), "locked_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]}
    if not torch.cuda.is_available():
        return row | {"device": "no GPU"}
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
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        at = time.perf_counter()
        act()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - at)
    return best


def losses(step) -> dict:
    """Loss of ten updates of a small network: on the CPU in fp32, and on the GPU in fp32 and bf16, ZeRO-1 and 3."""
    kinds = {"cpu": ("cpu", "zero1", "fp32"), "zero1": ("gpu", "zero1", "fp32"), "zero3": ("gpu", "zero3", "fp32"),
             "zero2_offload": ("gpu", "zero2_offload", "fp32"), "bf16": ("gpu", "zero1", "bf16")}  # fmt: skip
    if not Path("/dev/nvidiactl").exists():
        kinds = {name: ("cpu", zero, dtype) for name, (_, zero, dtype) in kinds.items() if "offload" not in name}
    starter, row, ends = Starter(), {}, time.monotonic() + step.limit_s - ENDING_S
    with contextlib.ExitStack() as stack:
        started = {}
        for name, (device, zero, dtype) in kinds.items():
            log = stack.enter_context(tempfile.TemporaryFile())
            hidden = (
                {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" and "gpu" in {d for d, *_ in kinds.values()} else {}
            )
            hidden["MASTER_PORT"] = str(free_port())  # they start at the same moment
            argv = [str(HERE / "gpu_losses.py"), "2" if step.is_tiny else "10", step.preset, f"train.dtype={dtype}",
                    f"train.deepspeed=ds_configs/{zero}.json"]  # fmt: skip
            started[name] = starter.start(argv, log, hidden, group=False), log
        for name, (pid, log) in started.items():
            code = starter.wait(pid, ends - time.monotonic())
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            row[name] = json.loads(lines[-1]) if code == 0 else f"exit code {code}: {' | '.join(lines[-2:])[-300:]}"
    return row


def swap_check(step) -> dict:
    """Compare outputs and gradients of swapped blocks with those of resident blocks (bench/swap_check.py)."""
    rehearsal = ["--tiny", "--device", "cpu", "--kinds", "bf16", "--rings", "2"] if step.is_tiny else []
    starter = Starter()
    with tempfile.TemporaryFile() as log:
        code = starter.wait(
            starter.start([str(HERE / "swap_check.py"), *rehearsal], log, group=False), step.limit_s - 5
        )
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    cases = [json.loads(line) for line in lines if line.startswith("{")]
    said = {} if code == 0 else {"failed": f"exit code {code}", "said": " | ".join(lines[-3:])[-300:]}
    return {"cases": cases} | said


def small(step) -> dict:
    """The shipped small model on the GPU: seconds, and the largest and mean difference in levels from the CPU."""
    import numpy as np

    from teasr import Upscaler

    side = 16 if step.is_tiny else 256
    x = np.linspace(0, 255, side * side * 3).reshape(side, side, 3).astype(np.uint8)
    x = np.clip(x + np.random.default_rng(0).normal(0, 20, x.shape), 0, 255).astype(np.uint8)
    device, row = World.from_environment().device, {}
    upscalers = [Upscaler.from_pretrained("small", device=name) for name in ("cpu", device)]
    dials = {dial.name for dial in upscalers[0].descriptor.dials}
    hows = [{"steps": 1}, {"steps": 4}] + [{"steps": 1, "strength": s} for s in (0.0, 0.5) if "strength" in dials]
    for how in hows:
        wanted, found = (upscaler(x, **how).astype(int) for upscaler in upscalers)
        at = time.perf_counter()
        upscalers[1](x, **how)
        off = np.abs(found - wanted)
        name = ", ".join(f"{key} {value}" for key, value in how.items())
        row[name] = {"seconds": time.perf_counter() - at, "most_off": int(off.max()), "mean_off": float(off.mean())}
    return row


def restore(step) -> dict:
    """Measure seconds and peak memory of restoring one picture in 1 and 4 steps with random weights, at two sizes."""
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
