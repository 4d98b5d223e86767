"""What the host and the GPU of a rank are doing, under the names that MLflow shows as system metrics; and how much memory is free."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import torch

PERIOD_S = 10.0
CGROUP = Path("/sys/fs/cgroup")


class Machine:
    """Samples at most every PERIOD_S. GPU load and power need the package nvidia-ml-py; without it they are left out."""

    def __init__(self, folder: Path, device: torch.device):
        """`folder`: whose disk is watched."""
        self.folder, self.device, self._process, self._next = folder, device, psutil.Process(), 0.0
        psutil.cpu_percent(None)  # it counts from the call before

    def sample(self) -> dict[str, float]:
        """Numbers by name; none when the last sample is not old enough."""
        now = time.monotonic()
        if now < self._next:
            return {}
        self._next = now + PERIOD_S
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(None),
            "system_memory_usage_megabytes": psutil.virtual_memory().used / 1e6,
            "process_memory_megabytes": self._process.memory_info().rss / 1e6,
            "disk_available_megabytes": psutil.disk_usage(str(self.folder)).free / 1e6,
        }
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            gpu = f"gpu_{self.device.index}"
            found[f"{gpu}_memory_usage_megabytes"] = (total - free) / 1e6
            try:
                found[f"{gpu}_utilization_percentage"] = torch.cuda.utilization(self.device)
                found[f"{gpu}_power_usage_watts"] = torch.cuda.power_draw(self.device) / 1000
            except (ModuleNotFoundError, RuntimeError):
                pass  # no nvidia-ml-py, or a driver that does not tell
        return {f"system/{name}": value for name, value in found.items()}


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU with what PyTorch has reserved and does not use; of the host within its control group's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        limit = CGROUP.joinpath("memory.max").read_text().strip()
        if limit != "max":
            used = int(CGROUP.joinpath("memory.current").read_text())
            cached = dict(line.split() for line in CGROUP.joinpath("memory.stat").read_text().splitlines())
            free = min(free, int(limit) - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control groups here
    return max(0, free)
