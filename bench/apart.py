"""Start Python programs in processes of their own, forked from one that has imported torch, DeepSpeed and diffusers.

The imports take ten seconds or more in each new interpreter; a forked process has them already. Whether CUDA works in a
forked process is tried once. If it does not, or if the program is to see other GPUs, a new interpreter is started.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn
from unittest import mock

for name, value in {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # so that the imports do not initialise CUDA
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_SOCKET_IFNAME": "lo",  # one machine; others may have no network at all
    "GLOO_SOCKET_IFNAME": "lo",
}.items():
    os.environ.setdefault(name, value)


class Starter:
    """Starts programs and waits for them."""

    def __init__(self):
        """Import the libraries, and try a forked process."""
        self.forks = False
        try:
            import torch

            with _without_starting_cuda(torch):
                import deepspeed  # noqa: F401
                import lpips  # noqa: F401
                import torchvision  # noqa: F401

                import teasr.backbones.qwen_image.backbone  # imports diffusers, and that imports bitsandbytes
                import teasr.backbones.sd3
                import teasr.backbones.sd_unet.backbone
                import teasr.backbones.z_image
                import teasr.training.trainer  # noqa: F401
        except ImportError:  # each program says what it lacks
            return
        pid = os.fork()
        if pid == 0:
            os._exit(_uses_cuda())
        self.forks = self.wait(pid, 30) == 0 and not torch.cuda.is_initialized()

    def start(
        self, argv: Sequence[str], log: BinaryIO, changes: Mapping[str, str] | None = None, group: bool = True
    ) -> int:
        """Start a Python file with arguments; returns its process id.

        `log`: where its output goes. `changes`: of the environment. `group`: it gets a process group of its own, which
        `wait` kills as a whole; without, it dies with the group of its parent.
        """
        log.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            if group:
                os.setsid()
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            os.environ.update(changes or {})
            if not self.forks or "CUDA_VISIBLE_DEVICES" in (changes or {}):
                os.execv(sys.executable, [sys.executable, *argv])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        _become(argv)

    def wait(self, pid: int, limit_s: float) -> int | None:
        """Return the exit code, or None if the process and its children were killed after `limit_s` seconds."""
        ends = time.monotonic() + limit_s
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None


@contextlib.contextmanager
def _without_starting_cuda(torch) -> Iterator[None]:
    """Context in which the GPU's compute capability comes from nvidia-smi.

    bitsandbytes asks for it when it is imported. PyTorch would start CUDA in this process to answer, after which CUDA
    works in no forked one.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    if not found or torch.cuda.is_initialized():
        yield
        return
    capability = tuple(int(number) for number in found[0].split("."))
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability):
        yield


def _uses_cuda() -> int:
    """Return 0 if this forked process can use the GPU, or if there is none."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return 1
    return 0


def _become(argv: Sequence[str]) -> NoReturn:
    """Run a Python file as the main program of this forked process, and end the process with its exit code."""
    code = 1
    # the caller may have replaced them, as pytest does
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    try:
        sys.argv = list(argv)
        sys.path[0] = str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
