"""A trained model as MLflow loads it: `mlflow.pyfunc.load_model` calls `_load_pyfunc` of this module.

It needs MLflow neither to be imported nor to be used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from teasr.restore.upscaler import Upscaler


class Restorer:
    """Restores batches of pictures; `upscaler` offers everything else."""

    def __init__(self, upscaler: Upscaler):
        self.upscaler = upscaler

    def predict(
        self, pictures: np.ndarray | Sequence[str | Path], params: Mapping[str, float] | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Restore pictures: uint8 [N, H, W, 3], of which the result is [N, H', W', 3], or paths, then a list of arrays.

        params: `steps` (default 1), `fidelity` (0 to 1, default 0), `strength` (0 to 1, default: the model's own) and
        `seed` (default 0). Raises ValueError for another shape or dtype, and for values that the model does not take.
        """
        given = dict(params or {})
        steps, fidelity = int(given.get("steps", 1)), float(given.get("fidelity", 0))
        how = {"steps": steps, "seed": int(given.get("seed", 0)), "fidelity": fidelity if steps > 1 else None}
        if given.get("strength") is not None:
            how["strength"] = float(given["strength"])
        if isinstance(pictures, np.ndarray) and pictures.dtype != object and pictures.dtype.kind != "U":
            if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
                raise ValueError(
                    f"expected pictures [N, H, W, 3] in uint8 or a list of paths, but got {pictures.shape} in "
                    f"{pictures.dtype}"
                )
            return np.stack([self.upscaler(picture, **how) for picture in pictures])
        if isinstance(pictures, str | Path):
            raise ValueError(f"expected a list of paths, but got {pictures}: put it into a list")
        return [np.asarray(self.upscaler(Path(path), **how).convert("RGB")) for path in pictures]

    def get_raw_model(self) -> Restorer:
        """Return this object: MLflow's own `predict` takes only what the signature names, and paths are not in it."""
        return self


def _load_pyfunc(path: str) -> Restorer:
    """Load the model in a folder that `teasr export` wrote."""
    return Restorer(Upscaler.from_pretrained(path))
