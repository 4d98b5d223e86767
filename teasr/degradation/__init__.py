"""Real-world degradation of photographs: Real-ESRGAN's second-order pipeline (Wang et al. 2021, sec. 3).

`degrade(hq, settings, rng)` is all that most callers need. pipeline.py holds presets, draws and the order of the
operators, kernels.py the blur kernels, lean.py the fast operators, peer.py the same operators as public code has them.
Imports nothing else of teasr.
"""

from teasr.degradation.pipeline import PRESETS, Degradation, Stage, apply, degrade, draw, preset, sharpen

__all__ = ["PRESETS", "Degradation", "Stage", "apply", "degrade", "draw", "preset", "sharpen"]
