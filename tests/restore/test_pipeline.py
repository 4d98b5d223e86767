"""pipeline.py: behaves as users of diffusers expect of a pipeline."""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from teasr import Upscaler
from teasr.restore.pipeline import TeasrPipeline

PHOTO = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:256])  # 56 x 40
PIL = Image.fromarray(PHOTO)


@pytest.fixture(scope="module")
def pipe(untrained):
    pipe = TeasrPipeline.from_pretrained(untrained)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded():
    return torch.Generator().manual_seed(3)


def test_pictures_lists_arrays_and_tensors(pipe, untrained):
    wanted = Upscaler.from_pretrained(untrained)(PHOTO, steps=2, seed=3)
    (made,) = pipe(PIL, 2, seeded()).images
    assert np.array_equal(np.asarray(made), wanted)
    two = pipe([PIL, PIL.convert("RGBA")], 2, [seeded(), seeded()]).images
    assert [x.mode for x in two] == ["RGB", "RGBA"] and np.array_equal(np.asarray(two[0]), wanted)
    as_array = pipe(np.stack([PHOTO, PHOTO]), 2, [seeded(), seeded()], output_type="np").images
    assert as_array.shape == (2, 160, 224, 3) and np.allclose(as_array[1], wanted / 255, atol=1e-6)
    floats = pipe(PHOTO / 255.0, 2, seeded(), output_type="pil").images[0]
    assert np.abs(np.asarray(floats).astype(int) - wanted).max() <= 1
    x = torch.from_numpy(PHOTO).permute(2, 0, 1)[None] / 255
    (made,) = pipe(x, 2, seeded(), output_type="pt", return_dict=False)
    assert made.shape == (1, 3, 160, 224) and np.abs(made[0].permute(1, 2, 0).numpy() * 255 - wanted).max() < 1.5
    (small,) = pipe(PIL, height=100, width=150).images
    assert small.size == (150, 100)


def test_a_generator_goes_on_and_none_is_random(pipe):
    generator = seeded()
    a, b = (np.asarray(pipe(PIL, 2, generator).images[0]) for _ in range(2))
    assert not np.array_equal(a, b)
    assert np.array_equal(np.asarray(pipe(PIL, 2, seeded()).images[0]), a)
    torch.manual_seed(0)
    a = np.asarray(pipe(PIL, 2).images[0])
    b = np.asarray(pipe(PIL, 2).images[0])
    assert not np.array_equal(a, b)


def test_callbacks_see_and_change_latents(pipe):
    seen = []

    def look(given, i, t, kwargs):
        assert given is pipe
        seen.append((i, t, tuple(kwargs["latents"].shape)))
        return {"latents": kwargs["latents"] * 0} if i == 2 else {}

    (made,) = pipe(PIL, 3, seeded(), callback_on_step_end=look).images
    assert seen == [
        (0, 1.0, (1, 48, 20, 28)),
        (1, pytest.approx(2 / 3), (1, 48, 20, 28)),
        (2, pytest.approx(1 / 3), (1, 48, 20, 28)),
    ]
    assert np.asarray(made).std((0, 1)).max() < np.asarray(pipe(PIL, 3, seeded()).images[0]).std((0, 1)).max()


def test_switches(pipe, untrained, tmp_path, capsys):
    pipe.disable_vae_tiling()
    whole = np.asarray(pipe(PIL, 2, seeded()).images[0]).astype(float)
    pipe.enable_vae_tiling(96)
    tiled = np.asarray(pipe(PIL, 2, seeded()).images[0])
    pipe.disable_vae_tiling()
    assert np.array_equal(np.asarray(pipe(PIL, 2, seeded()).images[0]), whole)
    pipe.enable_vae_tiling()
    assert 0 < np.abs(tiled - whole).mean() < 3
    pipe.save_pretrained(tmp_path / "saved")
    again = TeasrPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16).to("cpu")
    assert again.device.type == "cpu" and again.upscaler.backbone.autocast == torch.bfloat16
    capsys.readouterr()
    again(PIL, 2)
    assert "restore   2/2 steps" in capsys.readouterr().out
    if not torch.cuda.is_available():
        for act in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload, lambda: pipe.to("cuda")):
            with pytest.raises(ValueError, match="no GPU is visible"):
                act()


def test_mistakes(pipe, untrained):
    for given, message in (
        ({"output_type": "latent"}, "pil, np or pt"),
        ({"height": 100}, "must be given together"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "only 'latents'"),
        ({"num_inference_steps": 0}, "at least 1 step"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(PIL, **given)
    with pytest.raises(ValueError, match="list of PIL"):
        pipe([PHOTO])
    with pytest.raises(ValueError, match="torch_dtype"):
        TeasrPipeline.from_pretrained(untrained, torch_dtype=torch.float64)


def test_to_and_variant_as_in_diffusers(pipe, untrained, tmp_path):
    """`to` takes a device, a dtype or both, in any order; `variant` is the dtype of the stored weights."""
    moved = TeasrPipeline(Upscaler.from_pretrained(untrained))
    assert moved.dtype == torch.float32
    for act in (
        lambda: moved.to(torch.bfloat16),
        lambda: moved.to("cpu", torch.float16),
        lambda: moved.to(device="cpu", dtype=torch.bfloat16),
    ):
        assert act() is moved and moved.dtype in (torch.bfloat16, torch.float16)
    moved.set_progress_bar_config(disable=True)
    half = np.asarray(moved(PIL, 2, seeded()).images[0]).astype(int)
    assert 0 < np.abs(half - np.asarray(pipe(PIL, 2, seeded()).images[0])).max() < 30
    assert np.array_equal(moved.to(torch.float32)(PIL, 2, seeded()).images[0], pipe(PIL, 2, seeded()).images[0])
    with pytest.raises(ValueError, match="float64"):
        moved.to(torch.float64)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    again = TeasrPipeline.from_pretrained(tmp_path / "half", variant="fp16")
    assert isinstance(again, TeasrPipeline)
    for variant, message in (("bf16", "are stored in fp16, not bf16: leave variant out"), ("int8", "use one of fp32")):
        with pytest.raises(ValueError, match=message):
            TeasrPipeline.from_pretrained(tmp_path / "half", variant=variant)
