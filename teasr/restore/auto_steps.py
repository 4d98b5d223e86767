"""Choose the number of sampling steps for a picture, by predicted gain or by trying.

Where the backbone predicts how much of the detail is unknown (`Backbone.uncertainty`), this decides: several steps add
what suits a clean picture, and noise to one of which little is left (docs/log.md, "Steps by predicted gain").

Other backbones get the smallest number of steps that doubling would hardly change. All step counts start from the same
noise. If the model is self-consistent (L_cons, TEASR eq. 4), they all end at the same picture; otherwise their results
differ. The most detailed part of the picture is restored in 1, 2, 4 and 8 steps until doubling the number of steps
changes the result by no more than a tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cv2
import numpy as np

from teasr.util.scratch import MEMORY, Scratch

MOST = 8
MOST_UNCERTAIN = {4: 2.25, 2: 5.0}  # step count: the uncertainty from which on fewer steps have a lower LPIPS
TOLERANCE = 4.0  # root mean square, in grey levels of 255: 36 dB between the two results
LOOKED_AT_PX = 512  # longer side of the downscaled picture in which detail is measured
BAND_BYTES = 2**28  # larger frames are downscaled in bands of rows


def by_uncertainty(uncertainty: float) -> int:
    """Return the step count for a picture: 4, 2 or 1, fewer the more of its detail is unknown."""
    return next((steps for steps, most in MOST_UNCERTAIN.items() if uncertainty < most), 1)


def choose(restore: Callable[[int], np.ndarray], most: int = MOST, tolerance: float = TOLERANCE) -> tuple[int, float]:
    """Return the step count (1, 2, 4, .., `most`) and the change that doubling it would make, in grey levels of 255.

    If the step count is `most`, the returned change is the one from half as many steps. `restore(steps)` returns the
    restored part, [H, W, 3] uint8 or uint16. In total at most 2 * most - 1 steps are computed.
    """
    steps, before = 1, restore(1).astype(np.float32)
    change = 0.0
    while steps < most:
        after = restore(2 * steps)
        change = float(np.sqrt(np.mean((after - before) ** 2)) * 255 / np.iinfo(after.dtype).max)
        if change <= tolerance:
            break
        steps, before = 2 * steps, after.astype(np.float32)
    return steps, change


def busiest(frame: np.ndarray, side: int, unit: int, scratch: Scratch = MEMORY) -> np.ndarray:
    """Return the square of `side` px with most detail, cropped from the frame [H, W, 3].

    It is smaller than `side` where the frame is. Its position and size are multiples of `unit`; `side` and the sides of
    the frame must be multiples of `unit` too.
    """
    height, width = frame.shape[:2]
    rows, columns = min(side, height), min(side, width)
    factor = min(1.0, LOOKED_AT_PX / max(height, width))
    small = _downscaled(frame, factor, scratch).astype(np.float32).mean(2)
    detail = np.abs(cv2.Laplacian(small, cv2.CV_32F))
    window = (max(1, round(columns * factor)), max(1, round(rows * factor)))
    density = cv2.boxFilter(detail, -1, window, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    density = density[: len(small) - window[1] + 1, : small.shape[1] - window[0] + 1]
    y, x = np.unravel_index(density.argmax(), density.shape)
    top = min(int(y / factor) // unit * unit, height - rows)
    left = min(int(x / factor) // unit * unit, width - columns)
    return np.ascontiguousarray(frame[top : top + rows, left : left + columns])


def _downscaled(frame: np.ndarray, factor: float, scratch: Scratch) -> np.ndarray:
    bands = []
    rows = max(1, round(BAND_BYTES // frame[0].nbytes * factor))  # of the result, in each band but the last
    edges = [round(top / factor) for top in range(0, max(1, round(len(frame) * factor) - rows // 2), rows)]
    for top, bottom in itertools.pairwise([*edges, len(frame)]):
        bands.append(cv2.resize(frame[top:bottom], None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))
        scratch.release()
    return np.concatenate(bands)
