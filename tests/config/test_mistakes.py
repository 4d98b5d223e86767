"""launch/train.py, data_prep/make_shards.py and eval/benchmark.py report a user's mistake in one line with exit code 2.

The line names the remedy.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_shards, small_recipe

from teasr.util.distributed import free_port


def verb(path: str):
    """The main function of a script that is not an importable module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def one_line(capsys) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def config(tmp_path, shards, **changes) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(shards, tmp_path / "run", **changes)))
    return str(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.lambda_lpip=0", "did you mean lambda_lpips"),
        ("data.shards=/nowhere", "/nowhere holds no index.json: make shards with `teasr prepare`"),
        ("train.batch=3", "train.batch = 3 is not a multiple of"),
        ("train.deepspeed=nowhere.json", "nowhere.json cannot be read"),
        ("data.streams=64", "set data.streams=4"),
        ("method.lambda_lpips=1", "vgg16-397923af.pth"),
        ("method.mode=cycle", "not a multiple of 4"),
        ("backbone.train=lora", "backbone.base is not set"),
        ("backbone.base=/nowhere", "/nowhere cannot be loaded"),
        ("run_dir=/dev/null/run", "run_dir = /dev/null/run cannot be written (Not a directory)"),
        (
            "preview={every_updates: 7}",
            "preview.every_updates = 7 and train.save_every_updates = 500: one must be a multiple",
        ),
        ("preview={steps: [0]}", "preview.steps[0] = 0: must be in [1, 1000]"),
        ("preview={shards: /nowhere}", "/nowhere holds no index.json"),
        (f"train.deepspeed={ROOT}/ds_configs/zero3_nvme.json", "nvme_path = /local_nvme is not a folder: copy"),
    ],
)
def test_train_names_the_mistake_before_any_work(tmp_path, shards, capsys, monkeypatch, override, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    for name, value in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert verb("launch/train.py")(["--config", config(tmp_path, shards), override]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_train_refuses_ranks_that_do_not_divide_the_batch(tmp_path, shards, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert verb("launch/train.py")(["--config", config(tmp_path, shards)]) == 2
    assert "3 rank(s) x train.micro_batch = 2: use a batch that is a multiple of 6" in one_line(capsys)


def test_a_launcher_that_sets_half_of_the_ranks_variables_is_named(tmp_path, shards, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert verb("launch/train.py")(["--config", config(tmp_path, shards)]) == 2
    assert "RANK is set, but WORLD_SIZE = None is not a whole number" in one_line(capsys)


def test_a_rank_reports_what_it_alone_has_found(tmp_path, shards, capsys, monkeypatch):
    """The launcher ends the waiting ranks if rank 0 fails too; a rank that is still alive then tells its own error."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert verb("launch/train.py")(["--config", config(tmp_path, shards), "train.batch=3"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 3): ") and waited == [60]


def test_the_launcher_passes_the_failure_on(tmp_path, shards):
    """With two real ranks, one line of ours is printed however many ranks found the mistake, and the launcher fails."""
    folder = Path(sys.executable).parent
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = [folder / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py"]
    done = subprocess.run(
        [*command, "--config", config(tmp_path, shards), "train.batch=6"],
        cwd=ROOT,
        env=env | {"PATH": f"{folder}:{env['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and "2 rank(s) x train.micro_batch = 2: use a batch that is a multiple of 4" in ours[0]


def test_train_refuses_pictures_that_the_model_cannot_take(tmp_path, photos, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    odd = make_shards(photos, tmp_path / "odd", crop_px=60)
    assert verb("launch/train.py")(["--config", config(tmp_path, odd)]) == 2
    assert "60x60 px does not fit this backbone: both sides must be multiples of 8 px" in one_line(capsys)


def test_train_refuses_a_shard_without_usable_samples(tmp_path, photos, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    from test_shards import rewrite

    out = make_shards(photos, tmp_path / "bad")
    rewrite(out / "shard-000003.tar", lambda name, data: data[:30])
    assert verb("launch/train.py")(["--config", config(tmp_path, out)]) == 2
    assert "shard-000003.tar holds no usable sample" in one_line(capsys)


def test_train_prints_its_whole_config(tmp_path, shards, capsys):
    assert verb("launch/train.py")(["--config", config(tmp_path, shards), "--print", "train.updates=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["updates"] == 7 and printed["method"]["lambda_flow"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=OUT"], "config key photos is missing"),
        (["photos=/nowhere", "out=OUT"], "/nowhere is not a folder"),
        (["photos=PHOTOS", "out=OUT", "degradation=heavy"], "use one of osediff"),
        (["photos=PHOTOS", "out=OUT", "crop_px=100000"], "none of the 3 images"),
        (["photos=PHOTOS", "out=OUT", "crop=64"], "did you mean crop_px"),
        (["photos=PHOTOS", "out=/proc/x", "crop_px=64"], "/proc/x"),
    ],
)
def test_make_shards_names_the_mistake(photos, tmp_path, capsys, arguments, message):
    arguments = [a.replace("PHOTOS", str(photos)).replace("OUT", str(tmp_path)) for a in arguments]
    assert verb("data_prep/make_shards.py")(arguments) == 2
    assert message in one_line(capsys)


def test_benchmark_names_the_mistake(tmp_path, shards, capsys):
    benchmark = verb("eval/benchmark.py")
    assert benchmark([str(tmp_path / "none"), "--data", str(shards)]) == 2
    assert "neither a checkpoint nor a run folder" in one_line(capsys)
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
