"""`Upscaler`: every kind of picture gives the same pixels; devices that the machine lacks are explained."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from teasr import TeasrPipeline, Upscaler
from teasr.restore import pretrained
from teasr.run_config import BACKBONES


@pytest.fixture(scope="module")
def upscaler():
    return Upscaler.from_pretrained("small", device="cpu")


def test_paths_pictures_arrays_and_tensors_give_the_same_pixels(upscaler, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    file = tmp_path / "x.png"
    Image.fromarray(x).save(file)
    expected = upscaler(x)
    for given in (file, str(file), Image.open(file)):
        made = upscaler(given)
        assert isinstance(made, Image.Image) and np.array_equal(np.asarray(made), expected)
    tensor = upscaler(torch.from_numpy(x).permute(2, 0, 1) / 255)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(np.rint(tensor.permute(1, 2, 0).numpy() * 65535), upscaler(x.astype(np.uint16) * 257))


def test_files_that_cannot_be_restored_are_named(upscaler, tmp_path):
    with pytest.raises(ValueError, match=r"none\.png"):
        upscaler(tmp_path / "none.png")
    deep = np.full((16, 16, 3), 40000, np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    with pytest.raises(ValueError, match=r"deep\.png has colours of 16 bits.*teasr upscale"):
        upscaler(tmp_path / "deep.png")
    cv2.imwrite(str(tmp_path / "grey.png"), deep[..., 0])
    assert upscaler(tmp_path / "grey.png").mode == "I;16"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_an_apple_gpu_that_is_not_there_is_explained():
    with pytest.raises(ValueError, match="device mps: no Apple GPU is available"):
        Upscaler.from_pretrained("small", device="mps")
    with pytest.raises(ValueError, match="device mps: no Apple GPU is available"):
        TeasrPipeline.from_pretrained("small", device="cpu").to("mps")


def test_a_device_that_does_not_exist_is_explained():
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"device {name}: use cpu, cuda, cuda:1 or mps"):
            Upscaler.from_pretrained("small", device=name)


def test_an_apple_gpu_is_used_or_refused(monkeypatch):
    """Without one, the device is only chosen. Backbones on diffusers have never run on one."""
    assert {name: "mps" in load()[1].devices for name, load in BACKBONES.items()} == {
        "tiny": True, "unet": True, "qwen_image": False, "sd3": False, "z_image": False, "sd_unet": False,
        "pixel_cnn": True,
    }  # fmt: skip
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pretrained.pick_device("mps") == torch.device("mps")
