"""sweeps.py: updates of TEASR in block-major order against the order of its losses."""

from typing import ClassVar

import pytest
import torch
from conftest import partitioning, small_recipe
from large import CASES
from test_generic import build
from test_swapping import BLOCKS, COMMON, KINDS, SIZES, Late, backbone
from test_training import rows, start

from teasr import run_config
from teasr.backbones.memory import checkpoints
from teasr.backbones.memory.quantised import Fp8Linear, QuantisedLinear
from teasr.backbones.model import Condition, Model
from teasr.backbones.qwen_image.transformer import DualBranchBlock
from teasr.backbones.roles import STUDENT
from teasr.backbones.tiny import Tiny, TinyConfig
from teasr.data.batch import Batch
from teasr.methods.base import Progress
from teasr.methods.teasr import Teasr, TeasrConfig
from teasr.training.engine import check_swap
from teasr.training.footprint import count
from teasr.util.randomness import Draws

PLAIN = {"lambda_lpips": 0.0, "ramps": {}}
OPTIONS = [
    {},
    {"lambda_restart": 1.0},
    {"lambda_rectify": 0.0, "lambda_mse": 0.0},
    {"lambda_rectify": 0.0, "lambda_adv": 0.0},
    {"lambda_cons": 0.0},
    {"lambda_flow": 0.0},
]


class OneByOne(Model):
    """A model that computes the pictures of larger batches in pairs: the bits then do not depend on the batch."""

    def velocity(self, z_t, t_cur, condition):
        parts = [
            super(OneByOne, self).velocity(z, t, Condition(z_lq, t_tar))
            for z, t, z_lq, t_tar in zip(
                *(x.split(2) for x in (z_t, t_cur, condition.z_lq, condition.t_tar)), strict=True
            )
        ]
        return torch.cat(parts)


def made(name, double, **changes):
    """A network whose LoRA has an effect."""
    if name == "qwen_image":
        b = backbone(modulation_table=1000, **({"dtype": "fp32"} | changes))
        table = b.net.transformer.modulation
        if double:
            table.image, table.text = table.image.double(), table.text.double()
    else:
        b = build(name, roles=(STUDENT,), **changes)
        if b.ring:
            b.ring.copier = Late()
    if double:
        b.net.double()
        b.codec.double()
    return b


def update(order, options=None, double=False, model=OneByOne, name="qwen_image", **changes):
    """Gradients and logs of an update of two pictures, and the network."""
    b = made(name, double, **changes)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 2, 3, 32, 32, generator=generator, dtype=torch.float64 if double else torch.float32) * 2 - 1
    method = Teasr(TeasrConfig(**PLAIN, order=order, **(options or {})))
    logs = {}
    for loss in method.losses({"student": model(b)}, Batch(*x, ["", ""]), Draws(0, 4, (0, 1)), Progress(4, 5)):
        (loss.value / 3).backward()
        logs |= loss.logs
        del loss
    return {n: p.grad for n, p in b.net.named_parameters() if p.grad is not None} | logs, b


def equal(found, wanted):
    assert found.keys() == wanted.keys() and len(found) > 50
    assert sum(g.abs().max() > 1e-6 for g in wanted.values()) > 50
    return all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_the_order_of_losses(options):
    """Difference 0.0 in float64; only the restart loss is added in another place of the sum."""
    found, wanted = (update(order, options, double=True)[0] for order in ("blocks", "losses"))
    if "lambda_restart" in options:
        assert max((found[n] - wanted[n]).abs().max().item() for n in wanted) < 1e-16
    else:
        assert equal(found, wanted)
    batched = update("losses", options, double=True, model=Model)[0]
    assert max((found[n] - batched[n]).abs().max().item() for n in batched) < 1e-16


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_and_quantised_networks_are_bit_equal(kind):
    common = {"quantise": kind[0], "dtype": kind[1]}
    wanted, _ = update("losses", **common)
    for swapped, ring in ((0, 2), (3, 1), (BLOCKS, 2), (BLOCKS, 3)):
        found, b = update("blocks", swap_blocks=swapped, swap_ring=ring, **common)
        assert equal(found, wanted), (swapped, ring)
        assert not swapped or b.ring.copier.copies <= 3 * swapped + 1


@pytest.mark.parametrize("name", sorted(CASES))
def test_other_backbones(name):
    """Difference 0.0 in float64, and with swapped blocks, fp8 and checkpoints in host memory."""
    assert equal(*(update(order, double=True, name=name)[0] for order in ("blocks", "losses")))
    wanted, _ = update("losses", name=name, quantise="fp8", dtype="bf16")
    found, b = update("blocks", name=name, quantise="fp8", dtype="bf16", swap_blocks=3, host_checkpoints=True)
    assert equal(found, wanted)
    assert b.ring.copier.copies <= 3 * 3 + 1 and b.checkpoint_bytes > 0


def test_weights_are_copied_and_expanded_three_times(monkeypatch):
    calls, plain = [], Fp8Linear.weight_in
    monkeypatch.setattr(Fp8Linear, "weight_in", lambda self, dtype: calls.append(self) or plain(self, dtype))
    counts = {}
    for order in ("losses", "blocks"):
        calls.clear()
        _, b = update(order, quantise="fp8", swap_blocks=BLOCKS, model=Model)
        counts[order] = b.ring.copier.copies, max(calls.count(layer) for layer in calls)
    assert counts["blocks"] == (3 * BLOCKS, 3)
    assert counts["losses"][0] > 7 * BLOCKS and counts["losses"][1] == 2 * 14  # for noise and condition tokens
    assert all(m.kept is None for m in b.net.modules() if isinstance(m, QuantisedLinear))


class InOrder(Late):
    """Copies only when a copy is waited for, with all that were begun before it, as one stream does."""

    begun: ClassVar[dict[int, int]] = {}  # copy -> blocks computed before
    ahead: ClassVar[list[bool]] = []  # of each wait: whether a block has computed since its copy was begun
    computed = 0

    def start(self, slot, source):
        copy = super().start(slot, source)
        self.begun[id(copy)] = InOrder.computed
        return copy

    def wait(self, copy):
        self.ahead.append(InOrder.computed > self.begun[id(copy)])
        position = next((i for i, c in enumerate(self.pending) if c is copy), -1)
        for slot, source in self.pending[: position + 1]:
            slot[: source.numel()].copy_(source)
        self.pending = self.pending[position + 1 :]


@pytest.mark.parametrize("order", ["losses", "blocks"])
def test_checkpoints_in_host_memory_change_no_bit(order, monkeypatch):
    """With copies as late as they may be, to the host and back, which are begun a block before they are needed."""
    wanted, _ = update(order)
    compute = DualBranchBlock.compute

    def counted(*arguments, **others):
        InOrder.computed += 1
        return compute(*arguments, **others)

    monkeypatch.setattr(checkpoints, "Copier", lambda device: InOrder())
    monkeypatch.setattr(InOrder, "ahead", [])
    monkeypatch.setattr(DualBranchBlock, "compute", counted)
    found, b = update(order, host_checkpoints=True, swap_blocks=3)
    assert equal(found, wanted)
    turns = {"losses": 4, "blocks": 1}[order]  # where nothing is known ahead
    assert InOrder.ahead.count(False) == turns * 3 and len(InOrder.ahead) == 4 * 3 * BLOCKS
    store = b.net.transformer.checkpoints
    alive = sum(len(buffers) * n for (shape, dtype), buffers in store.free.items() for n in [shape.numel() * 4])
    assert alive == store.host_bytes == b.checkpoint_bytes > 0  # all buffers are free again
    graphs = {"losses": 1, "blocks": 4}[order]
    tokens = 2 * 64 * (4 + 5 + 4) * 4  # bytes of two pictures: width, noise, text and condition tokens
    assert store.host_bytes == graphs * BLOCKS * tokens and store.copied_bytes == 4 * BLOCKS * tokens


def test_mistakes_name_the_cure():
    method = Teasr(TeasrConfig(**PLAIN, order="blocks"))
    for b in (Tiny(TinyConfig()), backbone(gradient_checkpointing=False), backbone(compile=True)):
        with pytest.raises(ValueError, match=r"method\.order=losses"):
            method.check_models({"student": Model(b)})
    with pytest.raises(ValueError, match=r"zero1\.json"):
        check_swap({"zero_optimization": {"stage": 3}}, backbone(), by_block=True)


def test_dry_run_counts_copies_and_activations():
    """The bytes copied in an update are those that a real one copies."""
    counted = {}
    for order in ("losses", "blocks"):
        settings = run_config.parse(
            {
                "run_dir": "unused",
                "backbone": COMMON | {"name": "qwen_image", "modulation_table": 1000, "swap_blocks": BLOCKS},
                "method": {"name": "teasr", "order": order} | PLAIN,
                "data": {"shards": "unused"},
                "train": {"updates": 5, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3},
            }
        )
        counted[order] = count(settings, {"zero_optimization": {"stage": 1}}, 32)
    b = update("blocks", dtype="bf16", swap_blocks=BLOCKS)[1]
    assert counted["blocks"].copied == b.copied_bytes == 3 * BLOCKS * b.ring.blocks[0].source.nbytes
    assert counted["blocks"].copied < 0.45 * counted["losses"].copied
    assert list(counted["blocks"].flops) == ["all"]
    assert sum(counted["blocks"].flops.values()) == pytest.approx(sum(counted["losses"].flops.values()), rel=0.02)


def test_training_under_zero_1_2_and_offload(shards, tmp_path):
    """Whole updates agree up to rounding with those in the order of losses, and bit for bit across stages."""
    base = COMMON | {"name": "qwen_image", "modulation_table": 1000, "dtype": "fp32"}
    base["transformer"] = SIZES["transformer"] | {"num_layers": 3}

    def job(name, stage, order, swapped):
        changes = {"train__deepspeed": str(partitioning(stage, tmp_path)), "train__updates": 2, "train__batch": 2}
        changes |= {"method__order": order}
        return small_recipe(shards, tmp_path / name, backbone=base | {"swap_blocks": swapped}, **changes)

    stages = ("zero1", "zero2", "zero2_offload")
    start(
        [job("losses", "zero1", "losses", 0)] + [job(s, s, "blocks", 3 * (n > 0)) for n, s in enumerate(stages)],
        tmp_path,
        1,
    )
    wanted = rows(tmp_path / "losses")
    for stage in stages:
        for x, y in zip(rows(tmp_path / stage), wanted, strict=True):
            assert {name: x[name] for name in ("loss", "grad_norm")} == {
                name: pytest.approx(y[name], rel=1e-5) for name in ("loss", "grad_norm")
            }
    assert rows(tmp_path / "zero1") == rows(tmp_path / "zero2")
