"""Config of a run, read from YAML: backbone, method, data and training options, and how to build them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml

from teasr.backbones.base import Backbone
from teasr.backbones.roles import STUDENT, Role, check_roles
from teasr.config import strict_yaml as cfg
from teasr.config.limits import SEED
from teasr.config.reading import parse_yaml
from teasr.config.settings import PreviewConfig, TrackingConfig, TrainConfig
from teasr.data.config import DataConfig
from teasr.data.layout import DEFAULT_SCALE, SCALES
from teasr.methods.base import Method
from teasr.registry import BACKBONES, METHODS, check_fit


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; `run_dir` is its folder.

    prior_name, prior: a second base, for methods whose roles ask for one (section `prior:`); None in most runs.
    """

    run_dir: str
    seed: int
    scale: int  # HQ is this many times as large as LQ; 1 is restoration without upscaling
    backbone_name: str
    backbone: Any
    method_name: str
    method: Any
    data: DataConfig
    train: TrainConfig
    preview: PreviewConfig
    tracking: TrackingConfig
    prior_name: str | None = None
    prior: Any = None

    def to_dict(self) -> dict:
        """Return the content of the YAML file, with all defaults filled in."""
        prior = {} if self.prior is None else {"prior": {"name": self.prior_name} | cfg.to_dict(self.prior)}
        return {
            "run_dir": self.run_dir,
            "seed": self.seed,
            "scale": self.scale,
            "backbone": {"name": self.backbone_name} | cfg.to_dict(self.backbone),
            **prior,
            "method": {"name": self.method_name} | cfg.to_dict(self.method),
            "data": cfg.to_dict(self.data),
            "train": cfg.to_dict(self.train),
            "preview": cfg.to_dict(self.preview),
            "tracking": cfg.to_dict(self.tracking),
        }

    def to_yaml(self) -> str:
        """Return a YAML file that reproduces this config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    def with_random_weights(self) -> RunConfig:
        """Return the config of the same computation with random weights.

        Dry runs and benchmarks use it when no weight files are available.
        """
        config = replace(
            self,
            backbone=BACKBONES[self.backbone_name]()[1].with_random_weights(self.backbone),
            method=METHODS[self.method_name]()[1].with_random_weights(self.method),
        )
        if self.prior is None:
            return config
        return replace(config, prior=BACKBONES[self.prior_name]()[1].with_random_weights(self.prior))

    def build_backbone(self, roles: Sequence[Role] = (STUDENT,)) -> Backbone:
        """Build the backbone with its initial weights, for `roles` that share one base.

        Raises ValueError when its files are missing or the roles do not fit.
        """
        if roles[0].base == "main":
            return BACKBONES[self.backbone_name]()[1](self.backbone, seed=self.seed, roles=roles)
        if self.prior is None:
            raise ValueError(
                f"config section prior is missing: method {self.method_name} needs a second base for the role "
                f"{roles[0].name}; add a section prior with a name and settings, as in the section backbone"
            )
        return BACKBONES[self.prior_name]()[1](self.prior, seed=self.seed, roles=roles)

    def build_method(self) -> Method:
        """Build the method, without the networks that its `load` builds.

        Raises ValueError when its roles cannot be combined, or when the config has a prior that no role uses.
        """
        method = METHODS[self.method_name]()[1](self.method)
        check_roles(method.roles())
        if self.prior is not None and all(role.base != "prior" for role in method.roles()):
            raise ValueError(
                f"config section prior is unused: no role of method {self.method_name} is placed on it; "
                "remove the section"
            )
        return method


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply `section.key=value` overrides.

    Raises ValueError naming the file, the key, what was given and what is allowed.
    """
    data = cfg.override(cfg.read_yaml(path), overrides)
    with cfg.named(path, overrides):
        return parse(data)


def parse_text(text: str, source: str) -> RunConfig:
    """Build a config from YAML text, such as `to_yaml` returns. Raises ValueError that begins with `source`."""
    data = parse_yaml(text, source)
    with cfg.named(source):
        return parse(data)


def parse(data: dict) -> RunConfig:
    """Build a config from nested mappings. Raises ValueError naming the key, what was given and what is allowed."""
    if not isinstance(data, dict):
        raise ValueError(f"a config has `key: value` lines, but this is {data!r}")
    sections = ("run_dir", "seed", "scale", "backbone", "prior", "method", "data", "train", "preview", "tracking")
    for key in data:
        if key not in sections:
            raise ValueError(cfg.unknown_key(str(key), str(key), list(sections)))
    for key in ("run_dir", "backbone", "method", "data", "train"):
        if key not in data:
            raise ValueError(f"config key {key} is missing: add it; every run needs it")
    backbone_name, backbone = _component(BACKBONES, data["backbone"], "backbone")
    method_name, method = _component(METHODS, data["method"], "method")
    check_fit(backbone_name, method_name)
    prior_name, prior = (None, None) if data.get("prior") is None else _component(BACKBONES, data["prior"], "prior")
    return RunConfig(
        run_dir=_run_dir(data["run_dir"]),
        seed=cfg.convert(Annotated[int, SEED], data.get("seed", 0), "seed"),
        scale=_scale(data.get("scale", DEFAULT_SCALE)),
        backbone_name=backbone_name,
        backbone=backbone,
        method_name=method_name,
        method=method,
        data=cfg.build(DataConfig, data["data"], "data"),
        train=cfg.build(TrainConfig, data["train"], "train"),
        preview=cfg.build(PreviewConfig, _or_empty(data.get("preview")), "preview"),
        tracking=cfg.build(TrackingConfig, _or_empty(data.get("tracking")), "tracking"),
        prior_name=prior_name,
        prior=prior,
    )


def _or_empty(section: Any) -> Any:
    return {} if section is None else section


def _run_dir(value: Any) -> str:
    folder = cfg.convert(str, value, "run_dir")
    if not folder.strip() or "\0" in folder:
        raise ValueError(f"config key run_dir = {folder!r}: must be the path of a folder, such as runs/mine")
    return folder


def _scale(value: Any) -> int:
    scale = cfg.convert(int, value, "scale")
    if scale not in SCALES:
        raise ValueError(f"config key scale = {scale}: must be one of {', '.join(map(str, SCALES))}")
    return scale


def _component(registry: dict, data: Any, where: str) -> tuple[str, Any]:
    if not isinstance(data, dict) or "name" not in data:
        raise ValueError(f"config key {where}.name is missing: set it to one of {', '.join(registry)}")
    name = data["name"]
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"config key {where}.name = {name!r}: allowed are {', '.join(registry)}")
    return name, cfg.build(registry[name]()[0], {k: v for k, v in data.items() if k != "name"}, where)
