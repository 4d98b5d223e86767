"""Log a training to CSV files in the run folder and, optionally, to an MLflow run that mirrors the folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from teasr.config.settings import TrackingConfig
from teasr.config.strict_yaml import flatten
from teasr.tracking.csv_log import CsvLog
from teasr.tracking.environment import environment
from teasr.tracking.mlflow_run import Mirror, Sender
from teasr.tracking.run_files import DATASETS_FILE, METRICS, PARAMS_FILE, PREVIEW, PREVIEWS, STATUS_FILE, TIMING
from teasr.util.files import write_atomic


class Tracker:
    """Logs the numbers and preview images of a run. Only rank 0 creates one."""

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        params: dict,
        resume_from: int = 0,
        datasets: Sequence[Mapping[str, Any]] = (),
    ):
        """`datasets`: what the run reads, each as {name, digest, source, context, profile}."""
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics = CsvLog(run_dir / METRICS, resume_from)
        self.timing = CsvLog(run_dir / TIMING, resume_from)
        write_atomic(run_dir / "environment.txt", environment().encode())
        write_atomic(run_dir / PARAMS_FILE, json.dumps(flatten(params), indent=1, default=str).encode())
        write_atomic(run_dir / DATASETS_FILE, json.dumps({"datasets": list(datasets)}, indent=1).encode())
        self._status("RUNNING")
        self.sender = Sender(Mirror(run_dir, config, resume_from)) if config.mlflow else None

    def log(self, update: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """Log one update: `metrics` are reproducible, `timing` differs between identical runs."""
        self.metrics.append(update, metrics)
        self.timing.append(update, timing | {"unix_ms": int(1000 * time.time())})

    def close(self, status: str) -> None:
        """Flush, and set the final status as MLflow names it: FINISHED, FAILED or KILLED."""
        self._status(status)
        if self.sender:
            self.sender.close(status)

    def preview(self, update: int, png: bytes) -> None:
        """Save the preview image of an update."""
        self._write(self.run_dir / PREVIEWS / PREVIEW.format(update), png)

    def _status(self, status: str) -> None:
        self._write(self.run_dir / STATUS_FILE, f"{status}\n".encode())

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file. Errors only print a warning: a full disk is handled where checkpoints are saved."""
        try:
            write_atomic(path, data)
        except OSError as error:
            print(f"warning: {path} cannot be written ({error.strerror})", flush=True)
