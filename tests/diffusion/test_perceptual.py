"""perceptual.py: LPIPS and DISTS on made-up weights, both kinds of files, and the published networks where they are."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from teasr.diffusion import perceptual

REAL = Path(os.environ.get("TEASR_METRIC_WEIGHTS", "/nowhere"))
real = pytest.mark.skipif(
    not all((REAL / n).is_file() for n in ("alexnet-features.safetensors", "vgg16-features.safetensors")),
    reason="TEASR_METRIC_WEIGHTS names no folder with the published weights",
)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty folder of weights, and no downloads of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("TEASR_METRIC_WEIGHTS", str(tmp_path))
    return tmp_path


def pictures(seed: int = 0, side: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.rand(2, 2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, 0.7 * x + 0.3 * y


def vgg_features() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=False)
    return {f"features.{name}": x for name, x in layers.state_dict().items()}


def test_missing_weights_are_named_with_the_cure(nowhere):
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth.*checkpoints.*teasr weights.*lambda_lpips=0"):
        perceptual.load_lpips("vgg")
    with pytest.raises(ValueError, match=r"DISTS needs the weight file vgg16-features\.safetensors .*teasr weights"):
        perceptual.load_dists()
    (nowhere / "alexnet-features.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"alexnet-features\.safetensors cannot be read .*delete it"):
        perceptual.load_lpips("alex")
    save_file({"features.0.weight": torch.zeros(1)}, nowhere / "alexnet-features.safetensors")
    with pytest.raises(ValueError, match=r"no features\.0\.weight of shape \[64, 3, 11, 11\]"):
        perceptual.load_lpips("alex")


def test_lpips_with_a_random_backbone_has_a_gradient():
    """The real class end to end, except for the downloaded weights."""
    lpips = perceptual.load_lpips("alex", weights=False)
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x_hat = (x * 0.5).requires_grad_()
    loss = lpips(x_hat, x).mean()
    loss.backward()
    assert loss > 0 and x_hat.grad.abs().sum() > 0
    assert lpips(x, x).mean() == 0


def test_both_kinds_of_files_give_the_same_lpips(nowhere):
    """Torchvision's whole network, and its convolutions alone in a folder that is given."""
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    torch.save(state, nowhere / "alexnet-owt-7be5be79.pth")
    whole = perceptual.load_lpips("alex")(*pictures(side=64))
    other = nowhere / "other"
    other.mkdir()
    save_file({n: x for n, x in state.items() if n.startswith("features")}, other / "alexnet-features.safetensors")
    alone = perceptual.load_lpips("alex", folder=other)(*pictures(side=64))
    assert torch.equal(whole, alone) and (whole > 0).all()


def test_dists_is_zero_for_equal_pictures_symmetric_and_per_picture():
    torch.manual_seed(0)
    dists, (x, y) = perceptual.load_dists(weights=False), pictures()
    assert not any(p.requires_grad for p in dists.parameters())
    assert dists(x, x).abs().max() < 1e-5
    both = dists(x, y)
    assert both.shape == (2,) and (both > 0).all() and torch.allclose(both, dists(y, x), atol=1e-6)
    assert torch.allclose(both[:1], dists(x[:1], y[:1]), atol=1e-6)


def test_dists_has_a_finite_gradient_on_flat_pictures_too():
    torch.manual_seed(0)
    dists = perceptual.load_dists(weights=False)
    flat = torch.zeros(1, 3, 32, 32)
    for x, y in ((flat, flat), (flat, pictures(side=32)[0][:1])):
        x = x.clone().requires_grad_()
        dists(x, y).sum().backward()
        assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def reference(state: dict, alpha: torch.Tensor, beta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """DISTS written out a second time, layer by layer of torchvision's network, in float64."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=False)
    layers.load_state_dict({n.removeprefix("features."): v for n, v in state.items()})
    window = np.hanning(5)[1:-1]
    kernel = torch.from_numpy(np.outer(window, window) / np.outer(window, window).sum())

    def features(z: torch.Tensor) -> list[torch.Tensor]:
        z = (z.double() + 1) / 2
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in perceptual.IMAGENET)
        found, h = [z], (z - mean) / std
        for layer in layers.double():
            if isinstance(layer, torch.nn.MaxPool2d):
                found.append(h)
                weight = kernel.expand(h.shape[1], 1, 3, 3)
                h = (torch.nn.functional.conv2d(h**2, weight, None, 2, 1, 1, h.shape[1]) + 1e-12).sqrt()
            else:
                h = layer(h)
            if len(found) == 5 and layer is layers[29]:
                return [*found, h]

    score, start = torch.ones(len(x), dtype=torch.float64), 0
    total = (alpha.sum() + beta.sum()).double()
    for a, b in zip(features(x), features(y), strict=True):
        for c in range(a.shape[1]):
            p, q = a[:, c].flatten(1), b[:, c].flatten(1)
            mp, mq = p.mean(1), q.mean(1)
            texture = (2 * mp * mq + 1e-6) / (mp**2 + mq**2 + 1e-6)
            cov = (p * q).mean(1) - mp * mq
            structure = (2 * cov + 1e-6) / (p.var(1, correction=0) + q.var(1, correction=0) + 1e-6)
            at = start + c
            score -= (alpha.flatten()[at] * texture + beta.flatten()[at] * structure) / total
        start += a.shape[1]
    return score


def test_dists_equals_its_definition_on_the_files_that_were_given(nowhere):
    state = vgg_features()
    g = torch.Generator().manual_seed(1)
    alpha, beta = torch.rand(2, 1, 1475, 1, 1, generator=g)
    save_file(state, nowhere / "vgg16-features.safetensors")
    torch.save({"alpha": alpha, "beta": beta}, nowhere / "DISTS_weights-f5e65c96.pth")
    with torch.no_grad():
        ours = perceptual.load_dists()(*pictures())
        assert torch.allclose(ours.double(), reference(state, alpha, beta, *pictures()), atol=2e-5)


@real
def test_the_published_networks_rank_degradations_as_published():
    """More noise is a larger distance, and DISTS forgives another sample of the same texture where LPIPS does not."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, 3, 128, 128, generator=g) * 0.3
    photo = torch.linspace(-0.5, 0.5, 128).expand(1, 3, 128, 128)
    lpips, dists = perceptual.load_lpips("alex", folder=REAL), perceptual.load_dists(folder=REAL)
    with torch.no_grad():
        for metric in (lpips, dists):
            weak, strong = (metric(photo, photo + a * noise[0]).item() for a in (0.1, 1.0))
            assert 0 < weak < strong
        same_texture = photo + noise[0], photo + noise[1]
        assert dists(*same_texture) < 0.5 * dists(photo, photo + noise[0])
