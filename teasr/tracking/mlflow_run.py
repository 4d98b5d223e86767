"""The MLflow run of a run folder: which store and run it is, and how it is kept up to date during training.

The files of the run folder are both the source of truth and the queue: the mirror asks the store what it already has
and sends the rest. A slow, unreachable or restarted store therefore neither slows down training nor loses data; `teasr
sync-mlflow RUN` sends what is missing at the end.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

from teasr.config.settings import TrackingConfig
from teasr.tracking.csv_log import Tail
from teasr.tracking.metric_names import mlflow_name
from teasr.tracking.mlflow_open import log_datasets, open_run
from teasr.tracking.mlflow_store import connect, tracking_uri
from teasr.tracking.run_files import DATASETS_FILE, FILES, METRICS, PARAMS_FILE, PREVIEWS, STATUS_FILE, TIMING
from teasr.util.files import read_json
from teasr.util.optional import check_installed

SEND_EVERY_S, RETRY_S = 2.0, 5.0
BATCH = 1000  # metrics that MLflow accepts in one call


class Sender(threading.Thread):
    """Thread that keeps the MLflow run of a training up to date; MLflow errors must never reach the training."""

    def __init__(self, mirror: Mirror):
        super().__init__(daemon=True, name="mlflow")
        self.mirror, self.away, self.complete = mirror, False, False
        self._ending, self._status = threading.Event(), "RUNNING"
        self.start()

    def run(self) -> None:
        """Send and wait in a loop; after a failure, continue from what the store reports to have."""
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
                        f"MLflow at {self.mirror.uri} failed ({reason}): training continues without it; "
                        "metrics.csv is complete, and the missing values are sent when MLflow is back",
                        flush=True,
                    )
            if ending:
                return

    def close(self, status: str, timeout_s: float = 60.0) -> None:
        """Send the remaining data and set the status within `timeout_s`; if that fails, print what to do."""
        self._status = status
        self._ending.set()
        self.join(timeout_s)
        if not self.complete:
            print(
                f"MLflow at {self.mirror.uri} lacks the end of this run: when it is back, "
                f"run `teasr sync-mlflow {self.mirror.run_dir}`",
                flush=True,
            )


class Mirror:
    """Mirrors a run folder to its MLflow run; it needs only the folder, since the store reports what it already has."""

    def __init__(self, run_dir: Path, config: TrackingConfig, resumed_from: int = 0):
        check_installed("mlflow", "tracking.mlflow=true")
        self.run_dir, self.config, self.resumed_from = run_dir, config, resumed_from
        self.uri = tracking_uri(run_dir, config)
        self.run_id: str | None = None
        self.forget()

    def forget(self) -> None:
        """Discard all cached state, so that the next `send` asks the store again."""
        self.client, self.sent, self._files, self._previews = None, -1, {}, set()
        self._told = False  # whether the data sets are there
        self._metrics, self._timing = (Tail(self.run_dir / name) for name in (METRICS, TIMING))
        self._waiting: dict[int, dict[str, str]] = {}  # rows of metrics.csv whose timing is not written yet

    def send(self) -> int:
        """Bring the store up to date and return the number of updates sent.

        MLflow's exceptions are passed on; call `forget` before trying again.
        """
        from mlflow.entities import Metric

        if self.client is None:
            self._connect()
        rows = self._new_rows()
        batch: list = []
        for update, at, values in [*rows, (None, 0, {})]:
            if batch and (update is None or len(batch) + len(values) > BATCH):
                self.client.log_batch(self.run_id, metrics=batch)
                self.sent, batch = batch[-1].step, []
            batch += [Metric(mlflow_name(key), value, at, update) for key, value in values.items()]
        self._send_files()
        self._send_datasets()
        return len(rows)

    def finish(self, status: str) -> None:
        """Set the run's status, using MLflow's names."""
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status)

    def _connect(self) -> None:
        client = connect(self.uri)
        params = read_json(self.run_dir / PARAMS_FILE)
        self.run_id = open_run(client, self.run_dir, self.uri, self.config, params, self.resumed_from)
        # updates are sent completely and in order, so the newest one shows what the store has
        self.sent = max((m.step for m in client.get_metric_history(self.run_id, mlflow_name("update_s"))), default=-1)
        self._previews = {_step(f.path) for f in client.list_artifacts(self.run_id, "images")}
        self.client = client

    def _new_rows(self) -> list[tuple[int, int, dict[str, float]]]:
        """Return (update, milliseconds, values) of the updates in both CSV files that the store lacks."""
        timings = self._timing.rows()  # read first: an update is written to metrics.csv before timing.csv
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
        """Send the files that have changed and the previews that the store lacks."""
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

    def _send_datasets(self) -> None:
        """Tell the store which data sets the run reads, once for each connection; those that it has are kept."""
        if not self._told:
            log_datasets(self.client, self.run_id, read_json(self.run_dir / DATASETS_FILE).get("datasets", []))
            self._told = True

    def _send_preview(self, path: Path, update: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self.client.log_image(self.run_id, image, key="preview", step=update, synchronous=True)


def _step(artifact: str) -> int | None:
    """Return the update in an artifact path written by `log_image`: images/preview+step+100+timestamp+.."""
    found = re.search(r"\+step\+(\d+)\+", artifact)
    return int(found[1]) if found else None


def sync(run_dir: Path, config: TrackingConfig) -> tuple[str, int]:
    """Send what MLflow lacks of a run folder; returns "uri, run id" and the number of updates sent.

    Raises ValueError naming the store when it does not accept them.
    """
    mirror = Mirror(run_dir, config)
    try:
        sent = mirror.send()
        status = run_dir / STATUS_FILE
        mirror.finish(status.read_text().strip() if status.is_file() else "KILLED")
    except Exception as error:
        raise ValueError(
            f"MLflow at {mirror.uri} did not accept the run ({' '.join(str(error).split())[:300]})"
        ) from error
    return f"{mirror.uri}, run {mirror.run_id}", sent
