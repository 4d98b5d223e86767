"""backbones/qwen_vae.py against diffusers' own VAE.

The results are equal for single frames, the size is a third, and the gradient is non-zero everywhere.
"""

import copy

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from teasr.backbones.qwen_image.vae import QwenCodec, to_2d

MEAN, STD = [0.1 * i - 0.7 for i in range(16)], [1 + 0.1 * i for i in range(16)]


def random_vae():
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=16, z_dim=16, num_res_blocks=1, latents_mean=MEAN, latents_std=STD).eval()
    for p in vae.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.2, 0.2)
    vae.decoder.conv_out.weight.data *= 20  # some pixels beyond [-1, 1]
    return vae


@pytest.fixture(scope="module")
def stock():
    return random_vae()


@pytest.fixture(scope="module")
def codec():
    return QwenCodec(random_vae())


def column(values):
    return torch.tensor(values)[:, None, None]


def stock_unclamped(vae, z):
    """The stock decoder without the final clamp of `decode`."""
    return vae.decoder(vae.post_quant_conv((z * column(STD) + column(MEAN))[:, :, None]))[:, :, 0]


@torch.no_grad()
def test_encoding_is_the_stock_mode_normalised(stock, codec):
    x = torch.rand(2, 3, 48, 64) * 2 - 1
    mode = stock.encode(x[:, :, None]).latent_dist.mode()[:, :, 0]
    z = codec.encode(x)
    assert z.shape == (2, 16, 6, 8)
    assert (z - (mode - column(MEAN)) / column(STD)).abs().max() < 1e-5


@torch.no_grad()
def test_decoding_is_the_stock_one_before_its_clamp(stock, codec):
    z = torch.randn(2, 16, 6, 8) * 8
    x = codec.decode(z)
    stocks = stock.decode((z * column(STD) + column(MEAN))[:, :, None]).sample[:, :, 0]
    assert x.shape == (2, 3, 48, 64) and (x.abs() > 1).any()
    assert (x.clamp(-1, 1) - stocks).abs().max() < 1e-4 and (x - stock_unclamped(stock, z)).abs().max() < 1e-4


def test_gradients_are_the_stock_ones_and_live_where_a_clamp_would_end_them(stock, codec):
    z = (torch.randn(1, 16, 4, 4) * 8).requires_grad_()
    weight = torch.randn(1, 3, 32, 32)
    ours = torch.autograd.grad((codec.decode(z) * weight).sum(), z)[0]
    theirs = torch.autograd.grad((stock_unclamped(stock, z) * weight).sum(), z)[0]
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    outside = (codec.decode(z).abs() > 1).float()
    assert outside.any() and torch.autograd.grad((codec.decode(z) * outside).sum(), z)[0].abs().max() > 0


def test_checkpointing_changes_nothing(codec):
    z, x = torch.randn(1, 16, 4, 4, requires_grad=True), torch.rand(1, 3, 32, 32, requires_grad=True)
    results = {}
    for on in (False, True):
        codec.checkpointing = on
        assert codec.checkpointing == on
        decoded, encoded = codec.decode(z), codec.encode(x)
        results[on] = (decoded, encoded, *torch.autograd.grad(decoded.square().sum() + encoded.square().sum(), (z, x)))
    codec.checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True], strict=True))


def test_full_size_loses_its_temporal_taps():
    """Millions of parameters at the published size, on the meta device; purely temporal convolutions go too."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()

    def millions(module):
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)

    assert (millions(vae.encoder), millions(vae.decoder)) == (53.6, 73.3)
    vae = to_2d(vae)
    assert (millions(vae.encoder), millions(vae.decoder)) == (19.3, 25.3)


def test_bf16_runs_and_nothing_is_trained(stock):
    codec = QwenCodec(copy.deepcopy(stock).to(torch.bfloat16))
    z = codec.encode(torch.rand(1, 3, 32, 32))
    assert z.dtype == torch.float32 and codec.decode(z).isfinite().all()
    assert not any(p.requires_grad for p in codec.parameters())


def test_loading_from_folders(stock, codec, tmp_path):
    stock.save_pretrained(tmp_path / "alone")
    stock.save_pretrained(tmp_path / "model/vae")
    x = torch.rand(1, 3, 32, 32)
    for name in ("alone", "model"):
        loaded = QwenCodec.from_pretrained(str(tmp_path / name), torch.float32)
        assert torch.equal(loaded.encode(x), codec.encode(x))
    weights = next((tmp_path / "alone").glob("*.safetensors"))
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        QwenCodec.from_pretrained(str(tmp_path / "alone"), torch.float32)
    with pytest.raises(ValueError, match="neither a folder"):
        QwenCodec.from_pretrained("nowhere", torch.float32)
