"""The import rules of docs/architecture: the package never imports programs; heavy libraries stay in one file each."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = sorted((ROOT / "teasr").rglob("*.py"))
VERBS = [p for folder in ("data_prep", "launch", "eval") for p in sorted((ROOT / folder).glob("*.py"))]
ALLOWED = {  # third-party module -> the only files of the package that may import it
    "deepspeed": {"training/engine.py"},
    "mlflow": {f"tracking/mlflow_{name}.py" for name in ("model", "open", "results", "run", "store")},
    "webdataset": {"data/shards.py"},
    "jpeglib": {"data/prep/lossless.py"},
    "ray": {"data/prep/engines.py"},
    "onnx": {"restore/onnx_export.py"},
    "peft": {"backbones/lora.py"},
    "bitsandbytes": {"backbones/memory/quantised.py"},
    "diffusers": {
        "backbones/text_encoders.py",
        "backbones/generic/codec.py",
        "backbones/generic/network.py",
        "backbones/qwen_image/transformer.py",
        "backbones/qwen_image/vae.py",
        *(f"backbones/sd_unet/{name}.py" for name in ("backbone", "encoder", "network")),
        "backbones/sd3.py",
        "backbones/z_image.py",
    },
    "gradio": {"restore/web/page.py"},
    "huggingface_hub": {"restore/hub.py"},
    "lpips": {"diffusion/perceptual.py"},
    "pyiqa": {"evaluation/pyiqa_metrics.py"},
    "timm": {"evaluation/pyiqa_metrics.py"},
}
FOLDERS = {  # folder or file of the package -> what it may import from teasr: folders (with /) or modules
    "util/": {"util/"},
    "config/": {"config/"},
    "diffusion/": {"diffusion/", "util.optional"},
    "degradation/": {"degradation/", "util.optional"},
    "assets/": {"assets/"},
    "imaging/": {"imaging/", "util/"},
    "data/prep/": {
        "config/", "data.captions", "data.latents", "data.layout", "data.shards", "data/prep/", "degradation/",
        "imaging/", "util/",
    },
    "data/": {"config/", "data/", "degradation/", "imaging/", "util/"},
    "backbones/": {"assets/", "backbones/", "diffusion/", "util/"},
    "methods/": {"backbones.model", "backbones.roles", "data.batch", "diffusion/", "methods/", "util/"},
    "methods/base.py": {"backbones.model", "backbones.roles", "data.batch", "methods.sampler", "util/"},
    "methods/teasr.py": {
        "backbones.model", "backbones.roles", "data.batch", "diffusion/", "methods.base", "methods.pixel_losses",
        "methods.sampler", "methods.teasr_times", "methods.tiles", "util/",
    },
    "registry.py": {"backbones/", "methods/", "util.optional"},
    "run_config.py": {"backbones/", "config/", "data.config", "data.layout", "methods/", "registry"},
    "restore/": {"assets/", "backbones/", "diffusion/", "imaging/", "methods/", "restore/", "run_config", "util/"},
    "evaluation/": {
        "assets/", "config/", "data/", "diffusion/", "evaluation/", "imaging/", "restore/", "run_config", "tracking/",
        "util/",
    },
    "commands/": {
        "assets/", "backbones/", "cli", "commands/", "config/", "data/", "evaluation/", "imaging/", "restore/",
        "run_config", "tracking/", "training/", "util/",
    },
    "tracking/": {"config/", "tracking/", "util/"},
    "training/": {
        "assets/", "backbones.base", "backbones.model", "backbones.roles", "config/", "data/", "imaging/", "methods/",
        "run_config", "tracking/", "training/", "util/",
    },
    "cli.py": {"commands/"},
}  # fmt: skip
FILES_AT_MOST = {"": 6, "commands": 20}  # in the package folder itself, one for each verb; 15 in every other folder


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
    modules |= {m.removesuffix(".__init__") for m in modules}
    own = {i.removeprefix("teasr.") for i in found if i.startswith("teasr.")} & modules
    own -= {m for m in own if any(other.startswith(m + ".") for other in own)}  # a folder that is imported from a file
    for place, allowed in FOLDERS.items():
        if name == place or (place.endswith("/") and name.startswith(place)):
            wrong = [m for m in sorted(own) if not any(_covers(a, m) for a in allowed)]
            assert not wrong, f"{name} imports {wrong}"


def _covers(allowed: str, module: str) -> bool:
    if allowed.endswith("/"):
        return f"{module.replace('.', '/')}/".startswith(allowed)
    return module == allowed


def test_every_folder_is_small_has_a_rule_and_says_what_lives_there():
    folders = {p.parent for p in PACKAGE}
    for folder in sorted(folders):
        name = folder.relative_to(ROOT / "teasr").as_posix().removeprefix(".")
        files = [p for p in folder.iterdir() if p.is_file()]
        assert len(files) <= FILES_AT_MOST.get(name, 15), f"teasr/{name} holds {len(files)} files"
        if name:
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert text and len(re.findall(r"\.(?:\s|$)", text)) >= 2 and "mport" in text, f"{name}/__init__.py"
            assert any(f"{name}/".startswith(place) for place in FOLDERS), f"no rule for {name}"


def test_restoring_imports_neither_deepspeed_nor_mlflow_nor_the_trainer():
    code = (
        "import sys, teasr.restore.upscaler, teasr.restore.batch, teasr.restore.pipeline\n"
        "sys.exit(any(m.startswith(('deepspeed', 'mlflow', 'webdataset', 'teasr.training')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_preparing_data_needs_no_torch():
    """There are many workers, and importing torch would cost each of them a second and 200 MB."""
    code = "import sys, teasr.data.prep.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", VERBS, ids=lambda p: str(p.relative_to(ROOT)))
def test_verbs_do_not_import_each_other(path):
    assert not {i.split(".")[0] for i in imports(path)} & {"data_prep", "launch", "eval", *(p.stem for p in VERBS)}


def test_every_module_says_what_it_is():
    for path in [*PACKAGE, *VERBS]:
        tree = ast.parse(path.read_text())
        if path.name != "__init__.py" or path.parent.name == "teasr":
            assert ast.get_docstring(tree), path
        # the base class's docstrings document these methods
        inherits = path.parent.name in ("methods", "backbones", "generic", "memory", "qwen_image", "sd_unet", "unet")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
                for inner in node.body if isinstance(node, ast.ClassDef) and not inherits else []:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        assert ast.get_docstring(inner), f"{path}: {node.name}.{inner.name}"
