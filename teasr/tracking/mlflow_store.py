"""Which MLflow store a run belongs to, and the connection to it."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from teasr.config.settings import TrackingConfig
from teasr.util.optional import needed_for

SQLITE = "sqlite:///"


def tracking_uri(run_dir: Path, config: TrackingConfig) -> str:
    """Return the config's URI, else MLFLOW_TRACKING_URI, else a SQLite file next to the run folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{run_dir.resolve().parent}/mlflow.db"


def connect(uri: str) -> Any:
    """Return an MLflow client of a store; a new SQLite file is created. MLflow's exceptions are passed on."""
    fail_fast()
    with needed_for("tracking with MLflow"):
        from mlflow import MlflowClient

    path = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and not path.exists():
        _create(path)
    return MlflowClient(uri)


def fail_fast() -> None:
    """Make MLflow give up on an unreachable server quickly, and leave the reports of problems to the caller.

    By default it blocks every call for minutes, and prints a traceback for every error of a database.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _create(path: Path) -> None:
    """Create an SQLite store that appears at `path` only when it is complete.

    MLflow cannot continue with one whose creation was interrupted, by a full disk or a killed process.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        new = Path(folder) / path.name
        SqlAlchemyStore(f"{SQLITE}{new}", "./mlruns").engine.dispose()
        with contextlib.suppress(FileExistsError):  # another run has created the store meanwhile
            _publish(new, path)


def _publish(new: Path, path: Path) -> None:
    """Move a file to a path at which nothing exists. Raises FileExistsError otherwise."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links
        os.rename(new, path)
