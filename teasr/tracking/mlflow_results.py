"""Results and models in MLflow: log scores to a run, register exported models, download the results of other runs."""

from __future__ import annotations

import contextlib
import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teasr.config.settings import TrackingConfig
from teasr.tracking.mlflow_run import open_run
from teasr.tracking.mlflow_store import connect, tracking_uri
from teasr.util.files import sha256_of
from teasr.util.optional import check_installed, needed_for


@contextlib.contextmanager
def _store(run_dir: Path, config: TrackingConfig, params: dict, what: str) -> Iterator[tuple[Any, str, str]]:
    """Yield (client, uri, run id) of the MLflow run that belongs to a run folder, to store `what` in it.

    Raises ValueError naming the store when this fails.
    """
    check_installed("mlflow", f"storing the {what}")
    uri = tracking_uri(run_dir, config)
    try:
        client = connect(uri)
        yield client, uri, open_run(client, run_dir, uri, config, params)
    except Exception as error:
        raise ValueError(f"MLflow at {uri} did not accept the {what} ({' '.join(str(error).split())[:300]})") from error


def log_results(
    run_dir: Path,
    config: TrackingConfig,
    params: dict,
    metrics: dict[str, dict[int, float]],
    files: list[Path],
    folder: str | None = None,
) -> str:
    """Log metrics and files to the MLflow run of a run folder; returns "uri, run id".

    `metrics` is {name: {step: value}}; `files` go to `folder` of the artifacts. CSV files are also logged as tables,
    which MLflow can show and compare.

    Raises ValueError naming the store when MLflow does not accept them.
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
    """Log an exported folder to the MLflow run of a run folder and register it as a new version of the model `name`.

    Returns "name, version n, uri". Raises ValueError naming the store when MLflow does not accept it.
    """
    with _store(run_dir, config, params, "model") as (client, uri, run_id):
        from mlflow.exceptions import MlflowException

        place = f"model/{_digest(folder)}"  # so that versions do not overwrite each other
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
    """Hash of the file names and contents in a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()[:12]


def download_results(uri: str, experiment: str | None, place: Path) -> list[tuple[str, Path]]:
    """Download what `log_results` stored under `eval/` in the runs of an experiment.

    Returns (run name, folder) pairs, newest run first. Raises ValueError when there are none.
    """
    with needed_for("reading results from MLflow"):
        from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment) if experiment else None
        if found is None:
            names = ", ".join(e.name for e in client.search_experiments())
            raise ValueError(f"MLflow at {uri} has no experiment {experiment}: choose one of {names}")
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
        raise ValueError(f"experiment {experiment} in MLflow at {uri} has no results: run `teasr benchmark` first")
    return results
