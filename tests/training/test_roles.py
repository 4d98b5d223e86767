"""Several roles on one base: DeepSpeed against a plain PyTorch loop.

Covers every ZeRO stage on one and two ranks, stopping, killing and resuming.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
import warm
from conftest import ROOT, partitioning, small_recipe
from safetensors.torch import load_file
from test_training import close, rows, start
from two_roles import TwoRoles, TwoRolesConfig, plain_losses, plain_torch

from teasr.backbones.model import Condition, Model
from teasr.backbones.roles import STUDENT, Role, check_roles
from teasr.backbones.tiny import Tiny, TinyConfig
from teasr.data.batch import Batch
from teasr.data.shards import ShardSet
from teasr.data.stream import PairStream, batches
from teasr.methods.base import Progress
from teasr.run_config import parse
from teasr.training.networks import Networks
from teasr.training.trainer import FIT_PAIRS, Trainer, first_pairs
from teasr.training.update import backpropagate
from teasr.util.randomness import Draws

STAGES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
LORA = {"backbone__train": "lora", "backbone__base": "random"}


def job(shards, run_dir, stage=None, **changes) -> dict:
    method = {"name": "two_roles"} | changes.pop("method", {})
    changes = LORA | changes
    if stage is not None:
        changes["train__deepspeed"] = str(partitioning(stage, run_dir.parent))
    return small_recipe(shards, run_dir, method=method, **changes)


class Batches:
    """The micro-batches of each update, as one rank reads them."""

    def __init__(self, config):
        self.config, self.shards = config, ShardSet.open(*config.data.locations)

    def fit(self, backbones) -> None:
        backbones["student"].fit(first_pairs(self.shards, FIT_PAIRS))
        for backbone in backbones.values():
            backbone.load_fixed_state(backbones["student"].fixed_state())

    def of(self, update: int) -> list[Batch]:
        config = self.config
        stream = PairStream(self.shards, config.data, config.seed, 0, 1, update * config.train.batch)
        micros = config.train.accumulation(1)
        return [batch for batch, _ in islice(batches(stream, config.train.micro_batch), micros)]


def weights(run_dir) -> dict:
    """All trained weights, by role."""
    folder = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    return {
        "student": load_file(folder / "weights.safetensors"),
        "critic": load_file(folder / "weights-critic.safetensors"),
    }


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Every stage on one and two ranks, a run with copies of the base, and one whose method leaks a gradient."""
    folder = tmp_path_factory.mktemp("roles")
    for ranks in (1, 2):
        jobs = [job(shards, folder / f"{ranks}-{stage}", stage) for stage in STAGES]
        jobs.append(job(shards, folder / f"{ranks}-copies", "zero3", method={"copies": True}))
        jobs.append(job(shards, folder / f"{ranks}-checkpointing", "zero3", backbone__gradient_checkpointing=True))
        if ranks == 1:
            jobs.append(job(shards, folder / "leak", "zero1", method={"leak": True}))
        start(jobs, folder, ranks)
    return folder


@pytest.fixture(scope="module")
def reference(shards, runs):
    config = parse(job(shards, runs / "plain"))
    return plain_torch(config, Batches(config), config.train.updates)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [*STAGES, "copies", "checkpointing"])
def test_all_roles_step_as_in_plain_torch(runs, reference, stage, ranks):
    """Losses, the norm of each role's own gradient, and the weights of both roles after five updates."""
    wanted, trained = reference
    found = rows(runs / f"{ranks}-{stage}")
    assert len(found) == len(wanted) == 5
    for want, have in zip(wanted, found, strict=True):
        for name, value in want.items():
            assert have[name] == pytest.approx(value, rel=2e-4, abs=1e-5), (have["update"], name)
        assert have["grad_norm"] == pytest.approx(
            math.hypot(have["grad_norm/student"], have["grad_norm/critic"]), rel=1e-6
        )
    assert wanted[0]["grad_norm/critic"] > 0.2  # above the critic's clipping norm
    saved = weights(runs / f"{ranks}-{stage}")
    for role, own in trained.items():
        assert set(own) <= set(saved[role])
        assert max((saved[role][n] - own[n]).abs().max().item() for n in own) < 2e-4, role
        assert max((own[n]).abs().max().item() for n in own if "lora_B" in n or "last" in n) > 1e-3, role


def test_a_gradient_that_leaks_into_the_critic_would_be_noticed(runs, reference):
    """With a plain backward pass through the critic, its gradient differs from the first update on."""
    found = rows(runs / "leak")[0]
    assert found["grad_norm/student"] == pytest.approx(reference[0][0]["grad_norm/student"], rel=1e-4)
    assert found["grad_norm/critic"] != pytest.approx(reference[0][0]["grad_norm/critic"], rel=1e-2)


def test_a_checkpoint_holds_what_is_trained_and_the_base_once(runs):
    """The student's files have the usual names, the critic's adapter and head their own, the frozen teacher none."""
    folder = sorted((runs / "1-zero3/checkpoints").glob("step-*"))[-1]
    names = {p.name for p in folder.glob("*.safetensors")}
    assert names == {
        f"{kind}.safetensors" for kind in ("weights", "optimiser", "ema", "fixed", "weights-critic", "optimiser-critic")
    }
    student, critic = (set(load_file(folder / f"weights{end}.safetensors")) for end in ("", "-critic"))
    assert not student & critic and all(".critic." in n for n in critic) and not any(".critic." in n for n in student)
    assert any(n.startswith("parts.critic.head.") for n in critic) and any(".lora_A.critic." in n for n in critic)
    assert not any("blocks.1." in n for n in critic)  # it has only the first block


@pytest.mark.parametrize(("stage", "ranks"), [("zero1", 1), ("zero3", 2), ("zero2_offload", 1)])
def test_stopped_and_resumed_it_ends_with_the_same_bits(shards, tmp_path, stage, ranks):
    def part(name, updates):
        return job(shards, tmp_path / name, stage, train__updates=updates, train__save_every_updates=3)

    start([part("whole", 6), part("halves", 3), part("halves", 6)], tmp_path, ranks)
    a, b = (tmp_path / name / "checkpoints/step-00000006" for name in ("whole", "halves"))
    for file in a.glob("*.safetensors"):
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "halves/metrics.csv").read_bytes()


def test_killed_it_goes_on_to_the_same_bits(shards, tmp_path):
    whole, killed = (
        job(shards, tmp_path / name, "zero3", train__updates=30, train__save_every_updates=2)
        for name in ("whole", "killed")
    )
    (tmp_path / "killed.json").write_text(json.dumps([killed]))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, str(ROOT / "tests/run_jobs.py"), str(tmp_path / "killed.json")]
    process = warm.Popen(command, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed/metrics.csv"
    while not (log.is_file() and len(log.read_text().splitlines()) > 4):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(rows(tmp_path / "killed")) < 30
    start([killed, whole], tmp_path, 1)
    for file in (tmp_path / "whole/checkpoints/step-00000030").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed/checkpoints/step-00000030" / file.name).read_bytes(), file.name
    assert log.read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_other_ranks_and_stages_go_on_with_the_same_losses(shards, tmp_path):
    def part(name, stage, updates):
        return job(shards, tmp_path / name, stage, train__updates=updates, train__save_every_updates=2)

    start([part("moved", "zero1", 2)], tmp_path, 2)
    start([part("whole", "zero1", 6), part("moved", "zero3", 4)], tmp_path, 1)
    start([part("moved", "zero2_offload", 6)], tmp_path, 2)
    close(rows(tmp_path / "whole"), rows(tmp_path / "moved"))


# the tests below run in this process, without an engine


def small(roles, dtype=torch.float64, **settings) -> Tiny:
    sizes = {
        "width": 16,
        "depth": 2,
        "heads": 2,
        "latent_channels": 12,
        "lora_rank": 2,
        "train": "lora",
        "base": "random",
    }
    backbone, g = Tiny(TinyConfig(**(sizes | settings)), roles=roles), torch.Generator().manual_seed(0)
    backbone.fit([(torch.rand(3, 64, 64, generator=g) * 2 - 1, torch.rand(3, 64, 64, generator=g) * 2 - 1)] * 8)
    for name, p in backbone.net.named_parameters():
        if "lora_B" in name or name.endswith("last.weight"):
            p.data.normal_(0, 0.2, generator=g)
    backbone.net.to(dtype)
    backbone.codec.to(dtype)
    return backbone


def pictures(n=3, dtype=torch.float64) -> Batch:
    g = torch.Generator().manual_seed(1)
    x_hq, x_lq = (torch.rand(2, n, 3, 32, 32, generator=g, dtype=dtype) * 2 - 1).unbind(0)
    return Batch(x_hq, x_lq, [str(i) for i in range(n)])


def gradients(backbone, role) -> dict:
    return {n: p.grad.clone() for n, p in backbone.trained(role).items() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_through_another_role_leaves_its_gradient_alone(checkpointing):
    """In float64, to 1e-10: each role gets exactly the gradient of its own total, also with recomputed activations."""
    config = TwoRolesConfig()
    method = TwoRoles(config)
    backbone = small(method.roles(), gradient_checkpointing=checkpointing)
    models = {role.name: Model(backbone, role) for role in method.roles()}
    seen = {}

    def backward(role, value):
        value.backward()
        seen[role] = {name: gradients(backbone, name) for name in ("student", "critic")}

    backpropagate(method, models, [pictures()], 0, Progress(0, 1), backward)
    assert not seen["student"]["critic"]  # after the student's loss the critic has no gradient
    assert all(torch.equal(g, seen["critic"]["student"][n]) for n, g in seen["student"]["student"].items())
    totals, _ = plain_losses(config, dict.fromkeys(models, backbone), pictures(), Draws(0, 0, (0, 1, 2)))
    for role, total in totals.items():
        own = backbone.trained(role)
        wanted = dict(zip(own, torch.autograd.grad(total, list(own.values()), retain_graph=True), strict=True))
        found = seen["critic"][role]
        assert found.keys() == wanted.keys() and max(g.abs().max() for g in wanted.values()) > 1e-6
        assert max((found[n] - wanted[n]).abs().max().item() for n in wanted) < 1e-10
    assert all(p.grad is None for n, p in backbone.net.named_parameters() if backbone.owner(n, p) is None)


def test_a_single_branch_without_adapter_is_the_prior_itself():
    """Bit-identical whatever the other roles on the base have learnt; another adapter set has no effect."""
    prior = Tiny(
        TinyConfig(base="small-prior", train="lora"), roles=(Role("teacher", trains="nothing", branches="single"),)
    )
    roles = (STUDENT, Role("fake", branches="single"), Role("teacher", trains="nothing", branches="single"))
    shared = Tiny(TinyConfig(base="small-prior", train="lora", pair=0.5), roles=roles)
    g = torch.Generator().manual_seed(0)
    for name, p in shared.net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=g)
    for backbone in (prior, shared):
        backbone._fitted()
    z, t = torch.randn(2, 48, 8, 8, generator=g), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        alone = Model(prior, prior.roles[0]).velocity(z, t)
        teacher, fake = (Model(shared, role).velocity(z, t) for role in (roles[2], roles[1]))
        assert torch.equal(teacher, alone) and not torch.allclose(fake, alone, atol=1e-3)
        assert torch.equal(Model(shared, roles[1]).features(z, t), Model(shared, roles[1]).features(z, t))


def test_an_encoder_adapter_starts_as_the_identity_and_learns():
    roles = (Role("student", encoder=True),)
    backbone = Tiny(
        TinyConfig(width=16, depth=2, heads=2, latent_channels=12, train="lora", base="random"), roles=roles
    )
    model, z = Model(backbone, roles[0]), torch.randn(2, 12, 4, 4)
    early, late = (torch.full((2,), t) for t in (0.1, 0.9))
    with torch.no_grad():
        assert torch.equal(model.adapt(z, early), z)
    optimizer = torch.optim.SGD(backbone.trained("student").values(), lr=1.0)
    for _ in range(3):  # the encoder's last layer starts at zero, and so does that of the LoRA after it
        optimizer.zero_grad()
        model.velocity(model.adapt(z, early), early, Condition(z, early)).square().mean().backward()
        optimizer.step()
    own = {n: p for n, p in backbone.trained("student").items() if n.startswith("parts.student.encoder.")}
    assert len(own) == 10 and all(p.grad is not None and p.grad.abs().max() > 0 for p in own.values())
    with torch.no_grad():
        assert not torch.equal(model.adapt(z, early), model.adapt(z, late))
        assert not torch.equal(model.adapt(z, early), z)
    with pytest.raises(ValueError, match="no encoder adapter"):
        Model(backbone, STUDENT).adapt(z, early)


def test_a_discriminator_begins_undecided_and_knows_the_time():
    roles = (STUDENT, Role("critic", branches="single", blocks=1, head=True))
    backbone = Tiny(
        TinyConfig(width=16, depth=2, heads=2, latent_channels=12, train="lora", base="random"), roles=roles
    )
    critic, z = Model(backbone, roles[1]), torch.randn(2, 12, 4, 6)
    with torch.no_grad():
        assert critic.logits(z, torch.ones(2)).shape == (2, 4, 6) and not critic.logits(z, torch.ones(2)).any()
        for p in backbone.net.parts["critic"]["head"].parameters():
            p.data.normal_(0, 0.3)
        early, late = (critic.logits(z, torch.full((2,), t)) for t in (0.1, 0.9))
    assert early.any() and not torch.allclose(early, late, atol=1e-3)


@pytest.mark.parametrize(
    ("role", "ask", "message"),
    [
        (STUDENT, lambda m, z, t: m.velocity(z, t), "dual-branch: its condition must contain z_lq and t_tar"),
        (STUDENT, lambda m, z, t: m.features(z, t), "dual-branch: features"),
        (STUDENT, lambda m, z, t: m.velocity(z, t, Condition(z, t, text=z)), "Tiny takes no text embedding"),
        (STUDENT, lambda m, z, t: m.velocity(z, t, Condition(z, t, guidance=7.5)), "guidance != 1 needs two prompts"),
        (
            Role("fake", branches="single"), lambda m, z, t: m.velocity(z, t, Condition(z, t)),
            "must contain neither z_lq nor t_tar",
        ),
        (Role("fake", branches="single"), lambda m, z, t: m.logits(z, t), "no head"),
        (Role("d", branches="single", blocks=1), lambda m, z, t: m.velocity(z, t), "features, not a velocity"),
    ],
)  # fmt: skip
def test_what_a_layout_does_not_take_is_an_error(role, ask, message):
    roles = (STUDENT,) if role == STUDENT else (STUDENT, role)
    backbone = Tiny(
        TinyConfig(width=16, depth=2, heads=2, latent_channels=12, train="lora", base="random"), roles=roles
    )
    with pytest.raises(ValueError, match=message):
        ask(Model(backbone, role), torch.randn(1, 12, 4, 4), torch.ones(1))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ((Role("teacher", trains="nothing"),), "the first role of a method must be named `student`"),
        ((STUDENT, STUDENT), "a unique name"),
        ((Role("student", branches="single", blocks=2),), "needs all blocks"),
    ],
)
def test_roles_that_cannot_live_together_are_refused(roles, message):
    with pytest.raises(ValueError, match=message):
        check_roles(roles)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Fake"}, "lower-case letters"),
        ({"name": "default"}, "do not use `default`"),
        ({"name": "d", "blocks": 2}, "single branch"),
        ({"name": "d", "branches": "single", "trains": "head"}, "head = False cannot be combined with trains = head"),
        ({"name": "d", "branches": "single", "head": True, "trains": "nothing"}, "head = True cannot be combined"),
        ({"name": "d", "rate": 0.0}, "must be > 0"),
    ],
)
def test_roles_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Role(**settings)


def test_a_base_that_is_trained_itself_carries_one_role(shards, tmp_path):
    config = parse(job(shards, tmp_path / "run", backbone__train="full", backbone__base=None))
    with pytest.raises(
        ValueError, match=r"backbone\.train = full trains the base that the roles student, critic, teacher share"
    ):
        Networks(config, config.build_method())


def test_a_role_sees_no_more_blocks_than_there_are(shards, tmp_path):
    config = parse(job(shards, tmp_path / "run", method={"critic_blocks": 3}))
    with pytest.raises(ValueError, match="role critic uses 3 blocks: this backbone allows 1 to 2"):
        Networks(config, config.build_method())


def test_several_roles_on_nvme_are_refused(shards, tmp_path):
    """Never tested: a sentence instead of gradients that may be wrong. With a copy each, only the disk is asked for."""
    settings = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())
    for part in ("offload_param", "offload_optimizer"):
        settings["zero_optimization"].get(part, {})["nvme_path"] = str(tmp_path / "none")
    (tmp_path / "nvme.json").write_text(json.dumps(settings))
    data = job(shards, tmp_path / "run", train__deepspeed=str(tmp_path / "nvme.json"))
    with pytest.raises(ValueError, match="the roles student, critic share an engine"):
        Trainer(parse(data))
    data["method"]["copies"] = True
    with pytest.raises(ValueError, match="is not a folder"):
        Trainer(parse(data))


def test_an_update_without_a_loss_for_a_trained_role_is_an_error(shards, tmp_path):
    """DeepSpeed would otherwise reuse an earlier gradient."""
    start([small_recipe(shards, tmp_path / "run", method={"name": "one_sided"}, **LORA)], tmp_path, 1)
    error = (tmp_path / "run/error.txt").read_text()
    assert "role critic: no loss of this update reached its parameter" in error


PRIOR = {"name": "tiny", "width": 128, "depth": 4, "heads": 4, "base": "small-prior", "train": "lora"}


class TestPrior:
    """A second base, `prior:`, which only the critic uses."""

    def config(self, shards, run_dir, **changes):
        sizes = {
            "backbone": {
                "name": "tiny",
                "width": 128,
                "depth": 4,
                "heads": 4,
                "lora_rank": 4,
                "base": "small-prior",
                "train": "lora",
            }
        }
        data = job(
            shards, run_dir, "zero3", method={"critic_base": "prior"}, train__updates=4, train__save_every_updates=2
        )
        return data | sizes | {"prior": PRIOR} | changes

    def test_it_trains_is_saved_and_resumes(self, shards, tmp_path):
        whole, halves = (self.config(shards, tmp_path / name) for name in ("whole", "halves"))
        first = json.loads(json.dumps(halves))
        first["train"]["updates"] = 2
        start([whole, first, halves], tmp_path, 1)
        assert not (tmp_path / "whole/error.txt").exists()
        folders = [tmp_path / name / "checkpoints/step-00000004" for name in ("whole", "halves")]
        for file in folders[0].glob("*.safetensors"):
            assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name
        assert all(".critic." in name for name in load_file(folders[0] / "weights-critic.safetensors"))
        # a zero head gives a probability of 1/2 to both classes
        assert rows(tmp_path / "whole")[0]["critic"] == pytest.approx(2 * math.log(2))

    def test_only_the_blocks_that_are_seen_are_held(self, shards, tmp_path):
        config = parse(self.config(shards, tmp_path / "run"))
        networks = Networks(config, config.build_method())
        assert len(networks.base("critic").net.blocks) == 1 and len(networks.student.net.blocks) == 4

    def test_a_codec_that_differs_is_refused(self, shards, tmp_path):
        other = {"name": "tiny", "width": 32, "depth": 2, "heads": 2, "base": "random", "train": "lora"}
        config = parse(self.config(shards, tmp_path / "run", backbone=other))
        networks = Networks(config, config.build_method())
        networks.student.fit(first_pairs(ShardSet.open(str(shards)), FIT_PAIRS))
        with pytest.raises(ValueError, match="trained with different codecs"):
            networks.share_codec()

    def test_a_section_that_lacks_or_is_of_no_use_is_named(self, shards, tmp_path):
        data = self.config(shards, tmp_path / "run")
        with pytest.raises(ValueError, match="config section prior is missing"):
            config = parse({k: v for k, v in data.items() if k != "prior"})
            Networks(config, config.build_method())
        data["method"] = {"name": "two_roles"}
        with pytest.raises(ValueError, match="unused: no role of method two_roles"):
            parse(data).build_method()
