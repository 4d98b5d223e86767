"""tiled.py: tiled results match the whole image, and tiles shrink when memory runs out.

Nothing larger than a tile reaches the network.
"""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from teasr.backbones.model import Model
from teasr.backbones.tiny import Tiny, TinyConfig
from teasr.imaging import images
from teasr.methods.sampler import AnyStep, restore
from teasr.restore.upscaler import Upscaler


@pytest.fixture(scope="module")
def upscaler():
    """A network with a non-zero output, and a codec fitted to a photograph."""
    backbone = Tiny(TinyConfig(width=32, depth=2, heads=2, lora_rank=4, lora_alpha=4), seed=0)
    photo = images.to_tensor(skimage.data.coffee()[:256, :256])
    backbone.fit([(photo[:, :, i : i + 64], photo[:, :, i : i + 64]) for i in range(0, 192, 8)])
    for parameter in backbone.net.proj_out.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05, generator=torch.Generator().manual_seed(0))
    backbone.to(torch.device("cpu"))
    return Upscaler(Model(backbone))


@pytest.fixture(scope="module")
def lq():
    return np.ascontiguousarray(skimage.data.coffee()[100:161, 200:283])  # 244 x 332 px: not a multiple of 8


def test_one_tile_is_the_sampler_itself(upscaler, lq):
    x = images.to_tensor(images.upsample(lq, 4))[None]
    for steps in (1, 3):
        wanted = images.to_uint8(restore(upscaler.model, AnyStep(), x, steps, seed=7)[0])
        assert np.array_equal(upscaler(lq, steps=steps, seed=7, tile_px=4096), wanted)


@pytest.mark.parametrize("tile_px", [64, 104, 200])
@pytest.mark.parametrize("steps", [1, 3])
def test_tiles_show_what_the_whole_shows(upscaler, lq, tile_px, steps):
    """The mean difference is about one level, and no larger at tile borders than elsewhere.

    A seam would be an edge that the whole image does not have.
    """
    whole = upscaler(lq, steps=steps, tile_px=4096).astype(float)
    tiles = upscaler(lq, steps=steps, tile_px=tile_px).astype(float)
    assert np.abs(tiles - whole).mean() < 1.5
    difference = tiles - whole
    for axis in (0, 1):
        jumps = np.abs(np.diff(difference, axis=axis)).mean(axis=tuple({0, 1, 2} - {axis}))
        assert jumps.max() < 3 * jumps.mean() + 0.5


def test_memory_is_that_of_a_tile_and_shrinks_when_there_is_none(upscaler, lq, monkeypatch, capsys):
    """The transformer runs out of memory above 12 positions: tiles are halved once.

    The result is that of the smaller tiles.
    """
    wanted = upscaler(lq, steps=2, tile_px=96)
    seen, whole = [], upscaler.backbone.net.forward

    def forward(z_t, *rest, **how):
        seen.append(z_t.shape[-2:])
        if z_t.shape[-1] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(z_t, *rest, **how)

    monkeypatch.setattr(upscaler.backbone.net, "forward", forward)
    made = upscaler(lq, steps=2, tile_px=192)
    assert capsys.readouterr().out == "out of memory: continuing with tiles of 96 px\n"
    # 31 x 42 units: spans are no longer than a division by two and two, and by four and five, requires
    assert {tuple(shape) for shape in seen} == {(17, 23), (10, 11)}
    assert np.abs(made.astype(float) - wanted).mean() < 1.5  # not equal, since it was encoded in larger tiles
    monkeypatch.setattr(upscaler.backbone, "decode", lambda z: (_ for _ in ()).throw(MemoryError("none")))
    with pytest.raises(MemoryError, match="not even a tile of"):
        upscaler(lq)


def test_other_errors_are_not_taken_for_a_lack_of_memory(upscaler, lq, monkeypatch):
    monkeypatch.setattr(upscaler.backbone, "encode", lambda x: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        upscaler(lq)


def test_sixteen_bits_stay(upscaler, lq):
    deep = lq.astype(np.uint16) * 257
    made, eight = upscaler(deep, steps=1), upscaler(lq, steps=1)
    assert made.dtype == np.uint16 and np.abs(made / 257 - eight).max() < 1.5
    assert len(np.unique(made)) > 2000  # the extra levels are used


def test_progress_counts_every_tile_of_every_stage(upscaler, lq):
    calls = []
    upscaler(lq, steps=2, tile_px=104, on_progress=lambda done, of: calls.append((done, of)))
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1)) and {of for _, of in calls} == {len(calls)}


def test_any_size_and_what_comes_in_comes_out(upscaler, lq):
    assert upscaler(lq, scale=2.5).shape == (round(61 * 2.5), round(83 * 2.5), 3)
    assert upscaler(lq, size=(200, 150)).shape == (150, 200, 3)
    photo = Image.fromarray(lq)
    for mode in ("L", "RGB", "RGBA", "LA"):
        made = upscaler(photo.convert(mode))
        assert made.mode == mode and made.size == (332, 244)
    x = torch.from_numpy(lq).permute(2, 0, 1) / 255
    made = upscaler(torch.stack((x, x.flip(0))), steps=1)
    assert made.shape == (2, 3, 244, 332) and made.dtype == x.dtype and made.min() >= 0 and made.max() <= 1
    assert (upscaler(x) - made[0]).abs().max() == 0
    assert (made[0].permute(1, 2, 0).numpy() * 255 - upscaler(lq)).max() < 1.5
    for mistake in (
        {"scale": 0.5},
        {"scale": 100},
        {"scale": 2, "size": (200, 150)},
        {"size": (10, 10)},
        {"color_fix": "sepia"},
    ):
        with pytest.raises(ValueError):
            upscaler(lq, **mistake)
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        upscaler(torch.zeros(4, 4))


def test_colours_are_corrected_and_the_source_is_left_alone(upscaler, lq, monkeypatch):
    decode = upscaler.backbone.decode
    monkeypatch.setattr(
        upscaler.backbone, "decode", lambda z: decode(z) * 0.8 + torch.tensor([0.2, 0, 0]).view(3, 1, 1)
    )
    before, plain = lq.copy(), upscaler(lq)
    fixed = upscaler(lq, color_fix="adain")
    up = images.upsample(lq, 4)
    assert np.array_equal(lq, before)
    for moment in (np.mean, np.std):
        off = [np.abs(moment(x, (0, 1)) - moment(up, (0, 1))).max() for x in (plain, fixed)]
        assert off[1] < off[0] and off[1] < 2


def test_what_programs_can_read(upscaler):
    d = upscaler.descriptor
    assert (d.scale, d.pixel_multiple, d.min_tile_px, d.tile_px) == (4, 8, 64, 192)
