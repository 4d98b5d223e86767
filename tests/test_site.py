"""docs/site: the reference has every setting and every command, and the site is built without a warning."""

import dataclasses
import subprocess
import sys

import pytest
from conftest import ROOT

from teasr import cli
from teasr.config.settings import TrainConfig
from teasr.data.config import DataConfig
from teasr.methods.teasr import TeasrConfig

sys.path.insert(0, str(ROOT / "docs/site"))
import reference


def rows(page: str) -> dict[str, list[str]]:
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_setting_has_its_default_its_limits_and_its_meaning():
    for section, kind in (("train", TrainConfig), ("data", DataConfig), ("method", TeasrConfig)):
        page = rows(reference.table(section, section, kind))
        assert list(page) == [f"{section}.{field.name}" for field in dataclasses.fields(kind)]
    train = rows(reference.table("train", "train", TrainConfig))
    assert train["train.updates"][:2] == ["required", "whole number >= 1"]
    assert (
        train["train.dtype"][:2] == ["`fp32`", "`fp32`, `bf16`"] and "losses and optimiser" in train["train.dtype"][2]
    )
    assert train["train.max_hours"][2].startswith("time budget: once it is used up")  # the comment above the field
    assert "or `null`" in train["train.max_hours"][1] and train["train.max_hours"][0] == "`null`"
    assert (train["train.weight_decay"][0], train["train.clip_norm"][0]) == ("`0.0`", "`1.0`")  # neither true nor false
    assert all(row[2] for row in train.values())


def test_every_command_is_there():
    page = reference.commands()
    for verb in cli.VERBS:
        assert f"\n## teasr {verb}\n" in page and f"usage: teasr {verb} " in page


def test_links_are_rewritten_for_the_site():
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    import hooks

    text = "[a](docs/small.md) [b](CONTRIBUTING.md#x) [c](LICENSE) ![d](docs/demo.png) [e](https://example.org/x.md)"
    expected = "[a](small.md) [b](contributing.md#x) c ![d](demo.png) [e](https://example.org/x.md)"
    assert hooks.rewritten(text, "README.md") == expected
    assert hooks.rewritten("[a](../eval/RESULTS.md) [b](log.md)", "docs/small.md") == "[a](results.md) [b](log.md)"


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index.html", "settings/index.html", "commands/index.html", "try/index.html", "comfyui/index.html"):
        assert (tmp_path / "site" / page).is_file(), page
    assert "train.learning_rate" in (tmp_path / "site/settings/index.html").read_text()
