"""`Scorer`: compute the metrics of registry.py.

It scores single pictures and whole sets. A metric whose weight file is missing is not computed, and its status is
"skipped: .." with the cure. PSNR, SSIM, the Frechet distance, DISTS, Seam, Flat/busy and Detail are computed by our own
code, LPIPS by the package `lpips`, and the other published metrics by pyiqa (pyiqa_metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import numpy as np

from teasr.diffusion.perceptual import find_weights, weight_folder
from teasr.evaluation.registry import GRID_PX, METRICS, PROTOCOLS, File, Metric
from teasr.imaging.exact_metrics import (
    detail_ratio,
    energy_ratio,
    frechet_distance,
    patch_distance,
    psnr,
    seam_ratio,
    ssim,
)
from teasr.util.files import sha256_of
from teasr.util.optional import has, how_to_install


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
        self.folder = weight_folder(weights)
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
            code = metadata.version(metric.package) if metric.package and has(metric.package) else None
            found[name] = {
                "status": self.status[name], "label": metric.label, "better": metric.better,
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
        if metric.package and not has(metric.package):
            return f"skipped: run {how_to_install(metric.package)}"
        for file in metric.files:
            path = self._find(file)
            if path is None:
                return f"skipped: {self._cure(file)}"
            digest = _sha256(path)
            wanted = next(version.sha256 for version in file.versions if version.name == path.name)
            if not digest.startswith(wanted):
                hashes = f"sha256 {digest[:8]}.., not {wanted[:8]}.."
                return f"skipped: {path} is not the published file ({hashes}); delete it, then {self._cure(file)}"
            self.hashes.setdefault(metric.name, {})[path.name] = digest
        return "ok"

    def _find(self, file: File) -> Path | None:
        return find_weights(tuple(version.name for version in file.versions), self.folder)

    def _cure(self, file: File) -> str:
        if not file.made:
            return f"put {file.name} in {self.folder}"
        option = "" if self.folder == weight_folder() else f" --folder {self.folder}"
        return f"run `teasr weights{option}`"

    def _model(self, name: str) -> Callable:
        if name not in self._models:
            self._models[name] = self._load(METRICS[name])
        return self._models[name]

    def _load(self, metric: Metric) -> Callable:
        if metric.name in ("psnr", "ssim"):
            function = {"psnr": psnr, "ssim": ssim}[metric.name]
            return partial(function, on_luma=self.protocol.luma, border=self.protocol.border_px)
        if metric.name in OWN:
            return OWN[metric.name]
        if metric.name in ("lpips", "dists"):
            return _perceptual(metric.name, self.folder, self.device)
        from teasr.evaluation import pyiqa_metrics

        return pyiqa_metrics.load(metric.name, {file.name: self._find(file) for file in metric.files}, self.device)


_sha256 = cache(sha256_of)


def _tensor(x: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].float() / 255


def _checkerboard(image: np.ndarray, hq: np.ndarray | None) -> float:
    from teasr.diffusion.losses import checkerboard_energy

    return checkerboard_energy(_tensor(image), GRID_PX).item()


OWN: dict[str, Callable] = {
    "checkerboard": _checkerboard,
    "seam": lambda image, hq: seam_ratio(image),
    "detail": detail_ratio,
    "energy": energy_ratio,
    "patches": patch_distance,
}


def _perceptual(name: str, folder: Path, device: str) -> Callable:
    import torch

    from teasr.diffusion import perceptual

    load = {"lpips": partial(perceptual.load_lpips, "alex"), "dists": perceptual.load_dists}[name]
    model = load(folder=folder).to(device)

    def score(image: np.ndarray, hq: np.ndarray) -> float:
        with torch.no_grad():
            return model(*(_tensor(x).to(device) * 2 - 1 for x in (image, hq))).item()

    return score
