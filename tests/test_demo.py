"""The commands of `make demo`, as the Makefile writes them, at a tenth of the size; a second round does nothing."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from teasr.util.distributed import free_port


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output of two rounds, and the folder they ran in."""
    place = tmp_path_factory.mktemp("demo")
    for name in ("data_prep", "launch", "eval", "ds_configs"):
        (place / name).symlink_to(ROOT / name)
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M).group(1)
    script = recipe.replace("$(BIN)", str(Path(sys.executable).parent)).replace("$(RUN)", "runs/demo")
    script = re.sub(r'PATH="[^"]*" ', "", script).replace("\t@", "").replace("$$", "$")
    script = script.replace("demo_train.yaml", "demo_train.yaml crops_per_photo=40 shard_samples=50")
    script = re.sub(r".*teasr weights.*\n", "", script)  # it needs the network; LPIPS is left out of the training
    settings = "train.updates=12 train.save_every_updates=6 method.lambda_lpips=0"
    script = script.replace("demo.yaml", f"demo.yaml {settings}")
    script = script.replace("$(PORT)", str(free_port()))
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    rounds = []
    for _ in range(2):
        done = subprocess.run(["bash", "-euc", script], cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        rounds.append(done.stdout)
    return rounds, place / "runs/demo"


def test_scores_picture_metrics_and_checkpoint_are_left(demo):
    _, run = demo
    scores = json.loads((run / "eval/heldout/scores.json").read_text())
    assert list(scores["methods"]) == ["bicubic", "1 step", "2 steps", "4 steps", "8 steps"]
    for row in scores["methods"].values():
        assert 10 < row["psnr"]["mean"] < 40 and 0 < row["ssim"]["mean"] < 1
    sheet = np.asarray(Image.open(run / "eval/heldout/comparison.png"))
    assert sheet.shape[1] == 6 * 256 + 5 * 4 and sheet.std() > 20
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [r["update"] for r in rows] == [str(i) for i in range(13)]  # row 0: the preview before the first update
    assert (run / "checkpoints/step-00000012/MANIFEST.json").is_file()
    assert "crops" not in (run / "config.yaml").read_text() and "updates: 12" in (run / "config.yaml").read_text()
    assert len((run / "commit").read_text().strip()) >= 7


def test_progress_tells_phase_step_loss_rate_and_time_left(demo):
    (first, _), _ = demo
    assert re.search(r"prepare +\d+/240 samples .* samples/s  in \d+ s", first)
    assert re.search(r"train +12/12 updates  loss [\d.]+  [\d.]+ updates/s  in \d+ s", first)
    assert re.search(r"evaluate +\d+/22 pictures", first)
    assert "mlflow ui" in first and "comparison.png" in first and re.search(r"1 step +\d\d\.\d+ +0\.\d+", first)


def test_second_round_says_that_it_is_done(demo):
    (_, second), _ = demo
    assert "the model is in runs/demo; next:" in second and "--model runs/demo" in second
    assert "already trained: 12/12 updates" in second and "already evaluated" in second
    assert re.search(r"8 steps +\d\d\.\d+", second)


def test_mlflow_holds_params_commit_environment_losses_scores_and_picture(demo):
    from mlflow import MlflowClient

    _, run = demo
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("teasr-demo").experiment_id])
    assert found.data.params["method.lambda_adv"] == "1.0" and found.data.params["train.start_from"] == "small"
    assert found.data.params["commit"] == (run / "commit").read_text().strip() and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss/consistency")
    assert [m.step for m in history] == list(range(1, 13))
    assert found.data.tags["method"] == "teasr" and "teasr upscale" in found.data.tags["mlflow.note.content"]
    read = {(x.dataset.name, x.tags[0].value) for x in found.inputs.dataset_inputs}
    assert ("train", "training") in read and len({x.dataset.digest for x in found.inputs.dataset_inputs}) == 2
    assert len(found.outputs.model_outputs) == 1
    curve = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "heldout/psnr")}
    scores = json.loads((run / "eval/heldout/scores.json").read_text())["methods"]
    names = {1: "1 step", 2: "2 steps", 4: "4 steps", 8: "8 steps"}
    assert curve == {n: pytest.approx(scores[name]["psnr"]["mean"]) for n, name in names.items()}
    assert {f.path for f in client.list_artifacts(found.info.run_id)} >= {"config.yaml", "environment.txt"}
    files = {f.path.rpartition("/")[2] for f in client.list_artifacts(found.info.run_id, "eval/heldout")}
    assert files >= {
        "comparison.png",
        "extremes.png",
        "scores.json",
        "scores_by_picture.csv",
        "scores_by_picture.json",
        "speed.json",
    }


def test_the_checkpoint_restores_a_picture_of_any_size(demo):
    from teasr.restore.upscaler import Upscaler

    _, run = demo
    upscaler = Upscaler.from_pretrained(run)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 51, 3), dtype=np.uint8))
    restored = upscaler(picture, steps=2)
    assert restored.size == (204, 148)
    again = upscaler(np.asarray(picture), steps=2)
    assert np.array_equal(np.asarray(restored), again)
    assert not np.array_equal(upscaler(np.asarray(picture), steps=2, seed=1), again)
    with pytest.raises(ValueError, match="RGB image"):
        upscaler(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"other\.safetensors; weights must be one of: ema, weights"):
        Upscaler.from_pretrained(run, weights="other")
