"""Metrics of a run: CSV files always, MLflow on top from a thread that can never hold up or stop the training."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import platform
import queue
import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from teasr.config import flatten
from teasr.files import write_atomic
from teasr.settings import TrackingConfig

RUN_FILE = "mlflow_run.json"
BAD_FILE = "bad_samples.txt"  # what the reader had to pass over, one a line


class CsvLog:
    """Rows of numbers by update, appended and flushed; a new column rewrites the file, a resume drops later rows."""

    def __init__(self, path: Path, resume_from: int = 0):
        """Keep the rows up to update `resume_from`."""
        self.path = path
        rows = list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []
        rows = [row for row in rows if row["update"] and int(row["update"]) <= resume_from]
        self.columns = list(rows[0]) if rows else ["update"]
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue().encode())

    def append(self, update: int, values: dict[str, float]) -> None:
        """Add one row; numbers with 9 significant digits."""
        new = [name for name in values if name not in self.columns]
        if new:
            rows = list(csv.DictReader(io.StringIO(self.path.read_text())))
            self.columns += new
            self._rewrite(rows)
        row = {"update": update} | {name: f"{value:.9g}" for name, value in values.items()}
        with open(self.path, "a") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


class Tracker:
    """Where a run's numbers and pictures go. Only rank 0 makes one."""

    def __init__(self, run_dir: Path, config: TrackingConfig, params: dict, resume_from: int = 0):
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics = CsvLog(run_dir / "metrics.csv", resume_from)
        self.timing = CsvLog(run_dir / "timing.csv", resume_from)
        write_atomic(run_dir / "environment.txt", environment().encode())
        self.mlflow = MlflowSink(run_dir, config, params, resume_from) if config.mlflow else None
        if self.mlflow:
            self.mlflow.artifact(run_dir / "environment.txt")
            self.mlflow.artifact(run_dir / "config.yaml")

    def log(self, update: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """One update: `metrics` are functions of the run alone, `timing` differs between equal runs."""
        self.metrics.append(update, metrics)
        self.timing.append(update, timing)
        if self.mlflow:
            self.mlflow.log(update, metrics | timing)

    def close(self, status: str) -> None:
        """Flush; `status` as MLflow names it: FINISHED, FAILED or KILLED."""
        if self.mlflow:
            if (self.run_dir / BAD_FILE).is_file():
                self.mlflow.artifact(self.run_dir / BAD_FILE)
            self.mlflow.close(status)


class MlflowSink:
    """An MLflow run fed by a daemon thread. When MLflow fails it says so once and drops; the CSV files have it all."""

    def __init__(self, run_dir: Path, config: TrackingConfig, params: dict, resume_from: int = 0):
        fail_fast()
        self.run_dir, self.config, self.params, self.resume_from = run_dir, config, params, resume_from
        self.uri = tracking_uri(run_dir, config)
        self.run_id: str | None = None
        self.error: str | None = None
        self._jobs: queue.Queue = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")
        self._thread.start()

    def log(self, update: int, values: dict[str, float]) -> None:
        """Queue the metrics of one update."""
        self._put(("metrics", (update, int(time.time() * 1000), dict(values))))

    def artifact(self, path: Path) -> None:
        """Queue a file."""
        self._put(("artifact", path))

    def close(self, status: str, timeout_s: float = 60.0) -> None:
        """Finish what is queued, set the status, wait at most `timeout_s`."""
        self._put(("close", status))
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            print(
                f"MLflow at {self.uri} did not take everything in {timeout_s:.0f} s; metrics.csv is complete",
                flush=True,
            )

    def _put(self, job: tuple[str, Any]) -> None:
        if self.error is None:
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                self._fail("it is too slow, its queue is full")

    def _fail(self, reason: object) -> None:
        if self.error is None:
            self.error = " ".join(str(reason).split())[:300]
            print(
                f"MLflow at {self.uri} failed ({self.error}): going on without it, metrics.csv has everything",
                flush=True,
            )

    def _work(self) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric

            client = MlflowClient(self.uri)
            self.run_id = open_run(client, self.run_dir, self.uri, self.config, self.params, self.resume_from)
            while True:
                jobs = [self._jobs.get()]
                while len(jobs) < 30 and not self._jobs.empty():
                    jobs.append(self._jobs.get())
                rows = [
                    Metric(k, v, at, n)
                    for kind, job in jobs
                    if kind == "metrics"
                    for n, at, d in [job]
                    for k, v in d.items()
                ]
                for i in range(0, len(rows), 1000):
                    client.log_batch(self.run_id, metrics=rows[i : i + 1000])
                for kind, job in jobs:
                    if kind == "artifact":
                        client.log_artifact(self.run_id, str(job))
                    elif kind == "close":
                        client.set_terminated(self.run_id, job)
                        return
        except Exception as error:  # whatever MLflow raises must not reach the training
            self._fail(error)


def fail_fast() -> None:
    """Make MLflow give up on a dead server at once; left alone it blocks every call for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def tracking_uri(run_dir: Path, config: TrackingConfig) -> str:
    """The config's URI, else MLFLOW_TRACKING_URI, else a sqlite file beside the run folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve().parent}/mlflow.db"


def open_run(client, run_dir: Path, uri: str, config: TrackingConfig, params: dict, resume_from: int = 0) -> str:
    """The MLflow run of a run folder: reopened if its id is on file and known to the store, else created."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    note = run_dir / RUN_FILE
    if note.is_file():
        known = json.loads(note.read_text())
        try:
            if known["uri"] == uri:
                client.get_run(known["run_id"])
                client.update_run(known["run_id"], status="RUNNING")
                if resume_from:
                    client.set_tag(known["run_id"], "resumed_from_update", resume_from)
                return known["run_id"]
        except MlflowException:
            pass  # the store was cleared: a new run below
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        place = None
        if uri.startswith("sqlite:"):
            place = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / config.experiment).as_uri()
        experiment_id = client.create_experiment(
            config.experiment, artifact_location=place, tags={"mlflow.experimentKind": "custom_model_development"}
        )
    else:
        experiment_id = experiment.experiment_id
    tags = {"mlflow.source.git.commit": git_commit(), "mlflow.source.name": "launch/train.py", "run_dir": str(run_dir)}
    run_id = client.create_run(experiment_id, run_name=config.run_name or run_dir.name, tags=tags).info.run_id
    flat = [Param(key, str(value)[:6000]) for key, value in flatten(params).items()]
    for i in range(0, len(flat), 100):
        client.log_batch(run_id, params=flat[i : i + 100])
    write_atomic(note, json.dumps({"uri": uri, "run_id": run_id}, indent=1).encode())
    return run_id


def log_results(
    run_dir: Path, config: TrackingConfig, params: dict, metrics: dict[str, dict[int, float]], files: list[Path]
) -> str:
    """Add results {name: {step: value}} and files to the MLflow run of a run folder; returns "uri, run id".

    Raises ValueError naming the store when MLflow does not take them.
    """
    fail_fast()
    from mlflow import MlflowClient

    uri = tracking_uri(run_dir, config)
    try:
        client = MlflowClient(uri)
        run_id = open_run(client, run_dir, uri, config, params)
        for name, values in metrics.items():
            for step, value in values.items():
                client.log_metric(run_id, name, value, step=step)
        for path in files:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id)
    except Exception as error:
        raise ValueError(f"MLflow at {uri} did not take the results ({' '.join(str(error).split())[:300]})") from error
    return f"{uri}, run {run_id}"


@functools.cache
def git_commit() -> str:
    """Commit of the source tree, with `+changes` when it is not clean; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> str:
    """Python, platform, commit and the version of every installed package, as text."""
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}, key=str.lower)
    head = [f"python {platform.python_version()}", platform.platform(), f"commit {git_commit()}"]
    return "\n".join([*head, *packages]) + "\n"
