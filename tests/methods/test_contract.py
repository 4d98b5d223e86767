"""A method unlike TEASR trains, previews, saves, resumes and restores without any code for it outside its own file."""

import numpy as np
import prototypes  # noqa: F401 - registers the method
import pytest
import skimage.data
from conftest import partitioning, small_recipe
from safetensors.torch import load_file
from test_training import rows, start

from teasr.restore.upscaler import Upscaler
from teasr.run_config import parse
from teasr.training.networks import Networks
from teasr.training.trainer import Trainer

LQ = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:260])


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """Six updates without a break under ZeRO-3, and three and three more."""
    folder = tmp_path_factory.mktemp("timed")
    common = {
        "method": {"name": "timed"}, "backbone__train": "lora", "backbone__base": "random",
        "train__save_every_updates": 3, "train__deepspeed": str(partitioning("zero3", folder)),
        "train__learning_rate": 1e-2, "preview": {"pictures": 1, "steps": [1]},
    }  # fmt: skip
    jobs = [
        small_recipe(shards, folder / name, train__updates=n, **common)
        for name, n in (("whole", 6), ("halves", 3), ("halves", 6))
    ]
    start(jobs, folder, 1)
    return folder


def test_it_trains_and_resumes_to_the_same_bits(trained):
    whole, halves = (trained / name / "checkpoints/step-00000006" for name in ("whole", "halves"))
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (halves / file.name).read_bytes(), file.name
    assert {"weights.safetensors", "weights-fake.safetensors"} <= {p.name for p in whole.iterdir()}
    assert not any("real" in p.name for p in whole.iterdir())  # frozen roles are not in a checkpoint
    assert (trained / "whole/previews/update-00000006.png").is_file()
    assert {"mse", "fake", "grad_norm/student", "grad_norm/fake"} <= set(rows(trained / "whole")[-1])
    encoder = {n: x for n, x in load_file(whole / "ema.safetensors").items() if ".encoder." in n}
    assert encoder and all(x.any() for n, x in encoder.items() if "last" in n)


def test_its_student_restores_with_its_own_dial_whole_and_in_tiles(trained, tmp_path):
    upscaler = Upscaler.from_pretrained(trained / "whole")
    assert upscaler.descriptor.step_counts == (1,) and [dial.name for dial in upscaler.descriptor.dials] == ["strength"]
    faithful, default, realistic = (upscaler(LQ, dials=d) for d in ({"strength": 0.05}, None, {"strength": 0.95}))
    assert faithful.shape == (160, 240, 3) and not np.array_equal(faithful, realistic)
    assert np.array_equal(default, upscaler(LQ, dials={"strength": 0.6}))
    assert np.array_equal(default, upscaler(LQ, seed=1))  # the method uses no noise
    tiles = upscaler(LQ, tile_px=104)
    assert (
        np.abs(tiles.astype(float) - default).mean() < 4
    )  # not equal: attention sees other tokens in a tile, and training was short
    saved = upscaler.save_pretrained(tmp_path / "saved")
    assert np.array_equal(Upscaler.from_pretrained(saved)(LQ), default)
    assert {p.name for p in saved.glob("*.safetensors")} == {"ema.safetensors", "fixed.safetensors"}


def test_what_it_cannot_do_is_said(trained, shards, tmp_path):
    upscaler = Upscaler.from_pretrained(trained / "whole")
    with pytest.raises(ValueError, match=r"restores in 1 step\(s\)"):
        upscaler(LQ, steps=4)
    with pytest.raises(ValueError, match="no setting fidelity: its settings are strength"):
        upscaler(LQ, fidelity=0.5)
    with pytest.raises(ValueError, match="steps = auto"):
        upscaler(LQ, steps="auto")
    data = small_recipe(shards, tmp_path / "run", method={"name": "timed"}, preview={"steps": [1, 4]})
    with pytest.raises(ValueError, match="steps = 4"):
        Trainer(parse(data))


def test_restoring_builds_the_student_alone(trained):
    config = parse(
        small_recipe("unused", trained / "x", method={"name": "timed"}, backbone__train="lora", backbone__base="random")
    )
    all_roles = Networks(config, config.build_method()).student
    alone = Upscaler.from_pretrained(trained / "whole").backbone
    assert not any(".fake." in n for n, _ in alone.net.named_parameters())
    assert any(".fake." in n for n, _ in all_roles.net.named_parameters())
