"""Small pretrained models that ship with the package, each a folder in the format of `Upscaler.save_pretrained`.

README.md holds their model cards. This folder imports nothing else from teasr.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = HERE / "small"  # the model used for restoration when none is specified
NOTE = (
    "no model is named: this is the small one that comes with teasr (1.4 M parameters, docs/small.md). "
    "What the method is made for is a large one: train launch/presets/qwen_teasr.yaml and name its folder"
)


def find(name: str | Path) -> Path | None:
    """Return the folder of a shipped model (`small`, `small-prior`).

    Returns None if no shipped model has this name, or if a path of this name exists: the user's own folder takes
    precedence.
    """
    return HERE / name if str(name) in names() and not Path(name).exists() else None


def names() -> list[str]:
    """Return the sorted names of all shipped models."""
    return sorted(manifest.parent.name for manifest in HERE.glob("*/MANIFEST.json"))
