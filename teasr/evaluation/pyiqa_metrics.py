"""Metrics of pyiqa, an optional dependency under the licence PolyForm Noncommercial, from given weight files alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from teasr.util.optional import needed_for


def load(name: str, paths: dict[str, Path], device: str) -> Callable:
    """Return the function that computes a metric of LOADERS; paths: its weight files by their published names."""
    with needed_for(f"the metric {name}"), ExitStack() as stack:
        stack.enter_context(_local_files_only(paths))
        return LOADERS[name](paths, device)


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
        from pyiqa.utils import download_util

        self.enter_context(mock.patch.object(download_util, "DEFAULT_CACHE_DIR", str(home / "pyiqa")))
        self.enter_context(mock.patch.object(download_util, "download_url_to_file", _no_download))


def _no_download(url: str, *_, **__) -> None:
    raise ValueError(f"{url.rpartition('/')[2]} is missing and is not downloaded: put it in the metric weights folder")


def tensor(x: np.ndarray):
    """[H, W, 3] uint8 -> [1, 3, H, W] in [0, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].float() / 255


def _pyiqa(name: str, paths: dict[str, Path], device: str, **options) -> Callable:
    import pyiqa
    import torch

    model = pyiqa.create_metric(name, device=torch.device(device), **options)

    def score(image: np.ndarray, hq: np.ndarray | None) -> float:
        inputs = [tensor(x).to(device) for x in ((image,) if model.metric_mode == "NR" else (image, hq))]
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
    "niqe": _niqe,
    "musiq": partial(_pyiqa, "musiq"),
    "maniqa": _maniqa,
    "clipiqa": _clipiqa,
    "fid": _fid,
}
