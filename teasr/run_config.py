"""A run from its YAML: which backbone, method, data and training settings, and how to build them.

The registries of backbones and methods live here; adding one is a file, a line here and a preset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from teasr.backbones.base import Backbone
from teasr.config import strict_yaml as cfg
from teasr.config.settings import PreviewConfig, TrackingConfig, TrainConfig
from teasr.data.config import DataConfig
from teasr.methods.base import Method


def _tiny() -> tuple[type, type[Backbone]]:
    from teasr.backbones.tiny import Tiny, TinyConfig

    return TinyConfig, Tiny


def _qwen_image() -> tuple[type, type[Backbone]]:
    from teasr.backbones.qwen_image.backbone import QwenImage, QwenImageConfig

    return QwenImageConfig, QwenImage


def _teasr() -> tuple[type, type[Method]]:
    from teasr.methods.teasr import Teasr, TeasrConfig

    return TeasrConfig, Teasr


# (config, class), imported when a recipe names them: diffusers alone takes seconds
BACKBONES: dict[str, Callable[[], tuple[type, type[Backbone]]]] = {"tiny": _tiny, "qwen_image": _qwen_image}
METHODS: dict[str, Callable[[], tuple[type, type[Method]]]] = {"teasr": _teasr}


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a run; `run_dir` is where it lives."""

    run_dir: str
    seed: int
    backbone_name: str
    backbone: Any
    method_name: str
    method: Any
    data: DataConfig
    train: TrainConfig
    preview: PreviewConfig
    tracking: TrackingConfig

    def to_dict(self) -> dict:
        """As in the YAML file, every default written out."""
        return {
            "run_dir": self.run_dir,
            "seed": self.seed,
            "backbone": {"name": self.backbone_name} | cfg.to_dict(self.backbone),
            "method": {"name": self.method_name} | cfg.to_dict(self.method),
            "data": cfg.to_dict(self.data),
            "train": cfg.to_dict(self.train),
            "preview": cfg.to_dict(self.preview),
            "tracking": cfg.to_dict(self.tracking),
        }

    def to_yaml(self) -> str:
        """The YAML file that makes this recipe again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    def weightless(self) -> Recipe:
        """The same work on random weights: for dry runs and benchmarks, where no weight file is at hand."""
        return replace(
            self,
            backbone=BACKBONES[self.backbone_name]()[1].weightless(self.backbone),
            method=METHODS[self.method_name]()[1].weightless(self.method),
        )

    def build_backbone(self) -> Backbone:
        """The backbone with its initial weights."""
        return BACKBONES[self.backbone_name]()[1](self.backbone, seed=self.seed)

    def build_method(self) -> Method:
        """The method; raises ValueError when something it needs (LPIPS weights) is missing."""
        return METHODS[self.method_name]()[1](self.method)


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides. Raises ValueError naming the key and the cure."""
    return parse(cfg.override(cfg.read_yaml(path), overrides or []))


def parse(data: dict) -> Recipe:
    """A recipe from nested mappings."""
    sections = ("run_dir", "seed", "backbone", "method", "data", "train", "preview", "tracking")
    for key in data:
        if key not in sections:
            raise ValueError(cfg.unknown_key(str(key), str(key), list(sections)))
    for key in ("run_dir", "backbone", "method", "data", "train"):
        if key not in data:
            raise ValueError(f"config key {key} is missing: every run needs it")
    backbone_name, backbone = _component(BACKBONES, data["backbone"], "backbone")
    method_name, method = _component(METHODS, data["method"], "method")
    return Recipe(
        run_dir=cfg.convert(str, data["run_dir"], "run_dir"),
        seed=cfg.convert(int, data.get("seed", 0), "seed"),
        backbone_name=backbone_name,
        backbone=backbone,
        method_name=method_name,
        method=method,
        data=cfg.build(DataConfig, data["data"], "data"),
        train=cfg.build(TrainConfig, data["train"], "train"),
        preview=cfg.build(PreviewConfig, data.get("preview") or {}, "preview"),
        tracking=cfg.build(TrackingConfig, data.get("tracking") or {}, "tracking"),
    )


def _component(registry: dict, data: Any, where: str) -> tuple[str, Any]:
    if not isinstance(data, dict) or "name" not in data:
        raise ValueError(f"config key {where}.name is missing: one of {', '.join(registry)}")
    name = data["name"]
    if name not in registry:
        raise ValueError(f"config key {where}.name = {name!r}: allowed are {', '.join(registry)}")
    return name, cfg.build(registry[name]()[0], {k: v for k, v in data.items() if k != "name"}, where)
