"""TEASR: any-step real-world super-resolution by self-adversarial distillation in one diffusion transformer.

Public names, each imported on first use, so that `import teasr` alone does not load torch:

- `Upscaler`: restore pictures with a trained model.
- `TeasrPipeline`: the same, in the manner of a diffusers pipeline.
- `MissingPackage`: the error when an optional package is not installed; it names the command that installs it.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["MissingPackage", "TeasrPipeline", "Upscaler", "__version__"]

if TYPE_CHECKING:
    from teasr.restore.pipeline import TeasrPipeline
    from teasr.restore.upscaler import Upscaler
    from teasr.util.optional import MissingPackage

_MODULES = {
    "MissingPackage": "teasr.util.optional",
    "TeasrPipeline": "teasr.restore.pipeline",
    "Upscaler": "teasr.restore.upscaler",
}


def __getattr__(name: str):
    """Import a public name on first use."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module teasr has no {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
