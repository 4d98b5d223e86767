"""tracking.py: the CSV files survive, MLflow cannot stop a run, and it eventually receives everything."""

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import small_recipe
from test_resume import begin, updates, wait_for

from teasr import cli
from teasr.config.settings import TrackingConfig
from teasr.tracking.csv_log import CsvLog, Tail, read_rows
from teasr.tracking.history import keep_history
from teasr.tracking.metric_names import GROUPS, LEGEND, NAMES, mlflow_name
from teasr.tracking.mlflow_run import Mirror
from teasr.tracking.mlflow_store import connect
from teasr.tracking.tracker import Tracker
from teasr.util.distributed import free_port
from teasr.util.files import write_atomic


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


def test_a_fresh_start_keeps_no_row_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    """Regression test: the row of the preview before the first update appeared once for every start."""
    for _ in range(2):
        log = CsvLog(tmp_path / "m.csv", resume_from=0)
        log.append(0, {"a": 1.0})
    assert [r["update"] for r in rows(log.path)] == ["0"]


def test_rows_wait_while_the_file_cannot_be_written(tmp_path, capsys):
    log = CsvLog(tmp_path / "m.csv")
    log.append(1, {"a": 1.0})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 1, old[1]))
    try:
        log.append(2, {"a": 2.0})
        log.append(3, {"b": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [r["update"] for r in rows(log.path)] == ["1"]
    assert capsys.readouterr().out.count("cannot be written") == 1
    log.append(4, {"a": 4.0})
    assert [(r["update"], r["a"], r["b"]) for r in rows(log.path)] == [
        ("1", "1", ""), ("2", "2", ""), ("3", "", "3"), ("4", "4", ""),
    ]  # fmt: skip


def test_a_log_with_half_a_line_is_read_up_to_it_and_a_damaged_one_is_named(tmp_path):
    log = CsvLog(tmp_path / "m.csv")
    for update in (1, 2):
        log.append(update, {"a": 1.0})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b"1")  # the begin of "10,.." when the power failed
    assert [r["update"] for r in read_rows(log.path)] == ["1", "2"]
    for text in (whole + b"three,1\n", whole + b"3\n", whole + b"3,1,5\n", whole + b"\x00\xff,1\n"):
        log.path.write_bytes(text)
        with pytest.raises(ValueError, match=r"m\.csv is damaged \(line 4"):
            CsvLog(log.path, resume_from=2)
        assert log.path.read_bytes() == text


def test_what_an_earlier_start_logged_is_kept_unless_it_comes_again(tmp_path):
    def run(updates: int) -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        log = CsvLog(tmp_path / "run/metrics.csv")
        for update in range(1, updates + 1):
            log.append(update, {"a": 1.0})
        for name in ("mlflow_run.json", "config.yaml", "previews/update-00000001.png"):
            write_atomic(tmp_path / "run" / name, b"{}")
        return tmp_path / "run"

    assert keep_history(run(0), 0, same_config=False, save_every=5) is None
    assert keep_history(run(5), 5, same_config=False, save_every=5) is None
    assert keep_history(run(5), 0, same_config=True, save_every=5) is None  # killed before its first checkpoint
    for resumed_from, same in ((0, True), (0, False), (3, False)):
        folder = keep_history(run(6), resumed_from, same, save_every=5)
        assert folder == tmp_path / "run/earlier-1" and len(rows(folder / "metrics.csv")) == 6
        assert (folder / "previews/update-00000001.png").is_file() and (folder / "mlflow_run.json").is_file()
        assert (tmp_path / "run/metrics.csv").exists() == (resumed_from == 3)
        assert not (tmp_path / "run/mlflow_run.json").exists()
    assert keep_history(tmp_path / "run", 3, same_config=False, save_every=5) == tmp_path / "run/earlier-2"


def test_an_mlflow_store_whose_creation_fails_on_a_full_disk_is_created_later(tmp_path):
    """MLflow itself leaves half a database, with which it cannot continue even when there is space again."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        with pytest.raises(Exception, match="disk"):
            connect(uri)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []
    assert connect(uri).search_experiments()[0].name == "Default"
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]


def tracker(run_dir, **changes):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text("tracking: {experiment: test}\n")
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
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss/total")] == [
        (1, 0.5),
        (2, 0.25),
    ]
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"config.yaml", "environment.txt"}
    assert "mlflow.source.git.commit" in run.data.tags
    assert (tmp_path / "runs/one/environment.txt").read_text().startswith("python 3")


def test_every_metric_has_one_readable_name_in_a_described_group():
    assert len(set(NAMES.values())) == len(NAMES)
    assert {name.partition("/")[0] for name in (*NAMES.values(), *GROUPS.values())} <= LEGEND.keys()
    assert mlflow_name("grad_norm/critic") == "gradient/norm_critic" and mlflow_name("fake") == "method/fake"
    for kept in ("preview/psnr_y_1", "system/cpu_utilization_percentage"):
        assert mlflow_name(kept) == kept


def test_a_run_says_what_it_is_and_what_it_reads_and_a_changed_description_is_kept(tmp_path):
    from mlflow import MlflowClient

    data = {"name": "train", "digest": "abc", "source": str(tmp_path), "context": "training", "profile": {"samples": 3}}
    params = {"method": {"name": "teasr"}, "backbone": {"name": "tiny"}, "scale": 4, "train": {"updates": 7}}
    for update in (1, 2):
        t = Tracker(tmp_path / "runs/one", TrackingConfig(experiment="test"), params, update - 1, [data])
        t.log(update, {"loss": 1.0}, {"update_s": 0.1})
        t.close("FINISHED")
        client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
        if update == 1:
            note = run.data.tags["mlflow.note.content"]
            assert "enlarges pictures 4 times" in note and "| updates | 7 |" in note
            client.set_tag(run.info.run_id, "mlflow.note.content", "my own words")
    assert run.data.tags["mlflow.note.content"] == "my own words"
    assert (run.data.tags["method"], run.data.tags["backbone"], run.data.tags["scale"]) == ("teasr", "tiny", "4")
    (read,) = run.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest, read.tags[0].value) == ("train", "abc", "training")


def test_an_unreachable_mlflow_costs_a_message_and_no_metric(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    t = tracker(tmp_path / "one", uri="http://127.0.0.1:9")
    for update in range(1, 6):
        t.log(update, {"loss": 1.0}, {})
    t.close("FINISHED")
    assert "MLflow at http://127.0.0.1:9 failed" in capsys.readouterr().out
    assert len(rows(tmp_path / "one/metrics.csv")) == 5


def test_a_tail_gives_every_row_once_and_all_again_after_a_new_column(tmp_path):
    log = CsvLog(tmp_path / "m.csv")
    tail = Tail(log.path)
    assert tail.rows() == []
    log.append(1, {"a": 1.0})
    with open(log.path, "a") as file:
        file.write("2,")
    assert [row["update"] for row in tail.rows()] == ["1"]
    with open(log.path, "a") as file:
        file.write("5\n")
    assert tail.rows() == [{"update": "2", "a": "5"}] and tail.rows() == []
    log.append(3, {"a": 1.0, "b": 2.0})
    assert [row["b"] for row in tail.rows()] == ["", "", "2"]


def test_sync_sends_what_was_missed_once(tmp_path, capsys, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    t = tracker(tmp_path / "one", uri="http://127.0.0.1:9")
    for update in range(1, 2100):
        t.log(update, {"loss": 1 / update}, {"update_s": 0.1})
    t.close("KILLED")
    assert f"run `teasr sync-mlflow {tmp_path / 'one'}`" in capsys.readouterr().out
    uri = f"sqlite:///{tmp_path}/other.db"
    assert cli.main(["sync-mlflow", str(tmp_path / "one"), "--uri", uri]) == 0
    assert f"2099 updates uploaded to {uri}" in capsys.readouterr().out
    assert cli.main(["sync-mlflow", str(tmp_path / "one"), "--uri", uri]) == 0
    assert "nothing to upload" in capsys.readouterr().out
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == "KILLED"
    points = client.get_metric_history(run.info.run_id, "loss/total")
    assert [p.step for p in points] == list(range(1, 2100)) and points[1].value == 0.5
    assert (
        0 < points[-1].timestamp - points[0].timestamp < 60_000
    )  # in milliseconds, taken when the value was logged rather than uploaded, and not rounded
    assert len({p.timestamp for p in points}) > 20
    assert cli.main(["sync-mlflow", str(tmp_path / "nothing")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


class Server:
    """A real `mlflow server`."""

    def __init__(self, folder: Path):
        self.port, self.folder = free_port(), folder
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            f"{self.folder}/artifacts",
        ]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        program = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *store,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        self.process = subprocess.Popen(
            program, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 900
        while not self.answers():
            assert time.monotonic() < until and self.process.poll() is None
            time.sleep(0.2)

    def answers(self) -> bool:
        import urllib.request

        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_server_killed_and_restarted_during_training_has_every_point_at_the_end(shards, tmp_path):
    """Training never waits for the server; previews arrive as images, including the one before the first update."""
    from mlflow import MlflowClient

    server = Server(tmp_path)
    server.start()
    data = small_recipe(
        shards, tmp_path / "run", train__updates=100_000, train__save_every_updates=50,
        tracking={"uri": server.uri, "experiment": "restarts"}, preview={"pictures": 2, "steps": [1, 2]},
    )  # fmt: skip
    process = begin(data, tmp_path, 1)
    try:
        run = tmp_path / "run"
        wait_for(process, lambda: updates(run) >= 60)
        server.kill()
        at_kill = updates(run)
        wait_for(process, lambda: updates(run) >= at_kill + 60)
        server.start()
        client = MlflowClient(server.uri)
        reached = updates(run)

        def caught_up() -> bool:
            time.sleep(0.5)
            (found,) = client.search_runs([client.get_experiment_by_name("restarts").experiment_id])
            history = client.get_metric_history(found.info.run_id, "loss/flow")
            return bool(history) and max(point.step for point in history) > reached

        wait_for(process, caught_up)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
        assert process.returncode == 0, out[-3000:]
        assert out.count(" failed (") == 1 and out.count("is back, ") == 1
        (found,) = client.search_runs([client.get_experiment_by_name("restarts").experiment_id])
        assert found.info.status == "KILLED" and "train.batch" in found.data.params
        wanted = {int(row["update"]): row for row in rows(run / "metrics.csv")}
        assert sorted(wanted) == list(range(len(wanted)))  # row 0: the preview before the first update
        for name in ("flow", "grad_norm", "preview/psnr_y_1"):
            points = client.get_metric_history(found.info.run_id, mlflow_name(name))
            assert {p.step: f"{p.value:.9g}" for p in points} == {
                u: row[name] for u, row in wanted.items() if row[name]
            }
            assert len(points) == len({p.step for p in points})
        mirror = Mirror(run, TrackingConfig(uri=server.uri, experiment="restarts"))
        assert mirror.send() == 0
        assert mirror._previews - {None} == {u for u, row in wanted.items() if row["preview/psnr_y_1"]}
        assert any(name.startswith("system/cpu") for name in found.data.metrics)
    finally:
        process.kill()
        server.kill()
