"""The wheel, unpacked outside the repository, with nothing beside it but what a light installation has.

`python -S` with a folder of links to the packages that the wheel requires stands for an empty virtual environment.
"""

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from teasr import Upscaler
from teasr.config import presets
from teasr.config.settings import TrainConfig
from teasr.util.optional import EXTRA_OF, MissingPackage, check_installed, needed_for

NAMES = {  # package to import -> distribution, where they differ
    "PIL": "pillow", "cv2": "opencv-python-headless", "huggingface_hub": "huggingface-hub", "skimage": "scikit-image",
    "yaml": "pyyaml",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy without anything that an earlier build has left."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "*.py[co]")
    for name in ("teasr", "launch", "data_prep", "eval", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.glob("*.whl")
    shutil.unpack_archive(file, out / "unpacked", "zip")
    return out / "unpacked"


@pytest.fixture(scope="module")
def light(wheel, tmp_path_factory) -> dict[str, str]:
    """The environment of a process that has the wheel and what it requires without extras."""
    view = tmp_path_factory.mktemp("site-packages")
    todo, seen = ["teasr"], {"teasr"}
    while todo:
        name = todo.pop()
        for required in requirements(wheel) if name == "teasr" else metadata.distribution(name).requires or []:
            plain, _, marker = required.partition(";")
            found = re.match(r"[\w.-]+", plain).group().lower()
            if "extra ==" not in marker and found not in seen and installed(found):
                seen.add(found)
                todo.append(found)
    for name in seen - {"teasr"}:
        for part in {file.parts[0] for file in metadata.distribution(name).files if file.parts[0] != ".."}:
            if not (view / part).exists():
                (view / part).symlink_to(metadata.distribution(name).locate_file(part))
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONPATH": f"{wheel}:{view}"}


def requirements(wheel: Path) -> list[str]:
    (file,) = wheel.glob("*.dist-info/METADATA")
    return email.message_from_string(file.read_text()).get_all("Requires-Dist")


def installed(name: str) -> bool:
    try:
        return metadata.distribution(name) is not None
    except metadata.PackageNotFoundError:  # a requirement for another system or Python
        return False


def test_the_wheel_has_every_preset_and_the_marker_of_typed_packages(wheel):
    files = {p.relative_to(wheel).as_posix() for p in wheel.rglob("*") if p.is_file()}
    shipped = [p for folder in presets.KINDS for p in (ROOT / folder).iterdir() if p.suffix in (".yaml", ".json")]
    assert len(shipped) >= 20
    assert not {f"teasr/shipped/{p.relative_to(ROOT).as_posix()}" for p in shipped} - files
    assert "teasr/py.typed" in files
    assert {Path(f).parts[0] for f in files if ".dist-info" not in f} == {"teasr"}


def test_presets_are_found_in_the_wheel(wheel, tmp_path, monkeypatch):
    """A preset names ds_configs/zero3.json, which no folder but a checkout has."""
    from teasr.training.engine import engine_settings

    monkeypatch.setattr(presets, "PACKAGE", wheel / "teasr")
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_teasr", "tiny_teasr.yaml", "launch/presets/tiny_teasr.yaml"):
        assert presets.find(name, presets.RUNS) == wheel / "teasr/shipped/launch/presets/tiny_teasr.yaml"
    config = TrainConfig(updates=1, batch=1, micro_batch=1, learning_rate=1e-3, deepspeed="ds_configs/zero3.json")
    assert engine_settings(config, 1)["zero_optimization"]["stage"] == 3
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero3.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert engine_settings(config, 1)["zero_optimization"]["stage"] == 2


def test_a_light_installation_restores(light, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(x).save(tmp_path / "x.png")
    command = [sys.executable, "-S", "-m", "teasr.cli", "upscale", "x.png", "-o", "y.png", "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=light, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "y.png")), Upscaler.from_pretrained("small")(x, 2))


MISSING = [  # arguments -> the package that a light installation lacks
    (["train", "--config", "tiny_teasr", "data.shards=none"], "webdataset"),
    (["train", "--config", "tiny_teasr", "--dry-run"], "deepspeed"),
    (["train", "--config", "qwen_teasr", "--print"], "accelerate"),
    (["prepare", "photos=.", "out=set"], "scipy"),
    (["verify", "set"], "scipy"),
    (["benchmark", "small", "--data", "set"], "webdataset"),
    (["report", "--mlflow", "sqlite:///x.db", "--experiment", "x"], "mlflow"),
    (["sync-mlflow", "run"], "mlflow"),
    (["cache-prompt", "model=m", "out=p.safetensors"], "diffusers"),
    (["cache-captions", "shards=set", "model=m"], "webdataset"),
    (["cache-latents", "shards=set", "vae=v"], "accelerate"),
    (["upscale", "x.png", "-o", "y.png", "--model", "owner/name"], "huggingface_hub"),
    (["demo"], "gradio"),
    (["export", "small", "--onnx", "x.onnx"], "onnx"),
    (["export", "small", "--push-to-hub", "owner/name"], "huggingface_hub"),
]
LOOP = """
import contextlib, io, json, sys
from teasr import cli
for arguments in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(arguments)
    print(json.dumps([code, text.getvalue()]))
"""


def test_a_missing_extra_is_an_error_that_says_what_to_type(light, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "run").mkdir()
    for name in ("metrics.csv", "config.yaml"):
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run/config.yaml").write_text("tracking: {mlflow: true}\n")
    command = [sys.executable, "-S", "-c", LOOP, json.dumps([arguments for arguments, _ in MISSING])]
    done = subprocess.run(command, cwd=tmp_path, env=light, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for (arguments, package), line in zip(MISSING, done.stdout.splitlines(), strict=True):
        code, text = json.loads(line)
        extra = EXTRA_OF[package]
        assert code == 2 and text.startswith("error: "), (arguments, text)
        assert f"needs the package {package}, which is not installed" in text, (arguments, text)
        assert f"pip install 'teasr[{extra}]'" in text and f"pip install -e '.[{extra}]'" in text, (arguments, text)


def test_only_optional_packages_are_explained():
    with pytest.raises(MissingPackage, match=r"this needs the package gradio.*teasr\[demo\]"), needed_for("this"):
        raise ModuleNotFoundError("No module named 'gradio.blocks'", name="gradio.blocks")
    with pytest.raises(ModuleNotFoundError, match="ours") as found, needed_for("this"):
        raise ModuleNotFoundError("ours", name="teasr.ours")
    assert not isinstance(found.value, MissingPackage)


def test_a_package_that_is_hidden_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"backbone.quantise = nf4 needs the package bitsandbytes.*teasr\[nf4\]"):
        check_installed("bitsandbytes", "backbone.quantise = nf4")


def third_party(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"teasr"}


def test_every_import_is_required_or_optional_and_every_optional_one_is_explained(wheel):
    required, extras = set(), {}
    for line in requirements(wheel):
        name, _, marker = line.partition(";")
        if marker:
            extras.setdefault(marker.split('"')[1], set()).add(name.strip())
        else:
            required.add(name.strip())
    for package, extra in EXTRA_OF.items():
        if package not in ("pydantic", "timm"):  # which come with deepspeed and pyiqa
            assert NAMES.get(package, package) in extras[extra], package
    for path in sorted((ROOT / "teasr").rglob("*.py")):
        found = third_party(path)
        unknown = {p for p in found if NAMES.get(p, p) not in required} - set(EXTRA_OF)
        assert not unknown, f"{path} imports {unknown}, which setup.py does not require"
        helped = any("teasr.util.optional" in p.read_text() for p in (path, path.parent / "__init__.py"))
        helped |= f'"{path.stem}", "{path.stem}"' in (ROOT / "teasr/registry.py").read_text()  # imported in needed_for
        assert helped or not found & set(EXTRA_OF), f"{path} imports {found & set(EXTRA_OF)} without needed_for"
