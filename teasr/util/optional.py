"""Packages that only some installations have: which extra brings each one, and the error that says what to type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

EXTRA_OF = {  # name to import -> the extra of setup.py that installs it
    "accelerate": "train",
    "bitsandbytes": "nf4",
    "deepspeed": "train",
    "diffusers": "train",
    "gradio": "demo",
    "huggingface_hub": "train",
    "jpeglib": "jpeg",
    "lpips": "train",
    "mlflow": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "peft": "train",
    "pyiqa": "metrics",
    "pydantic": "train",
    "ray": "ray",
    "scipy": "train",
    "skimage": "demo",
    "timm": "metrics",
    "torchvision": "train",
    "transformers": "train",
    "webdataset": "train",
}


class MissingPackage(ValueError, ImportError):
    """An optional package is not installed. The message names the command that installs it."""


def has(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # hidden by a finder, or by None in sys.modules
        return False


def how_to_install(package: str) -> str:
    """Return the command that installs an optional package, for installed copies and for a checkout."""
    extra = EXTRA_OF[package]
    return f"pip install 'teasr[{extra}]' (in a checkout of the repository: pip install -e '.[{extra}]')"


def check_installed(package: str, what: str) -> None:
    """Raise MissingPackage when an optional package cannot be imported; what: what needs it. Imports nothing."""
    if not has(package):
        raise MissingPackage(_message(package, what))


def _message(package: str, what: str) -> str:
    return f"{what} needs the package {package}, which is not installed: run {how_to_install(package)}"


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Around imports of optional packages: raises MissingPackage, which says what to type, when one is missing.

    what: what needs them, as the beginning of a sentence, such as "the web page". Other missing modules are passed on.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingPackage) or package not in EXTRA_OF:
            raise
        raise MissingPackage(_message(package, what)) from None
