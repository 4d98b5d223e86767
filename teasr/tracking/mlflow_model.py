"""Trained models in MLflow: log an exported folder as a model that `mlflow.pyfunc.load_model` loads, and register it.

`teasr.restore.mlflow_flavor` is what MLflow imports to load it.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

from teasr.config.settings import TrackingConfig
from teasr.config.strict_yaml import flatten
from teasr.tracking.mlflow_open import Place, opened
from teasr.util.files import sha256_of
from teasr.util.optional import needed_for

LOADER = "teasr.restore.mlflow_flavor"
NEEDED = ("torch", "numpy", "pillow", "opencv-python-headless", "safetensors", "PyYAML", "psutil")
DIGEST = "digest"  # tag of a logged model: a hash of its weights and config
LOGGED_PARAMS = ("method.name", "backbone.name", "scale", "train.updates", "commit")
EXAMPLE = "\n".join(
    (
        "import mlflow, numpy as np",
        "",
        'model = mlflow.pyfunc.load_model("{uri}")  # teasr must be installed',
        "pictures = np.zeros((1, 64, 64, 3), np.uint8)  # [N, H, W, 3]",
        'restored = model.predict(pictures, params={{"steps": 4, "fidelity": 0.5}})',
        'restored = model.get_raw_model().predict(["photo.jpg"])  # paths: a list of arrays',
    )
)


def log_model(run_dir: Path, config: TrackingConfig, params: dict, folder: Path, tags: dict[str, str]) -> str:
    """Log an exported folder to the MLflow run of a run folder and return its URI, `models:/ID`.

    A model with the same weights that is there already is kept. Raises ValueError naming the store when MLflow does not
    accept it.
    """
    with opened(run_dir, config, params, "model") as (client, place):
        try:
            return f"models:/{_log(client, place, flatten(params), folder, tags)}"
        finally:
            client.set_terminated(place.run_id)


def register_model(
    run_dir: Path, config: TrackingConfig, params: dict, folder: Path, name: str, tags: dict[str, str]
) -> str:
    """Log an exported folder as `log_model` does, and register it as a new version of the model `name`.

    Returns "name, version n, uri". Raises ValueError naming the store when MLflow does not accept it.
    """
    with opened(run_dir, config, params, "model") as (client, place):
        from mlflow.exceptions import MlflowException

        model_id = _log(client, place, flatten(params), folder, tags)
        client.set_terminated(place.run_id)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # not models:/ID, which MLflow would look up in the store of this process instead of the client's
        source = client.get_logged_model(model_id).artifact_location
        version = client.create_model_version(name, source, place.run_id, tags=tags, model_id=model_id).version
    return f"{name}, version {version}, {place.uri}"


def _log(client, place: Place, params: dict, folder: Path, tags: dict[str, str]) -> str:
    """Log the folder unless the run has a model with the same weights; return the id of the model."""
    with needed_for("storing a model in MLflow"):
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    digest = _digest(folder)
    outputs = client.get_run(place.run_id).outputs
    for output in outputs.model_outputs if outputs else []:
        known = client.get_logged_model(output.model_id)
        if known.tags.get(DIGEST) == digest and known.status == LoggedModelStatus.READY:
            return output.model_id
    name = re.sub(r"[^\w-]+", "-", client.get_run(place.run_id).info.run_name)  # MLflow refuses dots and slashes
    model = client.create_logged_model(
        place.experiment_id, name=name, source_run_id=place.run_id,
        tags=tags | {DIGEST: digest}, params={name: str(params[name]) for name in LOGGED_PARAMS if name in params},
        model_type="image-to-image",
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as place_of_copy:
            path = Path(place_of_copy) / "model"
            _save(path, folder, model, place.run_id)
            client.log_model_artifacts(model.model_id, str(path))
        client.log_outputs(place.run_id, [LoggedModelOutput(model.model_id, step=int(tags.get("updates", 0)))])
    except Exception:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_id


def _save(path: Path, folder: Path, model, run_id: str) -> None:
    """Write the folder in MLflow's layout: its files, its signature, and how to load it."""
    from mlflow import pyfunc
    from mlflow.models import Model

    uri = f"models:/{model.model_id}"
    about = Model(
        artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an example of the input would be run through the network
        pyfunc.save_model(
            str(path),
            loader_module=LOADER,
            data_path=str(folder),
            mlflow_model=about,
            signature=_signature(),
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in NEEDED],
            metadata={"example": EXAMPLE.format(uri=uri)},
        )


def _signature():
    """Pictures [N, H, W, 3] in and out, and what can be set for each call."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    pictures = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3))])
    params = [ParamSpec("steps", "long", 1), ParamSpec("fidelity", "double", 0.0), ParamSpec("seed", "long", 0)]
    params += [ParamSpec("strength", "double", None)]  # None: the model's own
    return ModelSignature(pictures, pictures, ParamSchema(params))


def _digest(folder: Path) -> str:
    """Hash of the weights and the config in an exported folder; its card names the folder and is left out."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".yaml")):
        digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()[:12]
