"""Utilisation of the host and of a rank's GPU, under the names that MLflow shows as system metrics."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import torch

PERIOD_S = 10.0


class Machine:
    """Samples the machine at most once every PERIOD_S seconds.

    GPU load and power need the package nvidia-ml-py; without it they are left out.
    """

    def __init__(self, folder: Path, device: torch.device):
        """`folder`: the folder whose disk is monitored."""
        self.folder, self.device, self._process, self._next = folder, device, psutil.Process(), 0.0
        psutil.cpu_percent(None)  # measures since the previous call, so make one now

    def sample(self) -> dict[str, float]:
        """Return numbers by name, or none when the last sample is not old enough."""
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
                pass  # nvidia-ml-py is missing, or the driver does not report the value
        return {f"system/{name}": value for name, value in found.items()}
