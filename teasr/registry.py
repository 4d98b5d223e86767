"""Which backbones and methods there are, and which of them fit together.

A new one takes a file, a line here and a preset.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from teasr.util.optional import needed_for

Loader = Callable[[], tuple[type, type]]  # returns (config class, class)


def _loader(module: str, name: str, what: str) -> Loader:
    """Return a function that imports the class `name` and its config: importing diffusers alone takes seconds."""

    def load() -> tuple[type, type]:
        with needed_for(what):
            found = import_module(f"teasr.{module}")
        return getattr(found, f"{name}Config"), getattr(found, name)

    return load


def _backbone(name: str, module: str, cls: str) -> tuple[str, Loader]:
    return name, _loader(f"backbones.{module}", cls, f"the backbone {name}")


def _method(name: str, cls: str) -> tuple[str, Loader]:
    return name, _loader(f"methods.{name}", cls, f"the method {name}")


BACKBONES: dict[str, Loader] = dict(
    (
        _backbone("tiny", "tiny", "Tiny"),
        _backbone("unet", "unet.backbone", "UNet"),
        _backbone("qwen_image", "qwen_image.backbone", "QwenImage"),
        _backbone("sd3", "sd3", "SD3"),
        _backbone("z_image", "z_image", "ZImage"),
    )
)
METHODS: dict[str, Loader] = dict(
    (
        _method("coarse", "Coarse"),
        _method("d3sr", "D3sr"),
        _method("score_distillation", "ScoreDistillation"),
        _method("tadsr", "Tadsr"),
        _method("teasr", "Teasr"),
    )
)

_ONE_STEP = ("d3sr", "score_distillation", "tadsr")  # they judge with a diffusion model of images
FITTING: dict[str, tuple[str, ...]] = {  # backbone -> the methods that can train it; other pairs are refused
    "tiny": (*_ONE_STEP, "teasr"),
    "unet": ("coarse", "teasr"),
    "qwen_image": (*_ONE_STEP, "teasr"),
    "sd3": (*_ONE_STEP, "teasr"),
    "z_image": (*_ONE_STEP, "teasr"),
}
NEEDS = {  # method -> what a backbone that is missing above lacks
    "coarse": "a trunk that restores coarsely",
    "teasr": "a second branch of tokens for the LQ image",
} | dict.fromkeys(_ONE_STEP, "weights that were trained without an LQ image")


def check_fit(backbone: str, method: str) -> None:
    """Raise ValueError unless the method can train the backbone."""
    if method not in NEEDS or method in FITTING[backbone]:
        return
    others = [name for name, methods in FITTING.items() if method in methods]
    raise ValueError(
        f"config key method.name = {method}: the method needs {NEEDS[method]}, which backbone.name = {backbone} lacks; "
        f"with this backbone use {' or '.join(FITTING[backbone])}, with this method {' or '.join(others)}"
    )
