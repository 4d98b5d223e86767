"""Perceptual distances with a gradient, LPIPS and DISTS, and where their weight files are looked up.

Training and scoring use the same two networks and the same files: the convolutions alone, as `teasr weights` writes
them, or torchvision's own files. Nothing is downloaded from here.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from teasr.util.optional import needed_for

DEFAULT_FOLDER = "~/.cache/teasr/metric_weights"
BACKBONES = {  # network -> its files, the preferred one first: convolutions alone, or torchvision's whole network
    "alex": ("alexnet-features.safetensors", "alexnet-owt-7be5be79.pth"),
    "vgg": ("vgg16-features.safetensors", "vgg16-397923af.pth"),
}
DISTS_FILES = ("dists_alpha_beta.safetensors", "DISTS_weights-f5e65c96.pth")  # the second one is the authors' own
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)  # torchvision's features
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of VGG16's inputs
STABLE = 1e-6  # c1 and c2 of DISTS


def weight_folder(folder: Path | None = None) -> Path:
    """Folder of the metrics' weight files: the given one, TEASR_METRIC_WEIGHTS, or ~/.cache/teasr/metric_weights."""
    return Path(folder or os.environ.get("TEASR_METRIC_WEIGHTS") or DEFAULT_FOLDER).expanduser()


def places(folder: Path | None = None) -> tuple[Path, ...]:
    """Folders in which weight files are looked up: `weight_folder`, then the download folders of torch and pyiqa."""
    hub = Path(torch.hub.get_dir())
    return (weight_folder(folder), hub / "checkpoints", hub / "pyiqa")


def find_weights(names: tuple[str, ...], folder: Path | None = None) -> Path | None:
    """Return the first of the files `names` that exists; earlier names and earlier places come first."""
    return next((p for name in names for place in places(folder) if (p := place / name).is_file()), None)


def read_weights(
    names: tuple[str, ...], needed_by: str, folder: Path | None = None, or_else: str = ""
) -> dict[str, Tensor]:
    """Read the first of the files `names` that exists, a safetensors or a torch file.

    Raises ValueError when there is none, or when it cannot be read; the message names the cure.
    """
    path = find_weights(names, folder)
    if path is None:
        raise ValueError(
            f"{needed_by} needs the weight file {names[0]} (or {names[1]}), which is neither in "
            f"{weight_folder(folder)} nor in {places(folder)[1]}: run `teasr weights`{or_else}"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it and run `teasr weights`") from None


def load_lpips(net: str = "vgg", weights: bool = True, folder: Path | None = None) -> nn.Module:
    """Load LPIPS v0.1 (Zhang et al. 2018), frozen, on the backbone `net`: vgg or alex.

    Call the result with images [B, 3, H, W] in [-1, 1]; it returns [B, 1, 1, 1]. The calibrated heads come with the
    package `lpips`. `folder`: of the weight files (default: `weight_folder`). `weights=False` gives a random backbone,
    for tests. Raises ValueError naming the file that is missing.
    """
    without = ", or train without LPIPS (method.lambda_lpips=0)"
    state = read_weights(BACKBONES[net], f"LPIPS ({net})", folder, without) if weights else None
    with needed_for("LPIPS"):
        import lpips

    with warnings.catch_warnings():  # lpips calls a deprecated torchvision API
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    if state is not None:
        for name, layer in model.net.named_modules():  # slice3.7 is torchvision's features.7
            if isinstance(layer, nn.Conv2d):
                _fill(layer, state, f"features.{name.rpartition('.')[2]}")
    return model.requires_grad_(False).eval()


def lpips_maps(metric: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield the weighted squared differences of the five feature maps, [B, 1, h, w] each; LPIPS sums their means.

    y gets no gradient, and only its normalised features are kept.
    """
    from lpips import normalize_tensor

    with torch.no_grad():
        wanted = [normalize_tensor(features) for features in metric.net(metric.scaling_layer(y))]
    for k, features in enumerate(metric.net(metric.scaling_layer(x))):
        yield metric.lins[k]((normalize_tensor(features) - wanted[k]) ** 2)


def load_dists(weights: bool = True, folder: Path | None = None) -> DISTS:
    """Load DISTS, frozen. `weights=False` gives random features of equal importance, for tests.

    `folder`: of the weight files (default: `weight_folder`). Raises ValueError naming the file that is missing.
    """
    states = [read_weights(n, "DISTS", folder) for n in (BACKBONES["vgg"], DISTS_FILES)] if weights else None
    model = DISTS()
    if states is not None:
        for index, layer in model.convolutions.items():
            _fill(layer, states[0], f"features.{index}")
        for name in ("alpha", "beta"):
            _copy(getattr(model, name), states[1], name)
    return model.requires_grad_(False).eval()


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al. 2020), with a gradient for both pictures.

    The features are the picture itself and the last activations of VGG16's five stages, with a Hanning-weighted L2
    pooling instead of the maximum. Per channel, the texture term compares means and the structure term covariances;
    the distance is 1 minus their sum weighted by alpha and beta. Equal pictures have the distance 0.
    """

    channels = (3, 64, 128, 256, 512, 512)

    def __init__(self):
        """Random features and equal importance of all terms; `load_dists` fills in the published weights."""
        super().__init__()
        widths = [3, *(w for w in VGG16 if w != "M")]
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
        self.convolutions = nn.ModuleDict(dict(zip(_indices(), convolutions, strict=True)))
        hanning = torch.tensor([0.5, 1.0, 0.5])
        self.register_buffer("hanning", torch.outer(hanning, hanning)[None, None] / 4, persistent=False)
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        for name in ("alpha", "beta"):
            self.register_buffer(name, torch.ones(1, sum(self.channels), 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance between images [B, 3, H, W] in [-1, 1], as [B]. Sides must be at least 16 px."""
        terms = [
            _similarities(a, b) for a, b in zip(*(self.features((z + 1) / 2) for z in (x, y)), strict=True)
        ]  # (texture, structure) of each stage, [B, C] each
        texture, structure = (torch.cat(parts, 1) for parts in zip(*terms, strict=True))
        total = self.alpha.sum() + self.beta.sum()
        return 1 - (texture * self.alpha.flatten() + structure * self.beta.flatten()).sum(1) / total

    def features(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [0, 1] -> the picture and the activations of five stages."""
        found, h, layers = [x], (x - self.mean) / self.std, iter(self.convolutions.values())
        for width in VGG16:
            if width == "M":
                found.append(h)
                h = self._pooled(h)
            else:
                h = F.relu(next(layers)(h))
        return [*found, h]

    def _pooled(self, h: Tensor) -> Tensor:
        """L2 pooling by 2: the root of the Hanning-weighted mean of the squares."""
        kernel = self.hanning.expand(h.shape[1], 1, 3, 3)
        return (F.conv2d(h.square(), kernel, stride=2, padding=1, groups=h.shape[1]) + 1e-12).sqrt()


def _indices() -> list[str]:
    """Positions of VGG16's convolutions in torchvision's `features`, where a ReLU follows each of them."""
    found, index = [], 0
    for width in VGG16:
        if width != "M":
            found.append(str(index))
        index += 1 if width == "M" else 2
    return found


def _similarities(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Texture and structure similarity of features [B, C, H, W], each [B, C], in fp32 or higher precision."""
    a, b = (z.flatten(2) if z.dtype == torch.float64 else z.flatten(2).float() for z in (a, b))
    mean_a, mean_b = a.mean(2), b.mean(2)
    var_a, var_b = ((z - m[..., None]).square().mean(2) for z, m in ((a, mean_a), (b, mean_b)))
    cov = ((a - mean_a[..., None]) * (b - mean_b[..., None])).mean(2)
    texture = (2 * mean_a * mean_b + STABLE) / (mean_a.square() + mean_b.square() + STABLE)
    return texture, (2 * cov + STABLE) / (var_a + var_b + STABLE)


def _fill(layer: nn.Conv2d, state: dict[str, Tensor], name: str) -> None:
    _copy(layer.weight, state, f"{name}.weight")
    _copy(layer.bias, state, f"{name}.bias")


def _copy(target: Tensor, state: dict[str, Tensor], name: str) -> None:
    if name not in state or state[name].shape != target.shape:
        raise ValueError(f"the weight file has no {name} of shape {list(target.shape)}: run `teasr weights` again")
    target.data.copy_(state[name])
