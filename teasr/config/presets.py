"""Configs that come with teasr: presets of runs and of data, test sets, published results, DeepSpeed's files.

In a checkout they are where the repository has them. The wheel has copies in `teasr/shipped`, which setup.py makes.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
RUNS, DATA, SETS, ZERO = "launch/presets", "data_prep/presets", "eval", "ds_configs"
KINDS = {  # folder -> what its files are
    RUNS: "configs of trainings, for `teasr train --config NAME`",
    DATA: "configs of shard sets, for `teasr prepare --config NAME`",
    SETS: "test sets, for `teasr benchmark --data`, and published results, for `teasr report`",
    ZERO: "files of DeepSpeed, for `teasr train .. train.deepspeed=ds_configs/NAME.json`",
}


def root() -> Path:
    """Return the folder that holds the folders of KINDS."""
    shipped = PACKAGE / "shipped"
    return shipped if shipped.is_dir() else PACKAGE.parent


def names(folder: str) -> dict[str, Path]:
    """Return the shipped files of a folder of KINDS by their names without suffix, in alphabetical order."""
    files = (p for p in sorted((root() / folder).glob("*")) if p.suffix in (".yaml", ".json"))
    return {path.stem: path for path in files}


def find(given: str | Path, folder: str) -> Path:
    """Return the config that a user means: a file, or the name of one that comes with teasr.

    A file in the current folder comes first. Then follow shipped files by their path in the repository, such as
    `ds_configs/zero1.json`, and by their name in `folder`, such as `tiny_teasr`. Other paths are returned as they are.
    Raises ValueError when `given` has neither folder nor suffix and is no such name.
    """
    path = Path(given)
    if path.is_file():
        return path
    if path.parent.as_posix() in KINDS and (root() / path).is_file():
        return root() / path
    if len(path.parts) != 1 or path.suffix not in ("", ".yaml", ".json"):
        return path
    known = names(folder)
    if path.stem in known and path.suffix in ("", known[path.stem].suffix):
        return known[path.stem]
    if path.suffix or path.exists():
        return path
    near = difflib.get_close_matches(path.name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"config {given} is neither a file nor a preset: {hint}`teasr presets` lists those that come with teasr"
    )


def summary(path: Path) -> str:
    """Return the first sentence of the comment at the head of a file, or the `stage` of a file of DeepSpeed."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return _sharding(text)
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=[a-z\d)])[.] ", " ".join(lines))[0].rstrip(".")


def _sharding(text: str) -> str:
    zero = json.loads(text)["zero_optimization"]
    words = [f"ZeRO stage {zero['stage']}"]
    for key, what in (("offload_optimizer", "optimiser states"), ("offload_param", "weights")):
        if key in zero:
            words.append(f"{what} {'on NVMe' if zero[key]['device'] == 'nvme' else 'in host memory'}")
    return ", ".join(words)
