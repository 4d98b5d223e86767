"""The rank of this process, and the few collective operations in use."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank and world size as set by the launcher in the environment (a single rank if not set)."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK. Without a launcher, set the variables for a single process first.

        Raises ValueError when only some of them are set.
        """
        if "RANK" not in os.environ:
            single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(single | {"MASTER_PORT": os.environ.get("MASTER_PORT", str(free_port()))})
        found = {key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        for key, value in found.items():
            if value is None or not value.isdecimal():
                raise ValueError(
                    f"the environment variable RANK is set, but {key} = {value} is not a whole number: start the ranks "
                    "with deepspeed, torchrun or launch/slurm.sbatch, or unset RANK"
                )
        return cls(*map(int, found.values()))

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints, logs and commits files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def mean(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Average scalars over ranks in one all-reduce. Every rank must pass the same names."""
        if not values:
            return {}
        stacked = torch.stack([v.detach().double().to(self.device) for v in values.values()])
        if self.size > 1:
            dist.all_reduce(stacked)
            stacked /= self.size
        return dict(zip(values, stacked.tolist(), strict=True))

    def from_main(self, value: Any) -> Any:
        """Broadcast the value of rank 0 (small picklable objects created by this program)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def leave(code: int) -> NoReturn:
    """Exit the process with this code.

    If torch.distributed is initialised, skip Python's shutdown: torch's gloo threads outlive their groups, and during
    shutdown they occasionally abort a process that has finished its work ("terminate called without an active
    exception", exit code -6).
    """
    if dist.is_initialized():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def free_port() -> int:
    """A TCP port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
