"""preview.py: a preview shows what the checkpoint restores and does not affect training.

Its score selects the best checkpoint.
"""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, make_shards, partitioning, small_recipe
from PIL import Image
from safetensors.torch import load_file
from test_training import start

from teasr.config.settings import PreviewConfig
from teasr.data.shards import ShardSet
from teasr.imaging.exact_metrics import psnr
from teasr.restore.upscaler import Upscaler
from teasr.training.preview import Preview
from teasr.util import checkpoint_folder
from teasr.util.seed import seed_of

UPDATES = 8


@pytest.fixture(scope="module")
def heldout(photos, tmp_path_factory):
    return make_shards(photos, tmp_path_factory.mktemp("heldout"), crop_px=72, layout="grid", seed=5)


@pytest.fixture(scope="module")
def runs(shards, heldout, tmp_path_factory):
    """Runs without previews and with them, on one and two ranks.

    The stages differ, and small parameters are partitioned or, as by default, not.
    """
    folder = tmp_path_factory.mktemp("previews")
    stages = {"zero1": ROOT / "ds_configs/zero1.json", "zero3": ROOT / "ds_configs/zero3.json"}
    stages["pieces"] = partitioning("zero3_offload", folder)
    common = {"train__updates": UPDATES, "train__save_every_updates": 2, "train__keep_checkpoints": 1}
    preview = {"shards": str(heldout), "pictures": 3, "steps": [1, 3], "every_updates": 2}

    def job(name, **changes):
        return small_recipe(
            shards, folder / name, **common, train__deepspeed=str(stages[name.split("-")[0]]), **changes
        )

    start([job("zero3-off"), *(job(name, preview=preview) for name in stages)], folder, 1)
    start([job("zero3-two", preview=preview)], folder, 2)
    return folder


def scores(run):
    return {
        int(row["update"]): {k: float(v) for k, v in row.items() if k.startswith("preview/") and v}
        for row in csv.DictReader(open(run / "metrics.csv"))
    }


def test_previews_change_nothing(runs):
    """The weights are bit-identical, also under ZeRO-3, where small parameters are kept whole."""
    newest = [checkpoint_folder.latest(runs / name / "checkpoints") for name in ("zero3-off", "zero3")]
    for file in ("weights.safetensors", "ema.safetensors", "optimiser.safetensors"):
        assert (newest[0] / file).read_bytes() == (newest[1] / file).read_bytes()
    assert not (runs / "zero3-off/previews").exists()


@pytest.mark.parametrize("name", ["zero3", "pieces", "zero3-two"])
def test_every_stage_shows_the_same(runs, name):
    """Also checks that the averaged weights are shown.

    A stale whole copy of a parameter would show those of another update.
    """
    reference, found = scores(runs / "zero1"), scores(runs / name)
    assert sorted(reference) == list(range(UPDATES + 1)) == sorted(found)
    for update, values in reference.items():
        assert bool(values) == (update % 2 == 0)
        for key, value in values.items():
            assert found[update][key] == pytest.approx(value, abs=2e-3), (update, key)


def test_it_shows_what_the_checkpoint_restores(runs, heldout):
    run = runs / "zero3"
    newest = checkpoint_folder.latest(run / "checkpoints")
    upscaler = Upscaler.from_pretrained(newest)
    preview = Preview(PreviewConfig(shards=str(heldout), pictures=3, steps=(1, 3)), ShardSet.open(str(heldout)), 0)
    assert len({sample.key for sample in preview.samples}) == 3
    made = [upscaler(s.lq, steps=3, seed=seed_of(0, "preview", s.key)) for s in preview.samples]
    mean = np.mean([psnr(x, s.hq) for x, s in zip(made, preview.samples, strict=True)])
    assert scores(run)[UPDATES]["preview/psnr_y_3"] == pytest.approx(mean, abs=1e-3)
    sheets = sorted((run / "previews").iterdir())
    assert [p.name for p in sheets] == [f"update-{n:08d}.png" for n in range(0, UPDATES + 1, 2)]
    assert len({p.read_bytes() for p in sheets}) == len(sheets)
    sheet = np.asarray(Image.open(sheets[-1]))
    first_lq = np.kron(preview.samples[0].lq_up, np.ones((3, 3, 1), np.uint8))  # 72 px, enlarged three times
    assert np.array_equal(sheet[22 : 22 + 216, :216], first_lq)


def test_the_best_checkpoint_is_kept_beside_the_newest(runs):
    run = runs / "zero1"
    by_update = {update: values["preview/psnr_y_1"] for update, values in scores(run).items() if values and update}
    best = max(by_update, key=by_update.get)
    proven = UPDATES - 2  # the newest checkpoint after which an update was seen to be finite
    names = {f"step-{n:08d}" for n in (best, proven, UPDATES)}
    assert {p.name for p in (run / "checkpoints").glob("step-*")} == names
    link = run / "checkpoints/best"
    assert link.resolve().name == f"step-{best:08d}"
    state = json.loads((link / "state.json").read_text())
    assert state["update"] == best and state["score"] == pytest.approx(by_update[best], rel=1e-6)
    loaded = dict(Upscaler.from_pretrained(link, weights="weights").backbone.net.named_parameters())
    assert all(torch.equal(loaded[name], x) for name, x in load_file(link / "weights.safetensors").items())


def test_training_pictures_choose_no_best(shards):
    opened = ShardSet.open(str(shards))
    assert Preview(PreviewConfig(pictures=2), opened, 0).score is None
    assert len(Preview(PreviewConfig(pictures=100), opened, 0).samples) == len(opened) == 48


def test_mistakes_are_named(shards, heldout, tmp_path):
    with pytest.raises(ValueError, match=r"preview\.pictures = 0"):
        PreviewConfig(pictures=0)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    rows = []
    for source in (shards, heldout):
        index = json.loads((source / "index.json").read_text())
        for row in index["shards"][:1]:
            rows.append(row | {"shard": f"{source.name}-{row['shard']}"})
            (mixed / rows[-1]["shard"]).write_bytes((source / row["shard"]).read_bytes())
    settings = {key: value for key, value in index["settings"].items() if key != "crop_px"}
    (mixed / "index.json").write_text(json.dumps(index | {"shards": rows, "settings": settings}))
    with pytest.raises(ValueError, match="images of one size"):
        Preview(PreviewConfig(shards=str(mixed), pictures=100), ShardSet.open(str(shards)), 0)
