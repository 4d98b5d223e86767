"""Several nodes on one machine, and the ways to start ranks: each is bit-identical to one node under deepspeed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, small_recipe
from test_resume import begin, finish, same, tell, updates, wait_for
from test_training import close, rows, start

from teasr.util.distributed import free_port

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow


def command(program: list, data: dict, folder: Path, **environment: str) -> subprocess.Popen:
    path = folder / f"{Path(data['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(data))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env = clean | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [*map(str, program), "--config", str(path)],
        cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def two_nodes(data: dict, folder: Path) -> list[subprocess.Popen]:
    """One real launcher for each of two hostfile entries, as with `--no_ssh`: only the network is missing."""
    hosts = folder / "hostfile"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    common = [
        BIN / "deepspeed",
        "--hostfile",
        hosts,
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
    ]
    return [command([*common, "--node_rank", rank, "launch/train.py"], data, folder) for rank in range(2)]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """Two ranks on one node, started by deepspeed."""
    folder = tmp_path_factory.mktemp("one-node")
    finish(begin(small_recipe(shards, folder / "whole", train__updates=8, train__save_every_updates=2), folder, 2))
    return folder / "whole"


def recipe(shards, folder):
    common = {"train__updates": 8, "train__save_every_updates": 2, "train__keep_checkpoints": 1000}
    return small_recipe(shards, folder / "run", **common)


def test_two_nodes_one_of_which_dies(shards, tmp_path, undisturbed):
    """The other node notices, reports it and ends; after both are started again the final bits are the same."""
    data, run = recipe(shards, tmp_path), tmp_path / "run"
    nodes = two_nodes(data | {"train": data["train"] | {"updates": 100_000}}, tmp_path)
    wait_for(nodes[0], lambda: updates(run) >= 5)
    tell(nodes[1], signal.SIGKILL)
    out, _ = nodes[0].communicate()
    assert nodes[0].returncode != 0
    assert "error: another rank is gone" in out and "Traceback" not in out
    for update in run.glob("checkpoints/step-*"):  # this run went beyond the eight updates of the undisturbed one
        if int(update.name.removeprefix("step-")) > 4:
            subprocess.run(["rm", "-r", update], check=True)
    assert list(run.glob("checkpoints/step-*"))
    nodes = two_nodes(data, tmp_path)
    out = [finish(node) for node in nodes]
    assert "resuming from" in out[0] + out[1]
    same(undisturbed, run)


def test_torchrun(shards, tmp_path, undisturbed):
    program = [BIN / "torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "launch/train.py"]
    finish(command(program, recipe(shards, tmp_path), tmp_path))
    same(undisturbed, tmp_path / "run")


def test_the_slurm_script_with_stand_ins_for_slurm(shards, tmp_path, undisturbed):
    """Stand-ins for Slurm: `srun` starts the tasks as Slurm does, and `scontrol` records its arguments.

    A job stopped by SIGTERM is requeued.
    """
    tools, told = tmp_path / "tools", tmp_path / "told"
    tools.mkdir()
    srun = 'shift; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done; wait -n; wait -n'
    scontrol = f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {told}; fi'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_NTASKS": "2",
        "PYTHON": sys.executable,
    }
    slurm["PATH"] = f"{tools}:{os.environ['PATH']}"
    data, run = recipe(shards, tmp_path), tmp_path / "run"
    longer = data | {"train": data["train"] | {"updates": 100_000}}
    job = command(["bash", "launch/slurm.sbatch"], longer, tmp_path, **slurm)
    wait_for(job, lambda: updates(run) >= 3)
    for rank in psutil.Process(job.pid).children(recursive=True):
        if "launch/train.py" in rank.cmdline():
            rank.send_signal(signal.SIGTERM)
    out = finish(job)
    assert "stopped by SIGTERM after update" in out and told.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    stopped = updates(run)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert updates(run) == stopped
    told.unlink()
    more = data | {"train": data["train"] | {"updates": stopped + 2}}
    finish(command(["bash", "launch/slurm.sbatch"], more, tmp_path, **slurm))
    assert updates(run) == stopped + 2 and not told.exists()


def test_weights_on_a_disk(shards, tmp_path):
    """zero3_nvme gives the losses of zero1 on two ranks. One CPU rank is refused: its gradients would be wrong."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio and its headers (apt install libaio-dev)")
    settings = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())
    settings["zero_optimization"]["offload_param"] |= {"nvme_path": str(tmp_path), "buffer_size": 4_000_000}
    (tmp_path / "nvme.json").write_text(json.dumps(settings))
    large = {"backbone__width": 576, "backbone__heads": 6, "backbone__train": "lora", "backbone__base": "random"}
    jobs = [
        small_recipe(shards, tmp_path / name, **large, train__deepspeed=str(file))
        for name, file in (("zero1", ROOT / "ds_configs/zero1.json"), ("nvme", tmp_path / "nvme.json"))
    ]
    start(jobs, tmp_path, 2)
    assert sum(f.stat().st_size for f in (tmp_path / "zero_stage_3").rglob("*") if f.is_file()) > 30e6
    close(rows(tmp_path / "zero1"), rows(tmp_path / "nvme"))
    start(jobs[1:], tmp_path, 1)
    assert "gradients come out wrong" in (tmp_path / "nvme/error.txt").read_text()
