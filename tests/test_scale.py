"""The scale as a setting: shards, training, checkpoint, restoring and benchmark at 1, 2 and 3, and every mismatch."""

import json

import numpy as np
import pytest
import skimage.data
from conftest import make_shards, small_recipe
from test_evaluation import benchmark
from test_training import start

from teasr import run_config
from teasr.data.pairs import from_folders
from teasr.data.prep.plan import PrepConfig
from teasr.data.prep.verifying import verify_set
from teasr.data.shards import ShardSet
from teasr.imaging import images
from teasr.restore.upscaler import Upscaler
from teasr.training.trainer import Trainer

SETS = {1: {"degradation": "noise"}, 2: {"degradation": "osediff"}, 3: {"degradation": "none"}}


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """{scale: (shards, run folder)} of trainings of two updates."""
    home, jobs, made = tmp_path_factory.mktemp("scales"), [], {}
    for scale, settings in SETS.items():
        shards = make_shards(photos, home / f"shards{scale}", scale=scale, crop_px=48, crops_per_photo=4, **settings)
        made[scale] = shards, home / f"run{scale}"
        changes = {"scale": scale, "train__updates": 2, "data__streams": 1, "preview": {"steps": [1]}}
        jobs.append(small_recipe(shards, made[scale][1], **changes))
    start(jobs, home, 1)
    return made


@pytest.mark.parametrize("scale", SETS)
def test_the_whole_chain(trained, scale, tmp_path):
    """Shards state their scale and verify; the model restores at its own scale and is scored on its own pairs."""
    shards, run = trained[scale]
    opened = ShardSet.open(str(shards))
    assert opened.scale == scale
    problems, _, _ = verify_set(shards, 1.0, 3, 1)
    assert not problems
    upscaler = Upscaler.from_pretrained(run)
    assert upscaler.scale == upscaler.descriptor.scale == scale
    lq = np.ascontiguousarray(skimage.data.astronaut()[100:140, 200:250])
    assert upscaler(lq).shape == (40 * scale, 50 * scale, 3)
    assert Upscaler.from_pretrained(upscaler.save_pretrained(tmp_path / "saved")).scale == scale
    code, _, err = benchmark(run, "--data", shards, "--steps", 1, "--metrics", "psnr", "--out", tmp_path / "out")
    assert code == 0, err
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["scale"] == scale and list(scores["methods"]) == ["input" if scale == 1 else "bicubic", "1 step"]
    if scale == 1:
        sheet = images.read_rgb(next((run / "previews").iterdir()))
        assert sheet.std() > 0


def test_every_mismatch_names_both_scales(trained, photos, tmp_path):
    (shards1, run1), (shards2, _) = trained[1], trained[2]

    def config(shards, **changes):
        return run_config.parse(small_recipe(shards, tmp_path / "run", data__streams=1, **changes))

    with pytest.raises(
        ValueError, match=r"data.shards = .*shards2 has scale 2, but the config has scale = 4: set scale=2"
    ):
        Trainer(config(shards2))
    with pytest.raises(ValueError, match=r"preview.shards = .*shards1 has scale 1, but the config has scale = 2"):
        Trainer(config(shards2, scale=2, preview={"shards": str(shards1)}))
    with pytest.raises(ValueError, match=r"shards1 has scale 1 and .*shards2 has scale 2"):
        ShardSet.open(str(shards1), str(shards2))
    (tmp_path / "BSD100").mkdir()
    for arguments, message in (
        ((run1, "--data", shards2), "shards2 has pairs of scale 2, but"),
        ((run1, "--data", "BSD100", "--data-root", tmp_path), "BSD100 has no degraded images for a model of scale 1"),
    ):
        code, _, err = benchmark(*arguments)
        assert code == 2 and message in err, err
    with pytest.raises(ValueError, match="config key scale = 5: must be one of 1, 2, 3, 4"):
        config(shards1, scale=5)
    for settings, message in (
        ({"scale": 5}, "scale = 5: must be one of 1, 2, 3, 4"),
        ({"scale": 1, "degradation": "none"}, "leaves the image as it is"),
        ({"scale": 3, "crop_px": 512}, "must be a positive multiple of scale = 3, such as 480"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepConfig(photos=str(photos), out=str(tmp_path), **settings)


def test_a_model_or_set_that_names_no_scale_has_scale_4(shards, tmp_path):
    """Those of older versions."""
    index = json.loads((shards / "index.json").read_text())
    del index["settings"]["scale"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert ShardSet.open(str(tmp_path)).scale == 4
    data = small_recipe(shards, tmp_path)
    data.pop("scale", None)
    assert run_config.parse(data).scale == 4


def test_pairs_of_a_folder_have_the_scale_of_the_model(tmp_path):
    for name, size in (("hq", 60), ("lq", 30)):
        (tmp_path / name).mkdir()
        x = np.ascontiguousarray(skimage.data.coffee()[:size, :size])
        (tmp_path / name / "a.png").write_bytes(images.png_bytes(x))
    assert next(iter(from_folders(tmp_path / "hq", tmp_path / "lq", 2)))[1]().scale == 2
    made = next(iter(from_folders(tmp_path / "hq", None, 3)))[1]()
    assert made.scale == 3 and made.lq.shape == (20, 20, 3)
    with pytest.raises(ValueError, match="must be 3 times those of"):
        next(iter(from_folders(tmp_path / "hq", tmp_path / "lq", 3)))[1]()
