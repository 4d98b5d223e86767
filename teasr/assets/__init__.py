"""Small pretrained models that ship with the package, each a folder in the format of `Upscaler.save_pretrained`.

README.md holds their model cards. This folder imports nothing else from teasr.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = HERE / "small"  # the model used for restoration when none is specified
MODELS = {  # name of a shipped model -> what it is
    "small": "super-resolution x4 in 1 to 30 steps, 4.1 M parameters; for --model and --from",
    "small-prior": "the prior from which `small` was trained, for backbone.base; it restores nothing",
}
NOTE = (
    "no model was specified: using the small model shipped with teasr (4.1 M parameters, see docs/small.md). "
    "The method is designed for large models: train one with launch/presets/qwen_teasr.yaml and pass its run folder"
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
