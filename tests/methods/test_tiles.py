"""methods/tiles.py: pixel losses in tiles have the values and gradients of the whole picture."""

from types import SimpleNamespace

import pytest
import torch
from test_teasr import PLAIN, batch, draws, gradients, run_losses, tiny

from teasr.backbones.model import Model
from teasr.backbones.qwen_image.vae import QwenCodec
from teasr.diffusion import perceptual
from teasr.diffusion.losses import gradient_through
from teasr.methods import tiles
from teasr.methods.teasr import Teasr, TeasrConfig


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return perceptual.load_lpips("vgg", weights=False).double()


def qwen_decoder():
    """A model with the decoder of a small random VAE of Qwen-Image, in double precision."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.9] * 4
    ).double()
    codec = QwenCodec(vae)
    return codec, SimpleNamespace(backbone=codec)


def test_spans_cover_a_length_once():
    found = tiles.spans(100, 32, 20)
    assert [(s.start, s.end) for s in found] == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert [(s.first, s.last) for s in found] == [(0, 52), (12, 84), (44, 100), (76, 100)]
    assert found[1].own() == slice(20, 52) and found[1].own(8) == slice(160, 416)


def test_decoding_in_tiles_is_exact_and_needs_its_halo(monkeypatch):
    """Qwen-Image's decoder, with attention over the whole picture; the result is rounded to fp32 by the codec."""
    codec, model = qwen_decoder()
    z = torch.randn(1, 4, 12, 40, dtype=torch.float64)
    with torch.no_grad():
        whole = codec.decode(z)
    g = torch.randn(whole.shape, dtype=whole.dtype)
    wanted = gradient_through(lambda z: (codec.decode(z) * g).sum(), z)[1]
    assert (tiles.decode(model, z, 64) - whole).abs().max() <= 1e-6 * whole.abs().max()
    found = tiles.decoder_gradient(model, z, g, 64)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    monkeypatch.setattr(QwenCodec, "decoder_halo", 2)
    assert (tiles.decode(model, z, 64) - whole).abs().max() > 1e-4 * whole.abs().max()
    assert (tiles.decoder_gradient(model, z, g, 64) - wanted).abs().max() > 1e-4 * wanted.abs().max()


def test_lpips_in_tiles_is_exact(vgg):
    """Sides that are no multiples of the tile or of the features' stride, and tiles with cut surroundings."""
    x, y = torch.rand(2, 1, 3, 24, 250, dtype=torch.float64) * 2 - 1
    wanted, gradient = gradient_through(lambda x: vgg(x, y).mean(), x)
    value, found = tiles.lpips(vgg, x, y, 64)
    assert value == pytest.approx(float(wanted), rel=1e-12)
    assert (found - gradient).abs().max() < 1e-10 * gradient.abs().max()


def test_update_with_tiles_has_the_same_gradients(vgg):
    """The one-step loss with both pixel losses, a share of the images for LPIPS, and a random shift."""
    off = {f"lambda_{n}": 0.0 for n in ("flow", "cons", "adv")}
    settings = PLAIN | off | {"lambda_mse": 0.3, "lambda_lpips": 0.2, "lpips_share": 0.5, "lpips_shift_px": 7}
    results = []
    for tile_px in (None, 64):
        method, backbone = Teasr(TeasrConfig(**settings, pixel_tile_px=tile_px), vgg), tiny()
        loss = run_losses(method, backbone, batch(2), draws(2), only="one_step")[-1]
        results.append((gradients(backbone), loss.logs))
    (wanted, logs), (found, tile_logs) = results
    assert all(torch.allclose(found[name], g, rtol=1e-9, atol=1e-12) for name, g in wanted.items())
    assert set(tile_logs) == set(logs)
    assert all(float(tile_logs[name]) == pytest.approx(float(logs[name]), rel=1e-9) for name in logs)


def test_what_tiles_need_is_named():
    with pytest.raises(ValueError, match="lpips_net=vgg"):
        TeasrConfig(pixel_tile_px=256, lpips_net="alex")
    with pytest.raises(ValueError, match="multiple of 16"):
        TeasrConfig(pixel_tile_px=100)
    backbone = tiny()
    backbone.decoder_halo = None
    with pytest.raises(ValueError, match="pixel_tile_px=null"):
        tiles.check(Model(backbone), 64)
