"""Small trained models that come with the package, each a folder as `Upscaler.save_pretrained` writes it.

README.md has their cards. Imports nothing else of teasr.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = HERE / "small"  # the model that restores when none is named
NOTE = (
    "no model is named: this is the small one that comes with teasr (1.4 M parameters, docs/small.md). What the method is made for is a "
    "large one: train launch/presets/qwen_teasr.yaml and name its folder"
)


def find(name: str | Path) -> Path | None:
    """The folder of a shipped model by its name (`small`, `small-prior`). None where there is none, or where the user has a folder of that name."""
    return HERE / name if str(name) in names() and not Path(name).exists() else None


def names() -> list[str]:
    """Of all shipped models."""
    return sorted(manifest.parent.name for manifest in HERE.glob("*/MANIFEST.json"))
