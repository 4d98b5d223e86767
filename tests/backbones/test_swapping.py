"""swapping.py: swapped networks against resident ones, bit for bit, with a copier that is as late as it may be."""

import contextlib
import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, partitioning, small_recipe, velocity
from test_training import start
from torch import nn
from torch.utils.checkpoint import checkpoint

from teasr import run_config
from teasr.backbones.memory import quantised, swapping
from teasr.backbones.memory.swapping import Copier, HostArena, Ring, SwappedLinear, spaced
from teasr.backbones.model import Model
from teasr.backbones.qwen_image.backbone import QwenImage, QwenImageConfig
from teasr.data.batch import Batch
from teasr.methods.base import Progress
from teasr.training.engine import check_swap
from teasr.training.footprint import count, table
from teasr.util.randomness import Draws

BLOCKS = 5
SIZES = {
    "transformer": {
        "num_layers": BLOCKS, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 48, "axes_dims_rope": [8, 12, 12],
    },
    "vae": {"base_dim": 16, "num_res_blocks": 1},
}  # fmt: skip
COMMON = {"model": "random", "prompt": "random", "lora_rank": 2, "lora_alpha": 2, "modulation_table": 20} | SIZES
KINDS = [(None, "fp32"), (None, "bf16"), ("fp8", "bf16"), ("nf4", "bf16")]


class Late(Copier):
    """Copies only when a copy is waited for, and nothing else then; a slot to be refilled is NaN until that moment."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.pending = []

    def start(self, slot, source):
        self.copies += 1
        self.bytes += source.nbytes
        slot.fill_(0xFF)  # NaN in every dtype here; in nf4, of the scales
        self.pending.append((slot, source))
        return self.pending[-1]

    def wait(self, copy):
        slot, mine = copy[0], [c for c in self.pending if c[0] is copy[0]]
        if any(c is copy for c in mine):
            for _, source in mine[: next(i for i, c in enumerate(mine) if c is copy) + 1]:
                slot[: source.numel()].copy_(source)
        self.pending = [c for c in self.pending if c[0] is not slot]


def backbone(late=True, **changes):
    """A network with a LoRA that has an effect."""
    b = QwenImage(QwenImageConfig(**(COMMON | changes)))
    b.to(torch.device("cpu"))
    for name, p in b.net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    if b.ring and late:
        b.ring.copier = Late()
    return b


def inputs(seed=3):
    generator = torch.Generator().manual_seed(seed)
    z, z_lq = (torch.randn(2, 16, 4, 6, generator=generator) for _ in range(2))
    return z, torch.tensor([0.7, 0.25]), z_lq, torch.tensor([-0.7, 0.0])


def results(b):
    """Outputs and LoRA gradients of passes in every order that a method uses."""
    v = velocity(b, *inputs())
    with torch.no_grad():  # inside a live graph
        w = velocity(b, *inputs(4))
    (v - w).square().mean().backward()
    found = [v.detach(), w]
    v, u = velocity(b, *inputs()), velocity(b, *inputs(5))  # two graphs, one backward pass
    (v.square().mean() + u.square().mean()).backward()
    found += [v.detach(), u.detach()]
    return found + [p.grad for p in b.net.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def resident():
    return {kind: results(backbone(quantise=kind[0], dtype=kind[1])) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("swapped", "ring"), [(1, 2), (3, 1), (3, 2), (BLOCKS, 2), (BLOCKS, 3)])
def test_swapped_networks_are_bit_equal(resident, kind, swapped, ring):
    b = backbone(quantise=kind[0], dtype=kind[1], swap_blocks=swapped, swap_ring=ring)
    found, wanted = results(b), resident[kind]
    assert len(b.ring.slots) == min(ring, swapped) and b.ring.copier.copies >= swapped
    assert len(found) == len(wanted) > 20
    assert all(torch.equal(x, y) and torch.isfinite(x).all() for x, y in zip(found, wanted, strict=True))


def test_copies_are_counted():
    """A turn-around copies nothing, and a pass without a graph fetches the first block of the next pass."""
    b = backbone(swap_blocks=BLOCKS, dtype="fp32")
    copier = b.ring.copier
    v = velocity(b, *inputs())
    assert copier.copies == BLOCKS
    v.mean().backward()  # the last two and, afterwards, the first two are in the ring
    assert copier.copies == BLOCKS + 3
    with torch.no_grad():
        velocity(b, *inputs())
    assert copier.copies == BLOCKS + 3 + 3 + 1
    velocity(b, *inputs())
    assert copier.copies == BLOCKS + 3 + 4 + 4
    assert copier.bytes == copier.copies * b.ring.blocks[0].source.nbytes


class Stream:
    """Stands in for a CUDA stream: it writes down what it is asked to do."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for what {other.name} has queued")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"the copy on {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_streams_and_events_come_in_the_right_order(monkeypatch):
    """A copy waits for the computation queued so far, and the computation queued later waits for the copy."""
    log, stack = [], []
    stack.append(Stream("main", log))
    side = Stream("side", log)

    @contextlib.contextmanager
    def on(stream):
        stack.append(stream)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stack[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    copier = Copier(torch.device("cuda"))
    monkeypatch.setattr(copier, "_copy", lambda slot, source: log.append(f"copy on {stack[-1].name}"))
    copier.wait(copier.start(torch.zeros(4), torch.ones(4)))
    assert log == [
        "side waits for what main has queued", "copy on side", "side records", "main waits for the copy on side",
    ]  # fmt: skip


def test_a_skipped_visit_raises():
    b = backbone(swap_blocks=BLOCKS, dtype="fp32")
    b.net.transformer.transformer_blocks[2].fetch = None
    with pytest.raises(RuntimeError, match="not on the device"):
        velocity(b, *inputs())


def test_only_the_block_asked_for_last_can_be_read():
    """Even if the weights of another one are in a slot, because the next copy may overwrite them at any time."""
    b = backbone(swap_blocks=BLOCKS, dtype="fp32")
    layers = [block.layers[0] for block in b.ring.blocks]
    for i in (0, 1):
        b.ring.need(i)
        assert torch.isfinite(layers[i].weight_in(torch.float32)).all()
    for i in (0, 2):
        with pytest.raises(RuntimeError, match="not on the device"):
            layers[i].weight_in(torch.float32)


class Residual(nn.Module):
    """A block whose Linear is the last operation before the sum: nothing saved lies behind it in the backward pass."""

    fetch = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        self.fetch()
        return x + self.linear(x)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_product_without_saved_tensors_waits_for_its_block(size):
    torch.manual_seed(0)
    blocks = [Residual() for _ in range(7)]
    x = torch.randn(3, 8, requires_grad=True)
    y = x
    for block in blocks:
        y = y + block.linear(y)
    (wanted,) = torch.autograd.grad(y.square().sum(), x)
    ring = Ring(size, torch.device("cpu"), Late())
    for block in blocks:
        block.fetch = ring.take(block, quantised.FullLinear)
    ring.allocate()
    z = x
    for block in blocks:
        z = checkpoint(block, z, use_reentrant=False)
    (found,) = torch.autograd.grad(z.square().sum(), x)
    assert torch.equal(y, z) and torch.equal(found, wanted)


@pytest.mark.parametrize("kind", [None, "fp8", "nf4"])
def test_swapped_weights_are_invisible_to_modules(kind):
    """Neither parameters nor buffers hold them, so moving, sharding and saving a network does not touch them."""
    b = backbone(quantise=kind, swap_blocks=BLOCKS, dtype="fp32")
    layers = [m for m in b.net.modules() if isinstance(m, SwappedLinear)]
    assert len(layers) == BLOCKS * 12
    seen = {x.untyped_storage().data_ptr() for x in (*b.net.parameters(), *b.net.buffers())}
    memory = [*(block.source for block in b.ring.blocks), *b.ring.slots]
    assert not seen & {x.untyped_storage().data_ptr() for x in memory}
    frozen = sum(p.numel() for n, p in b.net.transformer.transformer_blocks.named_parameters() if "lora_" not in n)
    assert frozen == BLOCKS * 4 * 32  # norms
    v = velocity(b, *inputs())
    b.to(torch.device("cpu"))
    b.net.to(torch.device("cpu"))
    assert torch.equal(velocity(b, *inputs()), v)
    with pytest.raises(ValueError, match="cannot be moved"):
        b.to(torch.device("meta"))


def test_blocks_are_spaced_evenly():
    assert spaced(1, 60) == [30] and spaced(4, 60) == [7, 22, 37, 52] and spaced(5, 5) == [0, 1, 2, 3, 4]
    for n in range(61):
        chosen = spaced(n, 60)
        assert len(set(chosen)) == n and all(0 <= i < 60 for i in chosen)


def test_mistakes_name_the_cure():
    for changes, message in [
        ({"swap_blocks": BLOCKS + 1}, f"only {BLOCKS} blocks"),
        ({"swap_blocks": 1, "gradient_checkpointing": False}, r"gradient_checkpointing=true"),
        ({"swap_blocks": 1, "compile": True}, r"compile=false"),
        ({"swap_blocks": -1}, ">= 0"),
        ({"swap_blocks": 1, "swap_ring": 0}, ">= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbone(**changes)
    with pytest.raises(ValueError, match="ZeRO-3"):
        check_swap({"zero_optimization": {"stage": 3}}, QwenImage(QwenImageConfig(**COMMON, swap_blocks=1)))
    saved = QwenImageConfig(**COMMON, swap_blocks=1)
    assert QwenImage.inference_config(saved, None, Path("none")).swap_blocks == 0


def test_host_memory_is_locked_at_its_exact_size(monkeypatch):
    """Regression test: the modulation table locked twice its size, because PyTorch rounds up to a power of two."""
    locked = {}
    monkeypatch.setattr(swapping, "_register", lambda region: locked.update({region.data_ptr(): region.nbytes}) or 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: type("", (), {"cudaHostUnregister": locked.pop}))
    arena = HostArena(torch.device("cuda"))
    a, b = arena.empty((5, 70, 300), torch.bfloat16), arena.empty((9,), torch.float32)
    assert a.shape == (5, 70, 300) and a.dtype == torch.bfloat16 and b.shape == (9,)
    assert sorted(locked.values()) == [4096, 212_992] and all(start % 4096 == 0 for start in locked)
    assert HostArena.locked_bytes == 4096 + 212_992
    a.fill_(1)
    b.fill_(2)
    assert (a == 1).all() and (b == 2).all()
    del arena
    assert not locked and HostArena.locked_bytes == 0
    monkeypatch.setattr(swapping, "_register", lambda region: 304)
    monkeypatch.setattr(swapping, "_clear_error", lambda device: None)
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="CUDA error 304"), pytest.raises(ValueError, match="ulimit -l unlimited"):
            HostArena(torch.device("cuda")).empty((5,), torch.float32)


def test_dry_run_counts_host_memory_slots_and_copied_bytes():
    """The bytes copied in an update are those that a real update copies."""
    changes = {"name": "qwen_image", "quantise": "nf4", "swap_blocks": 4}
    settings = run_config.parse(
        {
            "run_dir": "unused",
            "backbone": COMMON | {"modulation_table": 1000} | changes,
            "method": {"name": "teasr", "lambda_lpips": 0.0},
            "data": {"shards": "unused"},
            "train": {"updates": 5, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3},
        }
    )
    counted = count(settings, {"zero_optimization": {"stage": 1}}, 32)
    method, network = settings.build_method(), settings.build_backbone()
    network.to(torch.device("cpu"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    for loss in method.losses({"student": Model(network)}, Batch(x, x, ["", ""]), Draws(0, 0, (0, 1)), Progress(4, 5)):
        loss.value.backward()
        del loss
    one = network.ring.blocks[0].source.nbytes
    assert counted.copied == network.copied_bytes >= 4 * 4 * one
    assert counted.host["swapped blocks"] == 4 * one and counted.gpu["slots for swapped blocks"] == 2 * one
    assert "copied from host memory to the GPU in one update" in table(counted)
    with pytest.raises(ValueError, match="ZeRO-3"):
        count(settings, {"zero_optimization": {"stage": 3}}, 32)


def test_training_is_bit_equal_under_zero_1_2_and_offload(shards, tmp_path):
    """Weights, moments and average after whole updates; a run resumes with another number of swapped blocks."""
    base = COMMON | {"name": "qwen_image", "modulation_table": 1000}
    base["transformer"] = SIZES["transformer"] | {"num_layers": 3}

    def job(name: str, stage: str, updates: int, swapped: int) -> dict:
        changes = {"train__deepspeed": str(partitioning(stage, tmp_path)), "train__updates": updates, "train__batch": 2}
        return small_recipe(shards, tmp_path / name, backbone=base | {"swap_blocks": swapped}, **changes)

    updates = {"zero1": 2, "zero2": 1, "zero2_offload": 1}
    jobs = [job(f"{stage}-{n}", stage, updates[stage], n) for stage in updates for n in (0, 3)]
    jobs += [job("zero1-resumed", "zero1", 1, 1), job("zero1-resumed", "zero1", 2, 2), job("zero3", "zero3", 1, 1)]
    start(jobs, tmp_path, 1)
    for stage, ours in (("zero1", "3"), ("zero2", "3"), ("zero2_offload", "3"), ("zero1", "resumed")):
        for name in ("weights", "optimiser", "ema"):
            checkpoint = f"checkpoints/step-0000000{updates[stage]}/{name}.safetensors"
            files = [tmp_path / f"{stage}-{kind}" / checkpoint for kind in ("0", ours)]
            assert files[0].read_bytes() == files[1].read_bytes(), (stage, ours, name)
    assert losses(tmp_path / "zero1-3") == losses(tmp_path / "zero1-0")
    assert "ZeRO-3" in (tmp_path / "zero3/error.txt").read_text()


def losses(run):
    with open(run / "metrics.csv") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def test_the_self_check_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import swap_check

    assert swap_check.main(["--device", "cpu", "--tiny", "--kinds", "bf16", "nf4", "--rings", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    cases = [line for line in lines if line["case"].startswith("swap")]
    assert len(cases) == 2 and all(line["output"] == line["gradient"] == 0.0 for line in cases)
