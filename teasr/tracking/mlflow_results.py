"""Results in MLflow: log the scores of an evaluation to a run, and download those of other runs."""

from __future__ import annotations

import csv
from pathlib import Path

from teasr.config.settings import TrackingConfig
from teasr.tracking.mlflow_open import Place, log_datasets, opened
from teasr.tracking.mlflow_store import connect
from teasr.util.optional import needed_for


def log_results(
    run_dir: Path,
    config: TrackingConfig,
    params: dict,
    metrics: dict[str, dict[int, float]],
    files: list[Path],
    folder: str | None = None,
    dataset: dict | None = None,
) -> Place:
    """Log metrics and files to the MLflow run of a run folder; returns where they are.

    `metrics` is {name: {step: value}}; `files` go to `folder` of the artifacts. CSV files are also logged as tables,
    which MLflow can show and compare. `dataset`: what was scored, as {name, digest, source, context, profile}.

    Raises ValueError naming the store when MLflow does not accept them.
    """
    with opened(run_dir, config, params, "results") as (client, place):
        run_id = place.run_id
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
        log_datasets(client, run_id, [dataset] if dataset else [])
        client.set_terminated(run_id)
    return place


def download_results(uri: str, experiment: str | None, place: Path) -> list[tuple[str, Path, Place]]:
    """Download what `log_results` stored under `eval/` in the runs of an experiment.

    Returns (run name, folder, run) of each, newest run first. Raises ValueError when there are none.
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
                    origin = Place(uri, found.experiment_id, run.info.run_id)
                    results.append((run.info.run_name, Path(folder), origin))
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not results:
        raise ValueError(f"experiment {experiment} in MLflow at {uri} has no results: run `teasr benchmark` first")
    return results
