"""A run continues where it was after a kill, a stop signal, NaN pixels, a full disk, or a change of ranks or stage."""

import contextlib
import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import warm
import yaml
from conftest import ROOT, make_shards, partitioning, small_recipe
from safetensors.torch import load_file
from test_training import close, launcher_of, rows, start

FILES = ("weights.safetensors", "ema.safetensors", "optimiser.safetensors", "fixed.safetensors")


def begin(data: dict, folder: Path, ranks: int, real: bool = False) -> subprocess.Popen:
    """Start `launch/train.py` as a user does, in its own process group.

    real: use DeepSpeed's own launcher instead of the forked one (warm.py).
    """
    path = folder / f"{Path(data['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(data))
    launcher, env = launcher_of(ranks)
    command = [*launcher, str(ROOT / "launch/train.py"), "--config", str(path)]
    return (subprocess if real else warm).Popen(
        command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tell(process: subprocess.Popen, number: int) -> None:
    """Send a signal to all processes of the run, and wait for them to end if it is SIGKILL.

    The launcher's ranks have their own process groups.
    """
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    if number == signal.SIGKILL:
        process.wait()
        psutil.wait_procs(family, timeout=10)


def wait_for(process: subprocess.Popen, condition) -> None:
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.002)


def updates(run: Path) -> int:
    """The newest update in metrics.csv."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:] if (run / "metrics.csv").is_file() else []
    return int(lines[-1].split(",")[0]) if lines else 0


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out[-3000:]
    return out


def last(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def same(a: Path, b: Path) -> None:
    """Assert that two runs left bit-identical results."""
    assert last(a).name == last(b).name
    for name in FILES:
        assert (last(a) / name).read_bytes() == (last(b) / name).read_bytes(), name
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    pictures = [{p.name: p.read_bytes() for p in (run / "previews").glob("*")} for run in (a, b)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [("zero1", 1), ("zero3_offload", 1), ("zero2", 2), ("zero3", 2)],
)
def test_killed_at_any_instant_it_ends_with_the_same_bits(shards, tmp_path, stage, ranks):
    """SIGKILL of all processes, once between two saves and once during one; then the same command runs to the end."""
    common = {
        "train__deepspeed": str(partitioning(stage, tmp_path)),
        "train__updates": 12,
        "train__save_every_updates": 2,
        "preview": {"shards": str(shards), "pictures": 1, "steps": [1]},
    }
    whole = small_recipe(shards, tmp_path / "whole", **common)
    killed = small_recipe(shards, tmp_path / "killed", **common)
    undisturbed = begin(whole, tmp_path, ranks)
    run = tmp_path / "killed"
    process = begin(killed, tmp_path, ranks)
    wait_for(process, lambda: updates(run) >= 3)
    tell(process, signal.SIGKILL)
    process = begin(killed, tmp_path, ranks)
    reached = updates(run)
    wait_for(process, lambda: updates(run) > reached - 2 and list((run / "checkpoints").glob(".tmp-*")))
    tell(process, signal.SIGKILL)
    out = finish(begin(killed, tmp_path, ranks))
    assert "resuming from" in out
    finish(undisturbed)
    same(tmp_path / "whole", run)
    assert (tmp_path / "whole/checkpoints/best").readlink() == (run / "checkpoints/best").readlink()


@pytest.mark.parametrize("ranks", [1, 2])
def test_told_to_stop_it_finishes_the_update_saves_and_says_so(shards, tmp_path, ranks):
    """SIGTERM to every process, as Slurm and launchers send it, twice in a row; then the same command continues."""
    common = {"train__updates": 24, "train__save_every_updates": 1000}
    process = begin(small_recipe(shards, tmp_path / "stopped", **common), tmp_path, ranks, real=ranks == 2)
    run = tmp_path / "stopped"
    wait_for(process, lambda: updates(run) >= 3)
    for _ in range(2):
        tell(process, signal.SIGTERM)
    out, _ = process.communicate()
    if ranks == 1:
        assert process.returncode == 0
    done = updates(run)
    assert f"stopped by SIGTERM after update {done}; run the same command to resume" in out or ranks == 2
    assert 3 <= done < 24 and last(run).name == f"step-{done:08d}"
    assert f"resuming from {last(run)} at update {done}" in finish(
        begin(small_recipe(shards, run, **common), tmp_path, ranks)
    )
    start([small_recipe(shards, tmp_path / "whole", **common)], tmp_path, ranks)
    same(tmp_path / "whole", run)


def test_a_time_budget_ends_a_run_well(shards, tmp_path):
    """Each start does one update before it stops."""
    jobs = [small_recipe(shards, tmp_path / "run", train__max_hours=1e-6, train__updates=3)] * 4
    start([*jobs, small_recipe(shards, tmp_path / "whole", train__updates=3)], tmp_path, 1)
    same(tmp_path / "whole", tmp_path / "run")


def test_other_ranks_and_stages_go_on_with_the_same_losses(shards, tmp_path):
    """Two ranks under ZeRO-1, one under ZeRO-3, two under ZeRO-2 with offload, against an uninterrupted run on two."""
    common = {"train__save_every_updates": 2, "train__keep_checkpoints": 9}

    def job(name, stage, to):
        return small_recipe(
            shards, tmp_path / name, train__deepspeed=str(partitioning(stage, tmp_path)), train__updates=to, **common
        )

    start([job("whole", "zero1", 6), job("moved", "zero1", 2)], tmp_path, 2)
    start([job("moved", "zero3", 4)], tmp_path, 1)
    start([job("moved", "zero2_offload", 6)], tmp_path, 2)
    close(rows(tmp_path / "whole"), rows(tmp_path / "moved"))
    for name in FILES:
        a, b = (load_file(last(tmp_path / run) / name) for run in ("whole", "moved"))
        assert a.keys() == b.keys() and max((a[n] - b[n]).abs().max().item() for n in a) < 2e-4, name


def test_a_change_of_config_is_shown_and_refused_or_accepted(shards, tmp_path):
    first = small_recipe(shards, tmp_path / "run", train__updates=2)
    slower = small_recipe(shards, tmp_path / "run", train__updates=4, train__learning_rate=1e-3)
    wider = small_recipe(shards, tmp_path / "run", train__updates=4, backbone__width=64)
    start([first, slower], tmp_path, 1)
    error = (tmp_path / "run/error.txt").read_text()
    assert "train.learning_rate: 0.002 -> 0.001" in error and "--accept-changes" in error
    assert updates(tmp_path / "run") == 2
    start([wider | {"accept_changes": True}], tmp_path, 1)
    assert "do not fit this backbone" in (tmp_path / "run/error.txt").read_text()
    start([slower | {"accept_changes": True}], tmp_path, 1)
    assert [row["learning_rate"] for row in rows(tmp_path / "run")] == [0.002, 0.002, 0.001, 0.001]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_poisoned_batch_is_skipped_and_named(shards, tmp_path, ranks):
    """With NaN pixels on one rank, no rank changes its weights; the run continues in the same way under every stage."""
    jobs = []
    for stage in ("zero1", "zero2", "zero3", "zero3_offload"):
        common = {
            "train__deepspeed": str(partitioning(stage, tmp_path)),
            "train__save_every_updates": 1,
            "train__keep_checkpoints": 9,
        }
        jobs.append(small_recipe(shards, tmp_path / stage, train__updates=6, **common) | {"harm": {"poison": [2, 3]}})
    endless = small_recipe(
        shards, tmp_path / "endless", train__updates=9, train__max_skipped=2, train__save_every_updates=1
    )
    start([*jobs, endless | {"harm": {"poison": list(range(2, 9))}}], tmp_path, ranks)
    reference = rows(tmp_path / "zero1")
    assert [row["skipped"] for row in reference] == [0, 0, 1, 1, 0, 0]
    assert all("loss" in row for row in reference if not row["skipped"])
    for stage in ("zero2", "zero3", "zero3_offload"):
        close(rows(tmp_path / stage), reference)
    for stage in ("zero1", "zero3"):
        saved = [p.name for p in sorted((tmp_path / stage / "checkpoints").glob("step-*"))]
        assert saved == [f"step-{n:08d}" for n in (1, 2, 5, 6)]  # skipped updates are not saved
        states = [load_file(tmp_path / stage / f"checkpoints/step-{n:08d}/weights.safetensors") for n in (2, 5)]
        assert any(not torch.equal(states[0][n], states[1][n]) for n in states[0])
        assert all(x.isfinite().all() for x in states[1].values())
        assert json.loads((tmp_path / stage / "checkpoints/step-00000005/state.json").read_text())["steps"] == 3
    named = (tmp_path / "zero3/skipped_updates.txt").read_text().splitlines()
    assert (
        len(named) == 2 and named[0].startswith("update 3, rank 0: ") and "mse" in named[0] and "gradient" in named[0]
    )
    error = (tmp_path / "endless/error.txt").read_text()
    assert "3 updates in a row were not finite" in error and "the last good checkpoint is" in error
    assert last(tmp_path / "endless").name == "step-00000001" and "now named diverged-step-00000002" in error
    with open(tmp_path / "endless/metrics.csv") as file:
        assert [row["skipped"] for row in csv.DictReader(file)] == ["0", "0", "1", "1", "1"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_keeps_the_old_checkpoint_and_stops_or_goes_on(shards, tmp_path, ranks):
    common = {"train__updates": 6, "train__save_every_updates": 2}
    harm = {"harm": {"no_files_after": 3}}
    stops = small_recipe(shards, tmp_path / "stops", **common) | harm
    goes_on = small_recipe(shards, tmp_path / "goes_on", **common, train__on_full_disk="continue") | harm
    waits = small_recipe(
        shards,
        tmp_path / "waits",
        **common,
        train__on_full_disk="continue",
        preview={"every_updates": 2, "pictures": 1},
    )
    start([stops, goes_on, waits | {"harm": {"full_disk": [3, 5]}}], tmp_path, ranks, real=True)
    with open(tmp_path / "waits/metrics.csv") as file:
        assert [row["update"] for row in csv.DictReader(file)] == list("0123456")
    assert last(tmp_path / "waits").name == "step-00000006" and not (tmp_path / "waits/error.txt").exists()
    assert sorted(p.name[-5:] for p in (tmp_path / "waits/previews").iterdir()) == ["0.png", "2.png", "6.png"]
    error = (tmp_path / "stops/error.txt").read_text()
    assert "step-00000004 cannot be written" in error and "the newest checkpoint is of update 2: free space" in error
    assert last(tmp_path / "stops").name == "step-00000002" and updates(tmp_path / "stops") == 4
    assert updates(tmp_path / "goes_on") == 6 and last(tmp_path / "goes_on").name == "step-00000002"
    error = (tmp_path / "goes_on/error.txt").read_text()  # only the last one is an error: the result is not saved
    assert "step-00000006 cannot be written" in error and "step-00000004" not in error
    start([{k: v for k, v in stops.items() if k != "harm"}], tmp_path, ranks)
    assert last(tmp_path / "stops").name == "step-00000006"


@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_that_break_during_the_run_are_counted_and_named(photos, tmp_path, ranks):
    """Shards truncated, emptied, deleted or with a flipped bit after the start-up check: the run still completes."""
    data = make_shards(photos, tmp_path / "shards", shard_samples=4)
    job = small_recipe(data, tmp_path / "run", train__updates=24, data__max_bad_share=1.0)
    start([job | {"harm": {"damage": 1}}], tmp_path, ranks)
    named = (tmp_path / "run/bad_samples.txt").read_text()
    for number in range(4):
        assert f"shard-{number:06d}.tar" in named, named
    found = rows(tmp_path / "run")
    assert len(found) == 24 and sum(row["bad_samples"] for row in found) >= 12
    assert all(0 < row["loss"] < 100 and not row["skipped"] for row in found)
