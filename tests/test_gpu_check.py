"""The check on a GPU (bench/gpu_check.sh), rehearsed on the CPU, so that no typing error costs minutes of a GPU."""

import json
import os
import subprocess
import sys

import gpu_check
import pytest
from apart import Starter
from conftest import ROOT

from teasr import run_config

NETWORKS_S = {"qwen": 45}  # building and starting 20 B parameters, as measured on an H200; the others: 2 to 6 B


def test_rehearsal_of_the_whole_script(shards, tmp_path):
    """One step of each kind with tiny networks, and the training for the time left."""
    steps = ["machine", "swap-nf4-by-block-in-8gb", "vsd-one-base-bf16", "swap-check", "losses", "restore-bf16"]
    steps += ["zimage-teasr", "sd21-d3sr", "sd35-teasr-fake-copy", "sd35-tadsr", "small-model"]
    train = [str(ROOT / "launch/presets/tiny_teasr.yaml"), f"data.shards={shards}", "train.updates=2", "train.batch=4"]
    train += ["train.micro_batch=4", "preview.shards=null", "tracking.mlflow=false", "backbone.width=32"]
    command = [ROOT / "bench/gpu_check.sh", "--out", tmp_path / "out", "--tiny", "--minutes", "90"]
    done = subprocess.run(
        [*command, "--only", *steps, "--train", *train], env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    said = (tmp_path / "out/log.txt").read_text()[-3000:] if (tmp_path / "out/log.txt").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + said
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in rows}
    assert list(found) == [step.name for step in gpu_check.STEPS if step.name in steps] + ["train"]
    assert set(found["zimage-teasr"]["seconds"]) == {"one_step", "cons", "flow", "adv", "step"}
    assert set(found["swap-nf4-by-block-in-8gb"]["seconds"]) == {"all", "step"}
    assert set(found["sd21-d3sr"]["seconds"]) == {"generator", "discriminator", "step"}
    assert set(found["sd35-tadsr"]["seconds"]) == {"generator", "fake", "step"}
    assert found["sd35-teasr-fake-copy"]["seconds"].keys() == found["zimage-teasr"]["seconds"].keys()
    assert found["small-model"]["steps 4"]["most_off"] == 0
    assert set(found["vsd-one-base-bf16"]["seconds"]) == {"generator", "fake", "step"}
    assert found["losses"]["zero3"] == pytest.approx(found["losses"]["cpu"], rel=1e-5)
    assert found["losses"]["bf16"] == pytest.approx(found["losses"]["cpu"], rel=1e-3)
    assert all(case.get("ok", True) for case in found["swap-check"]["cases"])
    assert len(found["restore-bf16"]) == 6
    assert "step-00000002" in found["train"]["checkpoints"]


def test_every_step_has_a_valid_config_and_enough_time():
    for step in gpu_check.STEPS:
        if step.preset:
            for one in (step, gpu_check.tiny(step)):
                config = run_config.load(ROOT / f"launch/presets/{one.preset}.yaml", list(one.overrides))
                assert config.train.batch % config.train.micro_batch == 0
        assert step.kind != "update" or step.limit_s >= 2 * NETWORKS_S.get(step.preset.partition("_")[0], 15) + 30


def test_a_failed_or_endless_step_is_recorded(tmp_path):
    starter = Starter()
    (tmp_path / "result.py").write_text('print("RESULT {\\"x\\": 1}")')
    (tmp_path / "fails.py").write_text("raise KeyError('reason')")
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(600)")
    for forks in (starter.forks, False):
        starter.forks = forks
        rows = {
            name: gpu_check.run_apart(starter, name, [str(tmp_path / f"{name}.py")], limit, tmp_path)
            for name, limit in (("result", 60), ("fails", 60), ("sleeps", 0.2))
        }
        assert rows["result"]["x"] == 1 and "failed" not in rows["result"]
        assert rows["fails"]["failed"] == "exit code 1" and "reason" in rows["fails"]["said"]
        assert rows["sleeps"]["failed"] == "stopped after 0 s"


def test_packages_to_collect_are_pinned():
    listed = subprocess.run([ROOT / "bench/gpu_wheels.sh", "--list"], capture_output=True, text=True, check=True)
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert len(listed.stdout.split()) > 10 and set(listed.stdout.split()) <= pinned
