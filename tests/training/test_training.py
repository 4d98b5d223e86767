"""training.py: DeepSpeed against plain torch, and ZeRO stages and rank counts against each other.

Resumed runs are bit-identical.
"""

import csv
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, make_shards, partitioning, small_recipe
from safetensors.torch import load_file

from teasr.backbones.model import Model
from teasr.data.config import DataConfig
from teasr.data.shards import ShardSet
from teasr.data.stream import PairStream, batches
from teasr.methods.base import Progress
from teasr.run_config import parse
from teasr.training.engine import check_zero, engine_settings
from teasr.util.distributed import free_port
from teasr.util.randomness import Draws

STAGES = ("zero1", "zero2", "zero3", "zero3_offload")
VARIANTS = {
    "lora": {"backbone__train": "lora", "backbone__base": "random"},
    "cycle": {"method__mode": "cycle", "train__batch": 8, "train__micro_batch": 1},
    "alternate": {"method__mode": "alternate_base"},
    "checkpointing": {"backbone__gradient_checkpointing": True},
}


def launcher_of(ranks: int) -> tuple[list[str], dict[str, str]]:
    """The command that starts a script on so many ranks, and its environment without those of an earlier launcher."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env = clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    if ranks == 1:
        return [sys.executable], env
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())], env


def start(jobs: list[dict], folder: Path, ranks: int, real: bool = False) -> None:
    """Run jobs one after another in one process, or on ranks as the launcher starts them.

    real: as processes of their own whose output is a pipe, where forked ones (warm.py) write to a file.
    """
    path = folder / f"jobs-{ranks}-{len(jobs)}.json"
    path.write_text(json.dumps(jobs))
    launcher, env = launcher_of(ranks)
    done = (subprocess if real else warm).run(
        [*launcher, str(ROOT / "tests/run_jobs.py"), str(path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(open(run_dir / "metrics.csv"))]


def close(a: list[dict], b: list[dict], relative: float = 2e-4) -> None:
    """Assert that all columns of all updates agree up to fp32 rounding."""
    assert len(a) == len(b) >= 5
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=relative, abs=1e-5), (x["update"], name)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Runs of every stage and variant on one and on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2):
        jobs = []
        for stage in STAGES:
            jobs.append(
                small_recipe(shards, folder / f"{ranks}-{stage}", train__deepspeed=str(partitioning(stage, folder)))
            )
        for name, changes in VARIANTS.items():
            changes = changes | {"train__deepspeed": str(partitioning("zero3", folder))}
            jobs.append(small_recipe(shards, folder / f"{ranks}-{name}", **changes))
        start(jobs, folder, ranks)
    return folder


def plain_torch(data: dict) -> tuple[list[dict], dict]:
    """Train without DeepSpeed; return the losses and gradient norms of each update, and the final weights."""
    recipe = parse(data)
    backbone, method, train = recipe.build_backbone(), recipe.build_method(), recipe.train
    from teasr.training.trainer import FIT_PAIRS, first_pairs

    shards = ShardSet.open(*recipe.data.locations)
    backbone.fit(first_pairs(shards, FIT_PAIRS))
    parameters = [p for p in backbone.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
    )
    found, n = [], train.micro_batch
    stream = batches(PairStream(shards, recipe.data, recipe.seed, 0, 1, 0), n)
    for update in range(train.updates):
        sums: dict[str, list] = {}
        micros = train.batch // n
        for i, (batch, _) in enumerate(islice(stream, micros)):
            draws = Draws(recipe.seed, update, tuple(range(i * n, (i + 1) * n)))
            for loss in method.losses(
                {"student": Model(backbone)}, batch, draws, Progress(update, train.updates, i, micros)
            ):
                (loss.value / micros).backward()
                for name, value in loss.logs.items():
                    sums.setdefault(name, []).append(float(value))
        norm = torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: sum(v) / len(v) for name, v in sums.items()} | {"grad_norm": float(norm)})
    return found, {name: p.detach() for name, p in backbone.net.named_parameters()}


def test_engine_agrees_with_plain_torch(runs, shards):
    """Losses, gradient norms and weights of five updates: a missing or doubled backward pass would show at once."""
    reference, weights = plain_torch(small_recipe(shards, runs / "plain"))
    ours = rows(runs / "1-zero3")
    for want, have in zip(reference, ours, strict=True):
        for name, value in want.items():
            assert have[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    saved = load_file(next((runs / "1-zero3/checkpoints").iterdir()) / "weights.safetensors")
    assert saved.keys() == weights.keys()
    assert max((saved[n] - weights[n]).abs().max().item() for n in weights) < 2e-4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["zero2", "zero3", "zero3_offload"])
def test_zero_stages_give_the_same_losses(runs, stage, ranks):
    close(rows(runs / f"{ranks}-{stage}"), rows(runs / f"{ranks}-zero1"))


@pytest.mark.parametrize("name", [*STAGES, "lora", "alternate", "checkpointing"])
def test_two_ranks_agree_with_one(runs, name):
    """The same global batch and noise; the averaged weights agree too."""
    close(rows(runs / f"2-{name}"), rows(runs / f"1-{name}"))
    one, two = (load_file(next((runs / f"{r}-{name}/checkpoints").iterdir()) / "ema.safetensors") for r in (1, 2))
    assert one.keys() == two.keys()
    assert max((one[n] - two[n]).abs().max().item() for n in one) < 2e-4


def test_cycle_trains_every_term_on_two_ranks(runs):
    """Which sample gets which loss depends on the number of ranks here, so equality cannot be required."""
    for ranks in (1, 2):
        assert {"flow", "cons", "adv", "rectify", "mse"} <= set(rows(runs / f"{ranks}-cycle")[-1])


def test_checkpointing_gives_the_same_losses(runs):
    close(rows(runs / "1-checkpointing"), rows(runs / "1-zero3"), relative=1e-6)


def test_frozen_base_stays_as_it_was(runs, shards):
    trained = load_file(next((runs / "2-lora/checkpoints").iterdir()) / "weights.safetensors")
    recipe = parse(small_recipe(shards, runs / "x", **VARIANTS["lora"]))
    fresh = dict(recipe.build_backbone().net.named_parameters())
    for name, tensor in trained.items():
        assert torch.equal(tensor, fresh[name]) == ("lora_" not in name), name


def test_what_every_update_logs(runs):
    row = rows(runs / "1-zero3")[-1]
    names = (
        "update loss flow cons adv rectify mse grad_norm z_hat_mean z_hat_std rectify_to_data checkerboard "
        "learning_rate"
    )
    assert set(names.split()) <= set(row)
    assert rows(runs / "1-zero3")[0].get("rectify") is None  # its ramp starts at zero


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_resume_goes_on_to_the_same_bits(shards, tmp_path, stage):
    """Six updates without a break against three, a stop, and three more: weights, average, metrics.csv."""
    common = {
        "train__deepspeed": str(partitioning(stage, tmp_path)),
        "train__save_every_updates": 3,
        "train__keep_checkpoints": 5,
    }
    whole = small_recipe(shards, tmp_path / "whole", train__updates=6, **common)
    half = small_recipe(shards, tmp_path / "halves", train__updates=3, **common)
    rest = small_recipe(shards, tmp_path / "halves", train__updates=6, **common)
    other = small_recipe(shards, tmp_path / "halves", train__updates=6, **common, backbone__width=64)
    start([whole, half, rest, rest, other], tmp_path, 1)
    a, b = (tmp_path / name / "checkpoints/step-00000006" for name in ("whole", "halves"))
    for name in ("weights.safetensors", "ema.safetensors", "fixed.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "halves/metrics.csv").read_bytes()
    assert "backbone.width: 32 -> 64" in (tmp_path / "halves/error.txt").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_broken_shards_are_passed_over_counted_named_and_reach_mlflow(photos, tmp_path, ranks):
    """One of four shards is truncated: the run completes and reports it; above the allowed share it does not start."""
    from mlflow import MlflowClient

    out = make_shards(photos, tmp_path / "shards")
    (out / "shard-000002.tar").write_bytes(b"torn")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = {"uri": store, "experiment": "broken"}
    bears = small_recipe(out, tmp_path / "bears", data__max_bad_share=1.0, tracking=tracking, train__updates=6)
    refuses = small_recipe(out, tmp_path / "refuses")
    start([bears, refuses][: 3 - ranks], tmp_path, ranks)  # a single rank refuses before the ranks connect
    stream = PairStream(ShardSet.open(str(out)), DataConfig(str(out)), 0, 0, 1, 0)
    wanted = [sum(bool(row[3]) for row in islice(samples, 4)) for samples in [iter(stream)] for _ in range(6)]
    assert [row["bad_samples"] for row in rows(tmp_path / "bears")] == wanted and sum(wanted) > 0
    named = (tmp_path / "bears/bad_samples.txt").read_text()
    # reported once, but counted in every update
    assert "shard-000002.tar cannot be read" in named and len(named.splitlines()) <= ranks
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("broken").experiment_id])
    assert [m.value for m in client.get_metric_history(run.info.run_id, "data/bad_samples")] == wanted
    assert "bad_samples.txt" in {f.path for f in client.list_artifacts(run.info.run_id)}
    if ranks == 1:
        assert "1 of 4 checked shards are bad" in (tmp_path / "refuses/error.txt").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        (
            '{"zero_optimization": {"stage": 3}, "gradient_clipping": 1}',
            "gradient_clipping, which is set by the run config",
        ),
        ('{"zero_optimization": {"stage": 0}}', "must be 1, 2 or 3"),
        ('{"zero_optimization": 3}', "stage = None: it must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "stage is given twice"),
        ('{"zero_optimization": {"stage": 2, "reduce_buckets": 1}}', "zero_optimization.reduce_buckets = 1 is not"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}', "zero_optimization.reduce_bucket_size = -1"),
    ],
)
def test_wrong_deepspeed_files_are_named(tmp_path, content, message):
    (tmp_path / "ds.json").write_text(content)
    train = parse(small_recipe(tmp_path, tmp_path, train__deepspeed=str(tmp_path / "ds.json"))).train
    with pytest.raises(ValueError, match=message):
        check_zero(engine_settings(train, 1), train.deepspeed)
