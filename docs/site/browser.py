"""Assemble the page that restores in the browser: docs/try, the model as ONNX, and the scripts of ONNX Runtime Web.

python docs/site/browser.py OUT    OUT/index.html then works on any static web server; `make docs` calls this
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "build/npm/node_modules/onnxruntime-web"
INSTALL = "npm install --prefix build/npm --ignore-scripts --no-audit --no-fund --no-package-lock"
SCRIPTS = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
LICENCE = "ONNX Runtime Web {version}, from the npm package onnxruntime-web. Copyright Microsoft Corporation, MIT.\n"


def assemble(out: Path, model: str | Path = "small", runtime: Path = RUNTIME) -> None:
    """Write the page to the folder `out`. Raises ValueError if the npm package is missing."""
    if not (runtime / "dist" / SCRIPTS[0]).is_file():
        raise ValueError(f"{runtime} is missing: run `make docs`, or mkdir -p build/npm && cp docs/try/package.json "
                         f"build/npm/ && {INSTALL}")  # fmt: skip
    shutil.copytree(ROOT / "docs/try", out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("package.json"))
    (out / "ort").mkdir(exist_ok=True)
    for name in SCRIPTS:
        shutil.copyfile(runtime / "dist" / name, out / "ort" / name)
    version = json.loads((runtime / "package.json").read_text())["version"]
    (out / "ort/LICENCE.txt").write_text(LICENCE.format(version=version))
    write_model(out, model)


def write_model(out: Path, model: str | Path) -> None:
    """Write model.onnx with weights in fp16, and model.json with what the page needs to know about it."""
    from teasr import Upscaler
    from teasr.restore import onnx_export

    upscaler = Upscaler.from_pretrained(model, device="cpu")
    onnx_export.export(upscaler, out / "model.onnx", "fp16")
    facts = {name: getattr(upscaler.backbone, name) for name in onnx_export.FACTS} | {"scale": upscaler.scale}
    (out / "model.json").write_text(json.dumps(facts))
    page = (out / "index.html").read_text()
    size = f"{(out / 'model.onnx').stat().st_size / 1e6:.0f} MB"
    (out / "index.html").write_text(page.replace("about 10 MB", size))


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
