"""Metrics of a run: CSV files always, and an MLflow run that mirrors the run folder from a thread of its own.

The files are the truth and the queue at once: the mirror asks the store what it has and sends the rest. A store that is slow, away or restarted
therefore costs the training nothing and loses nothing; what is missing at the end `teasr sync-mlflow RUN` sends.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from teasr.config import flatten
from teasr.files import sha256_of, write_atomic
from teasr.settings import TrackingConfig

METRICS, TIMING = "metrics.csv", "timing.csv"  # functions of the run alone; what differs between equal runs
RUN_FILE = "mlflow_run.json"  # {URI of a store: id of the run there}
PARAMS_FILE = "parameters.json"
STATUS_FILE = "status"  # RUNNING, FINISHED, FAILED or KILLED, as MLflow has them
SKIPPED_FILE = "skipped_updates.txt"  # updates that were not finite, and where
BAD_FILE = "bad_samples.txt"  # what the reader had to pass over, one a line
FILES = ("config.yaml", "environment.txt", BAD_FILE, SKIPPED_FILE)  # of the run folder, as artifacts
PREVIEWS, PREVIEW = "previews", "update-{:08d}.png"

SEND_EVERY_S, RETRY_S = 2.0, 5.0
BATCH = 1000  # metrics that MLflow takes at once


class CsvLog:
    """Rows of numbers by update, appended and flushed; a new column rewrites the file, a resume drops later rows.

    While the file cannot be written (a full disk) rows are kept in memory and come with the next one that can.
    """

    def __init__(self, path: Path, resume_from: int = 0):
        """Keep the rows up to update `resume_from`; none where the run starts afresh."""
        self.path = path
        rows = list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() and resume_from else []
        rows = [row for row in rows if row["update"] and int(row["update"]) <= resume_from]
        self.columns = list(rows[0]) if rows else ["update"]
        self._rewrite(rows)
        self._waiting: list[dict] = []

    def _rewrite(self, rows: list[dict]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue().encode())

    def append(self, update: int, values: dict[str, float]) -> None:
        """Add one row; whole numbers whole, others with 9 significant digits."""
        self._waiting.append({"update": update} | {k: v if type(v) is int else f"{v:.9g}" for k, v in values.items()})
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                print(f"warning: {self.path} cannot be written ({error.strerror}): rows wait until it can", flush=True)
            return
        self._waiting = []

    def _write(self) -> None:
        new = dict.fromkeys(name for row in self._waiting for name in row if name not in self.columns)
        if new:
            rows = list(csv.DictReader(io.StringIO(self.path.read_text())))
            columns, self.columns = self.columns, [*self.columns, *new]
            try:
                self._rewrite(rows)
            except OSError:
                self.columns = columns
                raise
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(self._waiting)
        size = self.path.stat().st_size
        try:
            with open(self.path, "a") as file:
                file.write(text.getvalue())
        except OSError:
            os.truncate(self.path, size)  # no half rows
            raise


class Tail:
    """The rows that were added to a CSV file since the last look; all of them again when it got another column."""

    def __init__(self, path: Path):
        self.path, self.header, self.offset = path, b"", 0

    def rows(self) -> list[dict[str, str]]:
        """New complete rows. OSError when there is no such file."""
        with open(self.path, "rb") as file:
            header = file.readline()
            if header != self.header:
                self.header, self.offset = header, file.tell()
            file.seek(self.offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        columns = self.header.decode().strip().split(",")
        return [dict(zip(columns, line.split(","), strict=True)) for line in text.decode().splitlines()]


class Tracker:
    """Where a run's numbers and pictures go. Only rank 0 makes one."""

    def __init__(self, run_dir: Path, config: TrackingConfig, params: dict, resume_from: int = 0):
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics = CsvLog(run_dir / METRICS, resume_from)
        self.timing = CsvLog(run_dir / TIMING, resume_from)
        write_atomic(run_dir / "environment.txt", environment().encode())
        write_atomic(run_dir / PARAMS_FILE, json.dumps(flatten(params), indent=1, default=str).encode())
        self._status("RUNNING")
        self.sender = Sender(Mirror(run_dir, config, resume_from)) if config.mlflow else None

    def log(self, update: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """One update: `metrics` are functions of the run alone, `timing` differs between equal runs."""
        self.metrics.append(update, metrics)
        self.timing.append(update, timing | {"unix_ms": int(1000 * time.time())})

    def close(self, status: str) -> None:
        """Flush; `status` as MLflow names it: FINISHED, FAILED or KILLED."""
        self._status(status)
        if self.sender:
            self.sender.close(status)

    def preview(self, update: int, png: bytes) -> None:
        """Keep the sheet of an update."""
        self._write(self.run_dir / PREVIEWS / PREVIEW.format(update), png)

    def _status(self, status: str) -> None:
        self._write(self.run_dir / STATUS_FILE, f"{status}\n".encode())

    def _write(self, path: Path, data: bytes) -> None:
        """Nothing that stops a run: a full disk is the checkpoints' affair."""
        try:
            write_atomic(path, data)
        except OSError as error:
            print(f"warning: {path} cannot be written ({error.strerror})", flush=True)


class Sender(threading.Thread):
    """Keeps the MLflow run of a training up to date; whatever MLflow does must not reach the training."""

    def __init__(self, mirror: Mirror):
        super().__init__(daemon=True, name="mlflow")
        self.mirror, self.away, self.complete = mirror, False, False
        self._ending, self._status = threading.Event(), "RUNNING"
        self.start()

    def run(self) -> None:
        """Send, wait, send; after a failure from what the store says that it has."""
        pause = 0.0
        while True:
            ending = self._ending.wait(pause)
            pause = SEND_EVERY_S
            try:
                sent = self.mirror.send()
                if self.away:
                    self.away = False
                    print(f"MLflow at {self.mirror.uri} is back, {sent} updates were sent", flush=True)
                if ending:
                    self.mirror.finish(self._status)
                    self.complete = True
            except Exception as error:
                self.mirror.forget()
                pause = RETRY_S
                if not self.away:
                    self.away = True
                    reason = " ".join(str(error).split())[:300]
                    print(
                        f"MLflow at {self.mirror.uri} failed ({reason}): going on without it, metrics.csv has everything; what it "
                        "misses is sent when it is back",
                        flush=True,
                    )
            if ending:
                return

    def close(self, status: str, timeout_s: float = 60.0) -> None:
        """Send what is left and set the status, for at most `timeout_s`; say what to do when that did not work."""
        self._status = status
        self._ending.set()
        self.join(timeout_s)
        if not self.complete:
            print(
                f"MLflow at {self.mirror.uri} lacks the end of this run: when it is back, `teasr sync-mlflow {self.mirror.run_dir}` "
                "sends it",
                flush=True,
            )


class Mirror:
    """The MLflow run of a run folder. It needs nothing but the folder: what the store has already, the store itself says."""

    def __init__(self, run_dir: Path, config: TrackingConfig, resumed_from: int = 0):
        fail_fast()
        self.run_dir, self.config, self.resumed_from = run_dir, config, resumed_from
        self.uri = tracking_uri(run_dir, config)
        self.run_id: str | None = None
        self.forget()

    def forget(self) -> None:
        """Ask the store again at the next `send`."""
        self.client, self.sent, self._files, self._previews = None, -1, {}, set()
        self._metrics, self._timing = (Tail(self.run_dir / name) for name in (METRICS, TIMING))
        self._waiting: dict[int, dict[str, str]] = {}  # rows of metrics.csv whose timing is not written yet

    def send(self) -> int:
        """Bring the store up to date; returns the updates sent. Raises whatever MLflow raises: `forget`, and try again."""
        from mlflow.entities import Metric

        if self.client is None:
            self._connect()
        rows = self._new_rows()
        batch: list = []
        for update, at, values in [*rows, (None, 0, {})]:
            if batch and (update is None or len(batch) + len(values) > BATCH):
                self.client.log_batch(self.run_id, metrics=batch)
                self.sent, batch = batch[-1].step, []
            batch += [Metric(key, value, at, update) for key, value in values.items()]
        self._send_files()
        return len(rows)

    def finish(self, status: str) -> None:
        """Set the run's status, as MLflow names it."""
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status)

    def _connect(self) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        path = self.run_dir / PARAMS_FILE
        params = json.loads(path.read_text()) if path.is_file() else {}
        self.run_id = open_run(client, self.run_dir, self.uri, self.config, params, self.resumed_from)
        # rows go in order and whole, so the newest tells
        self.sent = max((m.step for m in client.get_metric_history(self.run_id, "update_s")), default=-1)
        self._previews = {_step(f.path) for f in client.list_artifacts(self.run_id, "images")}
        self.client = client

    def _new_rows(self) -> list[tuple[int, int, dict[str, float]]]:
        """(update, milliseconds, values) of what both files hold and the store does not."""
        timings = self._timing.rows()  # first: each of them is in the other file already
        self._waiting |= {int(row["update"]): row for row in self._metrics.rows()}
        rows = []
        for timing in timings:
            update = int(timing["update"])
            row = self._waiting.get(update)
            if row is not None and update > self.sent:
                at = int(timing["unix_ms"])
                both = {k: float(v) for k, v in (row | timing).items() if v and k not in ("update", "unix_ms")}
                rows.append((update, at, both))
        newest = int(timings[-1]["update"]) if timings else self.sent
        self._waiting = {update: row for update, row in self._waiting.items() if update > newest}
        return rows

    def _send_files(self) -> None:
        """Files that have changed, and previews that the store lacks."""
        for name in FILES:
            path = self.run_dir / name
            state = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
            if state != self._files.get(name):
                self.client.log_artifact(self.run_id, str(path))
                self._files[name] = state
        for path in sorted((self.run_dir / PREVIEWS).glob("update-*.png")):
            update = int(path.stem.removeprefix("update-"))
            if update not in self._previews:
                self._send_preview(path, update)
                self._previews.add(update)

    def _send_preview(self, path: Path, update: int) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            self.client.log_image(self.run_id, picture, key="preview", step=update, synchronous=True)


def _step(artifact: str) -> int | None:
    """The update of what `log_image` wrote: images/preview+step+100+timestamp+.."""
    found = re.search(r"\+step\+(\d+)\+", artifact)
    return int(found[1]) if found else None


def sync(run_dir: Path, config: TrackingConfig) -> tuple[str, int]:
    """Send what MLflow lacks of a run folder; returns "uri, run id" and the number of updates sent.

    Raises ValueError naming the store when it does not take them.
    """
    mirror = Mirror(run_dir, config)
    try:
        sent = mirror.send()
        status = run_dir / STATUS_FILE
        mirror.finish(status.read_text().strip() if status.is_file() else "KILLED")
    except Exception as error:
        raise ValueError(
            f"MLflow at {mirror.uri} did not take the run ({' '.join(str(error).split())[:300]})"
        ) from error
    return f"{mirror.uri}, run {mirror.run_id}", sent


def fail_fast() -> None:
    """Make MLflow give up on a dead server at once; left alone it blocks every call for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def tracking_uri(run_dir: Path, config: TrackingConfig) -> str:
    """The config's URI, else MLFLOW_TRACKING_URI, else a sqlite file beside the run folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve().parent}/mlflow.db"


def open_run(client, run_dir: Path, uri: str, config: TrackingConfig, params: dict, resumed_from: int = 0) -> str:
    """The MLflow run of a run folder: reopened if its id is on file and known to the store, else created."""
    from mlflow.entities import Param

    note = run_dir / RUN_FILE
    known = json.loads(note.read_text()) if note.is_file() else {}
    run_id, has = known.get(uri), {}
    if run_id is not None:
        has = _params_of(client, run_id)
        run_id = None if has is None else run_id
    if run_id is None:
        run_id, has = _create_run(client, run_dir, uri, config), {}
        write_atomic(note, json.dumps(known | {uri: run_id}, indent=1).encode())
    else:
        client.update_run(run_id, status="RUNNING")
        if resumed_from:
            client.set_tag(run_id, "resumed_from_update", resumed_from)
    flat = [Param(key, str(value)[:6000]) for key, value in flatten(params).items() if key not in has]
    for i in range(0, len(flat), 100):
        client.log_batch(run_id, params=flat[i : i + 100])
    return run_id


def _params_of(client, run_id: str) -> dict | None:
    """Parameters of a run, None when the store does not know it (it was cleared)."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).data.params
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _create_run(client, run_dir: Path, uri: str, config: TrackingConfig) -> str:
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
    return client.create_run(experiment_id, run_name=config.run_name or run_dir.name, tags=tags).info.run_id


@contextlib.contextmanager
def _store(run_dir: Path, config: TrackingConfig, params: dict, what: str) -> Iterator[tuple[Any, str, str]]:
    """(client, uri, run id) of the run of a run folder, to put `what` into; ValueError naming the store when it does not take that."""
    fail_fast()
    from mlflow import MlflowClient

    uri = tracking_uri(run_dir, config)
    try:
        client = MlflowClient(uri)
        yield client, uri, open_run(client, run_dir, uri, config, params)
    except Exception as error:
        raise ValueError(f"MLflow at {uri} did not take the {what} ({' '.join(str(error).split())[:300]})") from error


def log_results(
    run_dir: Path,
    config: TrackingConfig,
    params: dict,
    metrics: dict[str, dict[int, float]],
    files: list[Path],
    folder: str | None = None,
) -> str:
    """Add results {name: {step: value}} and files (into `folder` of the artifacts) to the MLflow run of a run folder; returns "uri, run id".

    CSV files become tables that MLflow shows and compares, too.

    Raises ValueError naming the store when MLflow does not take them.
    """
    with _store(run_dir, config, params, "results") as (client, uri, run_id):
        for name, values in metrics.items():
            for step, value in values.items():
                client.log_metric(run_id, name, value, step=step)
        for path in files:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), f"{folder or ''}/{path.name}".strip("/"))
                continue
            client.log_artifact(run_id, str(path), folder)
            if path.suffix == ".csv":
                with open(path, newline="") as text:
                    rows = list(csv.DictReader(text))
                table = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
                client.log_table(run_id, table, f"{folder or 'tables'}/{path.stem}.json")
        client.set_terminated(run_id)
    return f"{uri}, run {run_id}"


def register_model(
    run_dir: Path, config: TrackingConfig, params: dict, folder: Path, name: str, tags: dict[str, str]
) -> str:
    """Log an exported folder to the MLflow run of a run folder and make it a new version of the registered model `name`; returns "name, version n, uri".

    Raises ValueError naming the store when MLflow does not take it.
    """
    with _store(run_dir, config, params, "model") as (client, uri, run_id):
        from mlflow.exceptions import MlflowException

        place = f"model/{_digest(folder)}"  # versions do not overwrite each other
        client.log_artifacts(run_id, str(folder), place)
        client.set_terminated(run_id)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
        version = client.create_model_version(name, source, run_id, tags=tags).version
    return f"{name}, version {version}, {uri}"


def _digest(folder: Path) -> str:
    """Of names and contents."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return whole.hexdigest()[:12]


def download_results(uri: str, experiment: str | None, place: Path) -> list[tuple[str, Path]]:
    """What `log_results` put below `eval/` of the runs of an experiment: (run name, folder), newest run first. ValueError when there is none."""
    fail_fast()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment) if experiment else None
        if found is None:
            names = ", ".join(e.name for e in client.search_experiments())
            raise ValueError(f"MLflow at {uri} has no experiment {experiment}: {names}")
        results = []
        for run in client.search_runs([found.experiment_id]):
            for entry in client.list_artifacts(run.info.run_id, "eval"):
                if entry.is_dir:
                    target = place / run.info.run_id
                    target.mkdir(exist_ok=True)
                    folder = client.download_artifacts(run.info.run_id, entry.path, str(target))
                    results.append((run.info.run_name, Path(folder)))
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not results:
        raise ValueError(f"experiment {experiment} of {uri} holds no results of eval/benchmark.py")
    return results


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
