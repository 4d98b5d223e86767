"""checkpoint.py, files.py and tracking.py: whole or absent, newest good one wins, CSV survives, MLflow cannot stop a run."""

import csv

import pytest

from teasr import checkpoint
from teasr.distributed import World
from teasr.files import write_atomic
from teasr.settings import TrackingConfig
from teasr.tracking import CsvLog, Tracker

ONE = World(0, 1, 0)


def save(root, update, text="x", keep=2):
    with checkpoint.writing(root, update, ONE, keep) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text(text)
    return root / checkpoint.name_of(update)


def test_newest_complete_one_wins_and_old_ones_go(tmp_path, capsys):
    for update in (1, 2, 3):
        save(tmp_path, update)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    (tmp_path / "step-00000003/sub/file").write_text("y")
    assert checkpoint.latest(tmp_path).name == "step-00000002"
    assert "step-00000003 is damaged (sub/file has changed)" in capsys.readouterr().out
    (tmp_path / "step-00000002/sub/file").unlink()
    assert checkpoint.latest(tmp_path) is None


def test_an_interrupted_save_does_not_count(tmp_path):
    good = save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt), checkpoint.writing(tmp_path, 2, ONE, 2) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert checkpoint.latest(tmp_path) == good
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".tmp-*"))


def test_resolve_takes_runs_and_checkpoints(tmp_path):
    folder = save(tmp_path / "checkpoints", 7)
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(folder) == folder
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
        checkpoint.resolve(tmp_path / "nowhere")
    (folder / "sub/file").write_text("?")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.resolve(folder)


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    import os

    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def rows(path):
    return list(csv.DictReader(open(path)))


def test_csv_grows_columns_and_drops_what_a_resume_repeats(tmp_path):
    log = CsvLog(tmp_path / "m.csv")
    log.append(1, {"a": 1.5})
    log.append(2, {"a": 2.0, "b": 1 / 3})
    log.append(3, {"b": 4.0})
    assert [r["a"] for r in rows(log.path)] == ["1.5", "2", ""]
    assert rows(log.path)[1]["b"] == "0.333333333"
    log = CsvLog(tmp_path / "m.csv", resume_from=2)
    log.append(3, {"a": 9.0, "b": 9.0})
    assert [r["update"] for r in rows(log.path)] == ["1", "2", "3"] and rows(log.path)[2]["a"] == "9"


def tracker(run_dir, **changes):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text("a: 1\n")
    return Tracker(run_dir, TrackingConfig(experiment="test", **changes), {"a": {"b": 1}, "commit": "abc"})


def test_mlflow_gets_params_metrics_files_and_the_same_run_again(tmp_path):
    from mlflow import MlflowClient

    for update in (1, 2):
        t = tracker(tmp_path / "runs/one")
        t.log(update, {"loss": 0.5 / update}, {"update_s": 0.1})
        t.close("FINISHED")
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.data.params == {"a.b": "1", "commit": "abc"} and run.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 0.5), (2, 0.25)]
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"config.yaml", "environment.txt"}
    assert "mlflow.source.git.commit" in run.data.tags
    assert (tmp_path / "runs/one/environment.txt").read_text().startswith("python 3")


def test_an_unreachable_mlflow_costs_a_message_and_no_metric(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    t = tracker(tmp_path / "one", uri="http://127.0.0.1:9")
    for update in range(1, 6):
        t.log(update, {"loss": 1.0}, {})
    t.close("FINISHED")
    assert "MLflow at http://127.0.0.1:9 failed" in capsys.readouterr().out
    assert len(rows(tmp_path / "one/metrics.csv")) == 5
