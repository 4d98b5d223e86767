"""Models in MLflow: logged once, loaded by mlflow.pyfunc as a user would, registered; failures cost a warning."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teasr import Upscaler, cli
from teasr.commands import sync_mlflow
from teasr.config.settings import TrackingConfig


@pytest.fixture(scope="module")
def stored(untrained, tmp_path_factory):
    """A finished run, its tracking settings and the client of its store, in which its model is."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("stored")
    run = shutil.copytree(untrained, root / "run")
    tracking = TrackingConfig(uri=f"sqlite:///{root}/mlflow.db", experiment="models")
    told = sync_mlflow.log_model(run, tracking)
    return run, tracking, MlflowClient(tracking.uri), told.rpartition(" ")[2]


def run_of(client):
    (run,) = client.search_runs([client.get_experiment_by_name("models").experiment_id])
    return run


def test_the_model_is_loaded_and_restores_as_the_run_itself(stored, tmp_path, monkeypatch):
    import mlflow

    run, tracking, _, uri = stored
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    model = mlflow.pyfunc.load_model(uri)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
    restored = model.predict(pictures, params={"steps": 2, "fidelity": 0.5})
    upscaler = Upscaler.from_pretrained(run)
    assert restored.shape == (2, 80, 96, 3) and restored.dtype == np.uint8
    assert np.array_equal(restored[1], upscaler(pictures[1], steps=2, fidelity=0.5))
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    by_path = model.get_raw_model().predict([str(tmp_path / "0.png"), tmp_path / "1.png"])
    assert np.array_equal(by_path, model.predict(pictures))
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, -1, -1, 3)
    assert [p.name for p in model.metadata.signature.params.params] == ["steps", "fidelity", "seed", "strength"]
    with pytest.raises(ValueError, match="this model has no setting strength: its settings are fidelity"):
        model.predict(pictures, params={"strength": 0.5})
    with pytest.raises(Exception, match="uint8"):
        model.predict(pictures.astype(np.float32))
    with pytest.raises(ValueError, match=r"expected pictures \[N, H, W, 3\] in uint8"):
        model.get_raw_model().predict(pictures[0])


def test_the_same_weights_are_stored_once_and_registered_as_versions(stored, tmp_path, monkeypatch):
    import mlflow

    run, tracking, client, uri = stored
    assert sync_mlflow.log_model(run, tracking).endswith(uri)
    folder = next((run / "checkpoints").glob("step-*"))
    from argparse import Namespace

    from teasr import run_config
    from teasr.commands import export
    from teasr.tracking.mlflow_model import register_model

    out = tmp_path / "exported"
    export.export(Namespace(weights="ema", dtype="fp32", out=out), folder)
    params = run_config.load(folder / "config.yaml").to_dict()
    for version in (1, 2):
        told = register_model(run, tracking, params, out, "mine", {"updates": "1"})
        assert told == f"mine, version {version}, {tracking.uri}"
    version = client.get_model_version("mine", "2")
    assert version.source == client.get_logged_model(uri.removeprefix("models:/")).artifact_location
    assert version.run_id == run_of(client).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    model = mlflow.pyfunc.load_model("models:/mine/2")
    assert model.predict(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 64, 64, 3)
    outputs = run_of(client).outputs.model_outputs
    assert len(outputs) == 1 and f"models:/{outputs[0].model_id}" == uri
    (model,) = client.search_logged_models([client.get_experiment_by_name("models").experiment_id])
    assert model.status == "READY" and model.name == "run" and model.params["method.name"] == "teasr"


def test_a_large_model_is_not_copied(stored):
    run, tracking, *_ = stored
    told = sync_mlflow.log_model(run, replace(tracking, model_mb=0.001))
    assert "more than tracking.model_mb = 0.001" in told


def test_an_unreachable_store_costs_the_training_a_warning(stored, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sync_mlflow.after_training(stored[0], TrackingConfig(uri="http://127.0.0.1:9"))
    told = capsys.readouterr().out
    assert "the model was not stored in MLflow" in told and f"`teasr sync-mlflow {stored[0]}` stores it" in told
    sync_mlflow.after_training(stored[0], TrackingConfig(mlflow=False))
    assert capsys.readouterr().out == ""


def test_sync_stores_the_model_of_a_finished_run(stored, tmp_path, capsys):
    run = shutil.copytree(stored[0], tmp_path / "run", ignore=shutil.ignore_patterns("mlflow_run.json"))
    (run / "metrics.csv").write_text("update,loss\n1,0.5\n")
    (run / "timing.csv").write_text("update,unix_ms\n1,1000\n")
    (run / "config.yaml").write_text("tracking: {experiment: models}\n")
    uri = f"sqlite:///{tmp_path}/other.db"
    for status, stores in (("KILLED", False), ("FINISHED", True)):
        Path(run / "status").write_text(f"{status}\n")
        assert cli.main(["sync-mlflow", str(run), "--uri", uri]) == 0
        assert ("model in MLflow: models:/" in capsys.readouterr().out) == stores
