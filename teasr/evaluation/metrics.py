"""The metrics of the published Real-ISR tables, with their protocols and weight files.

`Scorer` scores single pictures and whole sets. A metric whose weight file is missing is not computed, and its status is
"skipped: put FILE in PLACE". PSNR, SSIM and the Frechet distance are computed by our own exact code, LPIPS by the
package `lpips`, and the other published metrics by pyiqa (an optional dependency, under the licence PolyForm
Noncommercial).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np

from teasr.imaging.exact_metrics import frechet_distance, psnr, ssim
from teasr.util.files import sha256_of

WEIGHTS = Path(os.environ.get("TEASR_METRIC_WEIGHTS", "~/.cache/teasr/metric_weights"))  # folder of weight files
PYIQA = "pip install 'teasr[metrics]'"
GRID_PX = 16  # also detects a period of 8 px: token grids of 8 or 16 px may show as artefacts


@dataclass(frozen=True)
class Protocol:
    """How PSNR and SSIM are computed; the other metrics use whole RGB pictures in every protocol."""

    name: str
    luma: bool
    border_px: int

    @property
    def text(self) -> str:
        """Describe the protocol in words."""
        space = "Y of BT.601 ycbcr (limited range)" if self.luma else "RGB"
        return f"{space}, {f'{self.border_px} px of border cropped' if self.border_px else 'no border cropped'}"


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("osediff", luma=True, border_px=0),  # used in the tables of OSEDiff, TSD-SR and TEASR
        Protocol("crop4", luma=True, border_px=4),  # used in classical SR and by SeeSR
        Protocol("rgb", luma=False, border_px=0),
    )
}


@dataclass(frozen=True)
class File:
    """A weight file by its published name; `sha256`: the beginning of its hash, as much of it as is published."""

    name: str
    sha256: str = ""


@dataclass(frozen=True)
class Metric:
    """A column of a table. kind: `full` (full reference), `none` (no reference) or `set` (all pictures at once)."""

    name: str
    label: str
    higher: bool  # whether higher is better
    kind: str
    package: str | None = None
    files: tuple[File, ...] = ()
    about: str = ""


METRICS = {
    m.name: m
    for m in (
        Metric("psnr", "PSNR", True, "full"),
        Metric("ssim", "SSIM", True, "full"),
        Metric(
            "lpips", "LPIPS", False, "full", "lpips", (File("alexnet-owt-7be5be79.pth", "7be5be79"),), "AlexNet, v0.1",
        ),
        Metric(
            "dists", "DISTS", False, "full", "pyiqa",
            (File("vgg16-397923af.pth", "397923af"), File("DISTS_weights-f5e65c96.pth", "f5e65c96")),
        ),
        Metric(
            "fid", "FID", False, "set", "pyiqa", (File("pt_inception-2015-12-05-6726825d.pth", "6726825d"),),
            "whole pictures brought to 299 px by PIL's bicubic (clean-fid), no patches",
        ),
        Metric(
            "niqe", "NIQE", False, "none", "pyiqa", (File("niqe_modelparameters.mat"),), "on yiq luma, BasicSR's table",
        ),
        Metric(
            "musiq", "MUSIQ", True, "none", "pyiqa", (File("musiq_koniq_ckpt-e95806b9.pth", "e95806b9"),), "KonIQ-10k",
        ),
        Metric(
            "maniqa", "MANIQA", True, "none", "pyiqa",
            (
                File("MANIQA_PIPAL-ae6d356b.pth", "ae6d356b"),
                File("vit_base_patch8_224.augreg2_in21k_ft_in1k.safetensors"),
            ),
            "PIPAL (not pyiqa's default); the second file is model.safetensors of timm's model of that name",
        ),
        Metric(
            "clipiqa", "CLIPIQA", True, "none", "pyiqa",
            (File("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),),
        ),
        Metric(
            "checkerboard", "Grid", False, "none",
            about=f"share of the high-pass energy that repeats every {GRID_PX} px",
        ),
    )
}  # fmt: skip


class Scorer:
    """Compute some metrics in one protocol.

    `status` is "ok" or the reason why a metric is skipped; `identity` describes the code and files used.
    """

    def __init__(
        self,
        names: list[str] | None = None,
        protocol: str = "osediff",
        weights: Path | None = None,
        require: bool = False,
        device: str = "cpu",
    ):
        """names: keys of METRICS (default: all). weights: folder of weight files. require: allow no skipped metric.

        Raises ValueError for unknown names and, with `require`, for metrics that are not available. Files are hashed
        here; models are loaded when first needed.
        """
        self.names = list(METRICS) if names is None else names
        for kind, known, requested in (("metric", METRICS, self.names), ("protocol", PROTOCOLS, [protocol])):
            if wrong := [name for name in requested if name not in known]:
                raise ValueError(f"{kind} {wrong[0]} does not exist: choose from {', '.join(known)}")
        self.protocol, self.device = PROTOCOLS[protocol], device
        self.folder = (weights or WEIGHTS).expanduser()
        self.hashes: dict[str, dict[str, str]] = {}
        self.status = {name: self._status_of(METRICS[name]) for name in self.names}
        missing = {name: status for name, status in self.status.items() if status != "ok"}
        if require and missing:
            raise ValueError(
                "; ".join(f"{name}: {status.removeprefix('skipped: ')}" for name, status in missing.items())
            )
        self._models: dict[str, Callable] = {}
        self._features: dict[str, list[np.ndarray]] = {}

    @property
    def picture_names(self) -> list[str]:
        """Names of the metrics that score single pictures, without the skipped ones."""
        return [n for n in self.names if self.status[n] == "ok" and METRICS[n].kind != "set"]

    @property
    def identity(self) -> dict[str, dict]:
        """For each metric its status, label, direction, protocol, code version and file hashes."""
        found = {}
        for name in self.names:
            metric = METRICS[name]
            code = metadata.version(metric.package) if metric.package and find_spec(metric.package) else None
            found[name] = {
                "status": self.status[name], "label": metric.label, "better": "higher" if metric.higher else "lower",
                "protocol": f"{self.protocol.name}: {self.protocol.text}" if name in ("psnr", "ssim") else metric.about,
                "code": f"{metric.package} {code}" if metric.package else "teasr", "files": self.hashes.get(name, {}),
            }  # fmt: skip
        return found

    def picture(self, image: np.ndarray, hq: np.ndarray | None) -> dict[str, float]:
        """Score a picture [H, W, 3] uint8 RGB against `hq` of the same kind.

        Without `hq`, only no-reference metrics are computed. Raises ValueError if the sizes differ.
        """
        return {
            name: self._model(name)(image, hq)
            for name in self.picture_names
            if hq is not None or METRICS[name].kind == "none"
        }

    def add_to_set(self, key: str, x: np.ndarray) -> None:
        """Add a picture to the set `key`, for metrics of whole sets."""
        if self.status.get("fid") == "ok":
            self._features.setdefault(key, []).append(self._model("fid")(x))

    def sets(self, restored: str, hq: str) -> dict[str, float]:
        """Score the collected set `restored` against the set `hq`; empty if either has fewer than 2 pictures."""
        a, b = self._features.get(restored), self._features.get(hq)
        return {"fid": frechet_distance(np.stack(a), np.stack(b))} if a and b and min(len(a), len(b)) > 1 else {}

    def _status_of(self, metric: Metric) -> str:
        if metric.package and find_spec(metric.package) is None:
            return f"skipped: {PYIQA if metric.package == 'pyiqa' else f'pip install {metric.package}'}"
        for file in metric.files:
            path = _find(file, self.folder)
            if path is None:
                return f"skipped: put {file.name} in {self.folder}"
            digest = _sha256(path)
            if not digest.startswith(file.sha256):
                hashes = f"sha256 {digest[:8]}.., not {file.sha256[:8]}.."
                return f"skipped: {path} is not the published file ({hashes}); replace it"
            self.hashes.setdefault(metric.name, {})[file.name] = digest
        return "ok"

    def _model(self, name: str) -> Callable:
        if name not in self._models:
            self._models[name] = self._load(METRICS[name])
        return self._models[name]

    def _load(self, metric: Metric) -> Callable:
        if metric.name in ("psnr", "ssim"):
            function = {"psnr": psnr, "ssim": ssim}[metric.name]
            return partial(function, on_luma=self.protocol.luma, border=self.protocol.border_px)
        if metric.name == "checkerboard":
            return _checkerboard
        paths = {file.name: _find(file, self.folder) for file in metric.files}
        with ExitStack() as stack:
            stack.enter_context(_local_files_only(paths))
            return LOADERS[metric.name](paths, self.device)


def _find(file: File, folder: Path) -> Path | None:
    """Find a weight file in the folder or in the caches of torch, pyiqa and CLIP."""
    hub = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub"
    places = (folder, hub / "checkpoints", hub / "pyiqa", Path("~/.cache/clip").expanduser())
    return next((place / file.name for place in places if (place / file.name).is_file()), None)


_sha256 = cache(sha256_of)


class _local_files_only(ExitStack):
    """Context in which libraries find only these files in their caches and cannot download others."""

    def __init__(self, paths: dict[str, Path]):
        super().__init__()
        import torch

        home = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="teasr-metrics-")))
        for place in ("checkpoints", "pyiqa"):
            (home / place).mkdir()
            for name, path in paths.items():
                (home / place / name).symlink_to(path.resolve())
        before = torch.hub.get_dir()
        torch.hub.set_dir(home)
        self.callback(torch.hub.set_dir, before)
        self.enter_context(mock.patch("torch.hub.download_url_to_file", _no_download))
        if find_spec("pyiqa"):
            from pyiqa.utils import download_util

            self.enter_context(mock.patch.object(download_util, "DEFAULT_CACHE_DIR", str(home / "pyiqa")))
            self.enter_context(mock.patch.object(download_util, "download_url_to_file", _no_download))


def _no_download(url: str, *_, **__) -> None:
    raise ValueError(f"{url.rpartition('/')[2]} is missing and is not downloaded: put it in the metric weights folder")


def _tensor(x: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].float() / 255


def _checkerboard(image: np.ndarray, hq: np.ndarray | None) -> float:
    from teasr.diffusion.losses import checkerboard_energy

    return checkerboard_energy(_tensor(image), GRID_PX).item()


def _lpips(paths: dict[str, Path], device: str) -> Callable:
    import torch

    from teasr.diffusion.losses import load_lpips

    model = load_lpips("alex").to(device)

    def score(image: np.ndarray, hq: np.ndarray) -> float:
        with torch.no_grad():
            return model(*(_tensor(x).to(device) * 2 - 1 for x in (image, hq))).item()

    return score


def _pyiqa(name: str, paths: dict[str, Path], device: str, **options) -> Callable:
    import pyiqa
    import torch

    model = pyiqa.create_metric(name, device=torch.device(device), **options)

    def score(image: np.ndarray, hq: np.ndarray | None) -> float:
        inputs = [_tensor(x).to(device) for x in ((image,) if model.metric_mode == "NR" else (image, hq))]
        return model(*inputs).item()

    return score


def _niqe(paths: dict[str, Path], device: str) -> Callable:
    (path,) = paths.values()
    return _pyiqa("niqe", paths, device, pretrained_model_path=str(path))


def _maniqa(paths: dict[str, Path], device: str) -> Callable:
    """Load MANIQA, which always requests its backbone from timm by name: point timm to the local file."""
    import timm

    vit = next(str(path) for name, path in paths.items() if name.startswith("vit_"))
    create = partial(timm.create_model, pretrained_cfg_overlay={"file": vit})
    with mock.patch("timm.create_model", create):
        return _pyiqa("maniqa-pipal", paths, device)


def _clipiqa(paths: dict[str, Path], device: str) -> Callable:
    from pyiqa.archs import clip_model

    (path,) = paths.values()
    load = partial(clip_model.load, download_root=str(path.parent))
    with mock.patch("pyiqa.archs.clipiqa_arch.load", load):
        return _pyiqa("clipiqa", paths, device)


def _fid(paths: dict[str, Path], device: str) -> Callable:
    """Return a function that computes the Inception features [2048] of one picture like clean-fid."""
    import torch
    from PIL import Image
    from pyiqa.archs.inception import InceptionV3

    model = InceptionV3(normalize_input=False).to(device).eval()

    def features(x: np.ndarray) -> np.ndarray:
        planes = [
            Image.fromarray(x[:, :, i].astype(np.float32), mode="F").resize((299, 299), Image.BICUBIC) for i in range(3)
        ]
        batch = torch.from_numpy(np.stack([np.asarray(p).clip(0, 255) for p in planes]))[None]
        with torch.no_grad():
            return model(((batch - 128) / 128).to(device), False, False)[0].flatten().double().cpu().numpy()

    return features


LOADERS: dict[str, Callable[[dict[str, Path], str], Callable]] = {
    "lpips": _lpips,
    "dists": partial(_pyiqa, "dists"),
    "niqe": _niqe,
    "musiq": partial(_pyiqa, "musiq"),
    "maniqa": _maniqa,
    "clipiqa": _clipiqa,
    "fid": _fid,
}
