"""Every method: DeepSpeed against a plain PyTorch loop in all ZeRO stages on one and two ranks, stopping, killing.

A new method needs one line in CASES, or tests of its own as COVERED names them.
"""

import signal
from itertools import islice

import pytest
import torch
from conftest import partitioning, small_recipe
from test_resume import begin, tell, updates, wait_for
from test_training import close, rows, start

from teasr import run_config
from teasr.data.shards import ShardSet
from teasr.data.stream import PairStream, batches
from teasr.methods.base import Progress
from teasr.run_config import parse
from teasr.training.networks import Networks
from teasr.training.trainer import FIT_PAIRS, first_pairs
from teasr.training.update import backpropagate

LORA = {"backbone__train": "lora", "backbone__base": "random"}
VSD = {"name": "score_distillation", "lambda_mse": 10.0, "lambda_lpips": 0.0, "fake_rate": 3.0}
TSD = VSD | {
    "student": "single", "weight": "s2", "lambda_vsd": 0.7, "lambda_tsm": 0.3, "mse_space": "latent", "time_shift": 3.0,
    "dasm_weights": [1.0, 0.3],
}  # fmt: skip
D3SR = {
    "name": "d3sr", "lambda_mse": 10.0, "lambda_ea_dists": 0.0, "lambda_adv": 0.5, "disc_blocks": 1, "disc_rate": 3.0,
    "adv_ramp": {"start": 1, "length": 2},
}  # fmt: skip
TADSR = {"name": "tadsr", "lambda_mse": 10.0, "lambda_lpips": 0.0, "fake_rate": 3.0}
CASES = {  # name -> method, and changes of the config
    "osediff": (VSD, LORA),
    "osediff, two copies": (VSD | {"layout": "two_copies"}, LORA),
    "osediff, full copies": (VSD | {"layout": "three_copies"}, LORA | {"backbone__train": "full"}),
    "tsdsr": (TSD, LORA),
    "csd": (VSD | {"fake": "sample", "weight": "kl"}, LORA),
    "d3sr": (D3SR, LORA),
    "d3sr, pixels": (D3SR | {"discriminator": "prior"}, LORA | {"prior": {"name": "pixel_cnn", "width": 4}}),
    "d3sr, full copy": (D3SR | {"student": "dual", "discriminator": "copy"}, LORA | {"backbone__train": "full"}),
    "tadsr": (TADSR, LORA),
}
STAGES = {  # the shared base in every stage, the other cases in one
    "osediff": ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"),
    "osediff, two copies": ("zero2",), "osediff, full copies": ("zero3",), "tsdsr": ("zero2_offload",),
    "csd": ("zero1",), "d3sr": ("zero2", "zero3_offload"), "d3sr, full copy": ("zero1", "zero3"),
    "d3sr, pixels": ("zero3",), "tadsr": ("zero3",),
}  # fmt: skip
COVERED = {"coarse", "teasr", "two_roles", "one_sided", "timed"}  # by test_unet.py, test_training.py and test_roles.py
PAIRS = [(case, stage) for case, stages in STAGES.items() for stage in stages]


def job(shards, run_dir, case, stage="zero1", **changes) -> dict:
    method, more = CASES[case]
    zero = {"train__deepspeed": str(partitioning(stage, run_dir.parent))}
    data = small_recipe(shards, run_dir, method=method, **(zero | more | changes))
    return data | {"preview": {"every_updates": 0, "steps": [1]}}


def test_every_method_is_in_the_table():
    assert run_config.METHODS.keys() - COVERED == {method["name"] for method, _ in CASES.values()}


def plain(data: dict) -> tuple[list[dict], dict[str, dict]]:
    """Train without DeepSpeed; return the logged values of each update and the final trained weights by role."""
    config = parse(data)
    method, train = config.build_method(), config.train
    networks, shards = Networks(config, method), ShardSet.open(*config.data.locations)
    networks.student.fit(first_pairs(shards, FIT_PAIRS))
    networks.share_codec()
    own = {role: networks.base(role.name).trained(role.name) for role in networks.trained_roles}
    steps = {
        role: torch.optim.AdamW(
            p.values(), lr=train.learning_rate * role.rate, betas=train.betas, weight_decay=train.weight_decay
        )
        for role, p in own.items()
    }
    stream, found = batches(PairStream(shards, config.data, config.seed, 0, 1, 0), train.micro_batch), []
    for update in range(train.updates):
        micros = [batch for batch, _ in islice(stream, train.accumulation(1))]
        for step in steps.values():
            step.zero_grad()
        logs = backpropagate(
            method, networks.models, micros, config.seed, Progress(update, train.updates), lambda _, v: v.backward()
        )
        for role, step in steps.items():
            norm = torch.nn.utils.clip_grad_norm_(own[role].values(), train.clip_norm)
            logs |= {f"grad_norm/{role.name}": norm} if len(steps) > 1 else {"grad_norm": norm}
            step.step()
        found.append({name: float(value) for name, value in logs.items()})
    return found, {role.name: {n: p.detach() for n, p in p.items()} for role, p in own.items()}


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Every case in its stages on one and two ranks."""
    folder = tmp_path_factory.mktemp("methods")
    for ranks in (1, 2):
        start([job(shards, folder / f"{ranks}-{case}-{stage}", case, stage) for case, stage in PAIRS], folder, ranks)
    return folder


@pytest.fixture(scope="module")
def references(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return {case: plain(job(shards, folder / case, case)) for case in CASES}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("case", "stage"), PAIRS)
def test_all_stages_and_ranks_train_as_plain_torch(runs, references, case, stage, ranks):
    """Losses, the gradient norm of each role, and the trained weights, all from one process with the whole batch.

    In OSEDiff's code each rank trains a fake score of its own, because it calls it past DDP's forward pass.
    """
    from safetensors.torch import load_file

    wanted, trained = references[case]
    run = runs / f"{ranks}-{case}-{stage}"
    found = rows(run)
    assert len(found) == len(wanted) == 5
    for want, have in zip(wanted, found, strict=True):
        for name, value in want.items():
            near = 2e-2 if name.startswith("accuracy") else 2e-5  # a logit near zero may change its sign
            assert have[name] == pytest.approx(value, rel=5e-4, abs=near), (have["update"], name)
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    for role, own in trained.items():
        saved = load_file(last / ("weights.safetensors" if role == "student" else f"weights-{role}.safetensors"))
        assert set(own) <= set(saved) and max((saved[n] - own[n]).abs().max() for n in own) < 3e-4, role
    assert not any("real" in path.name for path in last.iterdir())


@pytest.mark.parametrize(
    ("case", "stage"), [("tadsr", "zero3"), ("osediff, full copies", "zero2_offload"), ("d3sr", "zero3")]
)
def test_stopped_it_resumes_to_the_same_bits(shards, tmp_path, case, stage):
    def part(name, n):
        return job(shards, tmp_path / name, case, stage, train__updates=n, train__save_every_updates=2)

    start([part("whole", 4), part("halves", 2), part("halves", 4)], tmp_path, 1)
    a, b = (tmp_path / name / "checkpoints/step-00000004" for name in ("whole", "halves"))
    second = "discriminator" if case.startswith("d3sr") else "fake"
    assert {f"weights-{second}.safetensors", f"optimiser-{second}.safetensors"} <= {path.name for path in a.iterdir()}
    for file in a.glob("*.safetensors"):
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "halves/metrics.csv").read_bytes()


def test_killed_on_two_ranks_it_resumes_on_one_with_the_same_losses(shards, tmp_path):
    data = job(shards, tmp_path / "killed", "tsdsr", "zero2", train__updates=8, train__save_every_updates=2)
    process = begin(data, tmp_path, 2)
    wait_for(process, lambda: updates(tmp_path / "killed") >= 3)
    tell(process, signal.SIGKILL)
    start([data, data | {"run_dir": str(tmp_path / "whole")}], tmp_path, 1)
    close(rows(tmp_path / "killed"), rows(tmp_path / "whole"), relative=5e-4)
