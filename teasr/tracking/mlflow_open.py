"""Open the MLflow run of a run folder: what it is called, its description, tags, parameters and data sets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teasr.config.settings import TrackingConfig
from teasr.config.strict_yaml import flatten
from teasr.tracking.description import description
from teasr.tracking.environment import git_commit
from teasr.tracking.mlflow_store import connect, tracking_uri
from teasr.tracking.run_files import RUN_FILE
from teasr.util.files import write_atomic
from teasr.util.optional import check_installed

TAGS = {"method": "method.name", "backbone": "backbone.name", "scale": "scale", "commit": "commit"}  # tag -> parameter


@dataclass(frozen=True)
class Place:
    """An MLflow run: the URI of its store, its experiment and its id."""

    uri: str
    experiment_id: str
    run_id: str

    def __str__(self) -> str:
        return f"{self.uri}, run {self.run_id}"

    @property
    def command(self) -> str:
        """What to type to see a store that has no server; empty for a server."""
        return "" if self.uri.startswith("http") else f"mlflow ui --backend-store-uri {self.uri}"

    @property
    def link(self) -> str:
        """Web address of the run's page: at its server, or where `command` serves it."""
        server = self.uri.rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{server}/#/experiments/{self.experiment_id}/runs/{self.run_id}"


@contextlib.contextmanager
def opened(run_dir: Path, config: TrackingConfig, params: dict, what: str) -> Iterator[tuple[Any, Place]]:
    """Yield (client, place) of the MLflow run that belongs to a run folder, to store `what` in it.

    Raises ValueError naming the store when this fails.
    """
    check_installed("mlflow", f"storing the {what}")
    uri = tracking_uri(run_dir, config)
    try:
        client = connect(uri)
        run_id = open_run(client, run_dir, uri, config, params)
        yield client, Place(uri, client.get_run(run_id).info.experiment_id, run_id)
    except Exception as error:
        raise ValueError(f"MLflow at {uri} did not accept the {what} ({' '.join(str(error).split())[:300]})") from error


def open_run(client, run_dir: Path, uri: str, config: TrackingConfig, params: dict, resumed_from: int = 0) -> str:
    """Open the MLflow run of a run folder and return its id.

    The run is reopened if its id is on file and known to the store; otherwise, it is created.
    """
    from mlflow.entities import Param

    run_file = run_dir / RUN_FILE
    known = json.loads(run_file.read_text()) if run_file.is_file() else {}
    run_id, logged = known.get(uri), {}
    if run_id is not None:
        logged = _params_of(client, run_id)
        run_id = None if logged is None else run_id
    if run_id is None:
        run_id, logged = _create_run(client, run_dir, uri, config, params), {}
        write_atomic(run_file, json.dumps(known | {uri: run_id}, indent=1).encode())
    else:
        client.update_run(run_id, status="RUNNING")
        if resumed_from:
            client.set_tag(run_id, "resumed_from_update", resumed_from)
    flat = [Param(key, str(value)[:6000]) for key, value in flatten(params).items() if key not in logged]
    for i in range(0, len(flat), 100):
        client.log_batch(run_id, params=flat[i : i + 100])
    return run_id


def _params_of(client, run_id: str) -> dict | None:
    """Return the parameters of a run, or None when the store does not know it (because it was cleared)."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).data.params
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _create_run(client, run_dir: Path, uri: str, config: TrackingConfig, params: dict) -> str:
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
    flat = flatten(params)
    tags = {"mlflow.source.git.commit": git_commit(), "mlflow.source.name": "teasr", "mlflow.source.type": "LOCAL"}
    tags |= {"run_dir": str(run_dir), "mlflow.note.content": description(run_dir, flat)}
    tags |= {tag: str(flat[name]) for tag, name in TAGS.items() if name in flat}
    return client.create_run(experiment_id, run_name=config.run_name or run_dir.name, tags=tags).info.run_id


def log_datasets(client, run_id: str, datasets: Iterable[dict]) -> None:
    """Log the data sets that a run used, each as {name, digest, source, context, profile}; known ones are kept."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for found in datasets:
        scheme, _, address = found["source"].partition("://")
        kind = {"https": "http"}.get(scheme, scheme) if address else "local"
        source = json.dumps({"uri": found["source"], "url": found["source"]})
        data = Dataset(found["name"], found["digest"], kind, source, profile=json.dumps(found["profile"]))
        inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", found["context"])]))
    if inputs:
        client.log_inputs(run_id, datasets=inputs)
