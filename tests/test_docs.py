"""Everything that the documentation names exists: files of the tree, code in the equation tables, Makefile commands."""

import contextlib
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_file_is_in_the_tree_and_every_name_of_the_tree_exists():
    tree = (ROOT / "docs/architecture.md").read_text().split("## The tree")[1].split("\n## ")[0]
    for path in sorted((ROOT / "teasr").rglob("*.py")):
        if path.name != "__init__.py":
            assert path.name in tree, f"the tree of docs/architecture.md lacks {path.relative_to(ROOT)}"
    names = {p.name for p in ROOT.rglob("*") if ".venv" not in p.parts and "runs" not in p.parts}
    for name in re.findall(r"[\w]+\.(?:py|md)\b", tree):
        assert name in names, f"the tree names {name}, which does not exist"


PLACES = {
    "flow": "diffusion.flow",
    "losses": "diffusion.losses",
    "Teasr": "methods.teasr.Teasr",
    "scores": "methods.scores",
    "ScoreDistillation": "methods.score_distillation.ScoreDistillation",
    "D3sr": "methods.d3sr.D3sr",
    "sampler": "methods.sampler",
    "blur": "diffusion.blur",
    "sd_times": "diffusion.sd_times",
    "tadsr": "methods.tadsr",
    "Tadsr": "methods.tadsr.Tadsr",
}


@pytest.mark.parametrize("section", ["Equations to code", "Score distillation", "D3SR", "TADSR"])
def test_code_named_beside_equations_exists(section):
    table = (ROOT / "docs/method.md").read_text().split(f"## {section}")[1].split("\n## ")[0].split("\nOne update")[0]
    named = re.findall(r"`([\w./]+)`", table)
    assert len(named) >= 15
    for name in named:
        if name.endswith(".py"):
            assert (ROOT / "teasr" / name).is_file(), name
            continue
        if name in ("flow", "cons", "adv", "dual", "single", "real", "fake", "residual", "smooth", "steps"):
            continue
        first, _, rest = name.removeprefix("teasr.").partition(".")
        module = importlib.import_module("teasr")
        for part in ".".join(filter(None, (PLACES.get(first, first), rest))).split("."):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"{module.__name__}.{part}") if hasattr(module, "__path__") else None
            module = getattr(module, part)


def test_defaults_in_the_choice_table_are_those_of_the_code():
    from teasr.methods.teasr import TeasrConfig

    config = TeasrConfig()
    assert [getattr(config, f"lambda_{n}") for n in ("flow", "cons", "adv", "mse", "lpips")] == [1.0] * 5
    assert (
        config.lambda_rectify == 0.5
        and config.s_range == (0.02, 0.98)
        and config.score_clamp == 1
        and config.w_cap is None
    )
    assert config.ramps["rectify"].start == 1500 and config.ramps["rectify"].length == 2000
    assert config.cons_mix == (0.5, 0.25, 0.25) and config.cons_grid == (2, 4, 8)


def test_settings_and_options_that_a_newcomer_is_told_exist():
    from teasr.commands import completion
    from teasr.config import settings

    backbones = (ROOT / "teasr/backbones" / name for name in ("generic/config.py", "qwen_image/backbone.py"))
    sources = (settings.__file__, *backbones)
    known_keys = set(re.findall(r"^    (\w+):", "\n".join(Path(source).read_text() for source in sources), re.M))
    upscaling, training = (ROOT / "docs/switching.md").read_text().split("## kohya's scripts")
    for page, verb in ((upscaling, "upscale"), (training, "train")):
        ours = " ".join(row.split("|")[2] for row in page.splitlines() if row.startswith("| `"))
        known = {name for option in completion.options_of(verb) for name in option.names}
        assert set(re.findall(r"(?<![\w-])--?[a-z]\S*?(?=[ `])", ours)) - known <= {"--num_gpus", "--module", "--out"}
        assert set(re.findall(r"`(?:train|preview|tracking|backbone)\.(\w+)", ours)) <= known_keys
    assert len(re.findall(r"`train\.", training)) > 5


def test_no_document_has_a_gap_or_an_address_of_a_package_index():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "constraints.txt", ROOT / "Makefile"]:
        text = path.read_text()
        assert not re.search(r"DEMO_[A-Z]+|TODO|FIXME", text), path
        assert not re.search(r"https?://[^ )]*(pypi|index|mirror)", text), path


def test_no_line_of_a_markdown_page_is_longer_than_120_characters():
    folders = ("bench", "data_prep", "docs", "ds_configs", "eval", "integrations", "launch", "teasr", "tests")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    pages = [page for page in pages if "fixtures" not in page.parts]  # files of earlier versions, kept as they were
    assert len(pages) >= 15
    for page in pages:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            is_link = re.fullmatch(r"\s*(?:[-*] |\d+\. )?(?:!?\[[^]]*\]\([^)]*\)|<?https?://\S+>?)[.,;]?", line)
            assert len(line) <= 120 or is_link, f"{page.relative_to(ROOT)}:{number} has {len(line)} characters"


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_git_ignores_what_the_commands_of_the_readme_write(tmp_path):
    shutil.copyfile(ROOT / ".gitignore", tmp_path / ".gitignore")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    written = re.findall(r"(?:\bout=|--out |-o |run_dir=|\.save\(\")([\w./]+)", README)
    assert {"photo_x4.png", "restored/", "restored.png", "runs/mine", "data/train", "exported/teasr"} <= set(written)
    for path in written:
        assert subprocess.run([*git, "check-ignore", "-q", path]).returncode == 0, path
    for path in ("teasr/data/stream.py", "teasr/restore/batch.py", "data_prep/make_shards.py"):
        assert subprocess.run([*git, "check-ignore", "-q", path]).returncode == 1, path


def test_constraints_pin_every_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100 and all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in lines)
