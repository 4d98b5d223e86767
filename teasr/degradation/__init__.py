"""Real-world degradation of photographs: Real-ESRGAN's second-order pipeline (Wang et al. 2021, sec. 3).

Most callers only need `degrade(hq, settings, rng)`. pipeline.py holds the presets, the random parameters and the order
of the operators; kernels.py the blur kernels; fast.py the fast operators; reference.py the operators as implemented in
public code. This folder imports `util.optional` alone from teasr.
"""

from teasr.util.optional import needed_for

with needed_for("degrading images"):
    from teasr.degradation.pipeline import PRESETS, Degradation, Stage, apply, degrade, draw, preset, sharpen

__all__ = ["PRESETS", "Degradation", "Stage", "apply", "degrade", "draw", "preset", "sharpen"]
