"""The layering of docs/architecture, read from the imports: nouns never import verbs, and heavy libraries stay in their file."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = sorted((ROOT / "teasr").rglob("*.py"))
VERBS = [p for folder in ("data_prep", "launch", "eval") for p in sorted((ROOT / folder).glob("*.py"))]
ALLOWED = {  # third-party module -> the only files of the package that may import it
    "deepspeed": {"engine.py"},
    "mlflow": {"tracking.py"},
    "webdataset": {"data/shards.py"},
    "jpeglib": {"data/lossless.py"},
    "ray": {"data/engines.py"},
    "peft": {"backbones/branch_lora.py"},
    "bitsandbytes": {"backbones/quantised.py"},
    "diffusers": {
        "backbones/dual_branch.py",
        "backbones/offloading.py",
        "backbones/qwen_image.py",
        "backbones/qwen_vae.py",
        "data/latents.py",
        "prompts.py",
    },
    "gradio": {"page.py"},
    "huggingface_hub": {"pretrained.py"},
    "lpips": {"losses.py"},
    "pyiqa": {"metrics.py"},
    "timm": {"metrics.py"},
}
INSIDE = {  # file or folder of the package -> modules of teasr it may import
    "flow.py": set(),
    "seed.py": set(),
    "randomness.py": {"seed"},
    "files.py": set(),
    "config.py": set(),
    "settings.py": set(),
    "progress.py": set(),
    "exact_metrics.py": set(),
    "metrics.py": {"exact_metrics", "files", "losses"},
    "evaluation.py": {"files", "images", "metrics", "progress", "data.pairs", "data.shards"},
    "data/pairs.py": {"images", "data.shards"},
    "images.py": set(),
    "degradation/": {
        "degradation",
        "degradation.kernels",
        "degradation.lean",
        "degradation.peer",
        "degradation.pipeline",
    },
    "data/layout.py": {"files"},
    "data/card.py": set(),
    "data/engines.py": set(),
    "data/plan.py": {"degradation", "seed", "data.layout", "data.lossless", "data.sources"},
    "data/verifying.py": {"degradation", "images", "progress", "seed", "data.engines", "data.layout", "data.making"},
    "data/shards.py": {"images", "data.layout"},
    "data/stream.py": {"degradation", "images", "seed", "methods.base", "data.shards"},
    "data/lossless.py": set(),
    "data/latents.py": {
        "config",
        "files",
        "images",
        "progress",
        "prompts",
        "data.layout",
        "data.making",
        "data.engines",
        "data.shards",
    },
    "prompts.py": {"config", "files"},
    "lora_file.py": {"files"},
    "meter.py": set(),
    "footprint.py": {"backbones.base", "meter", "methods.base", "randomness", "recipe"},
    "data/sources.py": {"images", "files", "data.layout"},
    "distributed.py": set(),
    "losses.py": {"flow"},
    "sampler.py": {"flow", "backbones.base"},
    "methods/": {"flow", "losses", "randomness", "backbones.base", "methods.base"},
    "backbones/": {
        "checkpoint",
        "flow",
        "lora_file",
        "prompts",
        "randomness",
        "seed",
        "backbones.base",
        "backbones.branch_lora",
        "backbones.dual_branch",
        "backbones.modulation",
        "backbones.offloading",
        "backbones.quantised",
        "backbones.qwen_vae",
    },
    "checkpoint.py": {"files"},
    "engine.py": {"backbones.base", "distributed", "settings"},
    "stopping.py": set(),
    "checks.py": set(),
    "machine.py": set(),
    "run_state.py": {
        "backbones.base",
        "checkpoint",
        "config",
        "distributed",
        "ema",
        "engine",
        "recipe",
        "tracking",
    },
    "preview.py": {"backbones.base", "data.shards", "exact_metrics", "images", "sampler", "seed", "settings"},
    "cli.py": {"batch", "config", "page", "sampler", "settings", "tracking", "upscale"},
    "page.py": {"color", "picture", "upscale"},
    "pipeline.py": {"flow", "progress", "upscale"},
    "pretrained.py": {"backbones.base", "checkpoint", "lora_file", "recipe"},
    "auto_steps.py": set(),
    "batch.py": {"images", "picture", "progress"},
    "picture.py": {"files", "images"},
    "color.py": set(),
    "tiling.py": set(),
    "tiled.py": {"backbones.base", "machine", "meter", "tiling"},
    "tracking.py": {"config", "files", "settings"},
}


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_package(path):
    name = path.relative_to(ROOT / "teasr").as_posix()
    found = imports(path)
    assert not found & {"data_prep", "launch", "eval", "tests"}
    for library, files in ALLOWED.items():
        if any(i.split(".")[0] == library for i in found):
            assert name in files, f"{name} imports {library}"
    modules = {p.relative_to(ROOT / "teasr").with_suffix("").as_posix().replace("/", ".") for p in PACKAGE}
    own = {i.removeprefix("teasr.") for i in found if i.startswith("teasr.")} & modules
    for place, allowed in INSIDE.items():
        if name == place or (place.endswith("/") and name.startswith(place)):
            assert own <= allowed, f"{name} imports {sorted(own - allowed)}"


def test_preparing_data_needs_no_torch():
    """Workers are many: a second and 200 MB each."""
    code = "import sys, teasr.data.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", VERBS, ids=lambda p: str(p.relative_to(ROOT)))
def test_verbs_do_not_import_each_other(path):
    assert not {i.split(".")[0] for i in imports(path)} & {"data_prep", "launch", "eval", *(p.stem for p in VERBS)}


def test_every_module_says_what_it_is():
    for path in [*PACKAGE, *VERBS]:
        tree = ast.parse(path.read_text())
        if path.name != "__init__.py" or path.parent.name == "teasr":
            assert ast.get_docstring(tree), path
        inherits = path.parent.name in ("methods", "backbones")  # their contract has the docstrings
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
                for inner in node.body if isinstance(node, ast.ClassDef) and not inherits else []:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        assert ast.get_docstring(inner), f"{path}: {node.name}.{inner.name}"
