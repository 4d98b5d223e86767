"""Package `teasr`. Without extras it restores pictures; the extra `train` adds everything else that users need."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (root / "teasr/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
SHIPPED = ("launch/presets/*.yaml", "data_prep/presets/*.yaml", "eval/*.yaml", "ds_configs/*.json")
EXTRAS = {
    "demo": ["gradio", "scikit-image"],  # the page of `teasr demo`; photographs for `make demo`
    "docs": ["ipykernel", "mkdocs-material", "nbclient"],  # the site of the documentation; running the notebook
    "jpeg": ["jpeglib"],  # cutting JPEG photographs without a second loss
    "metrics": ["pyiqa"],  # NIQE, FID, MUSIQ, MANIQA, CLIPIQA; licence PolyForm Noncommercial
    "nf4": ["bitsandbytes"],  # frozen weights in 4 bits
    "onnx": ["onnx", "onnxruntime", "onnxscript"],  # teasr export --onnx; onnxruntime runs the file
    "ray": ["ray"],  # data preparation on a cluster
    "train": [  # preparing data, training, evaluation, and everything with Qwen-Image
        "accelerate",
        "deepspeed",
        "diffusers",
        "huggingface-hub",
        "lpips",
        "mlflow",
        "peft",
        "scipy",
        "torchvision",
        "transformers",
        "webdataset",
    ],
}
FOR_TESTS = ["playwright", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "setuptools", "wheel"]
# Everything that the tests use. They pass without `metrics`, whose licence each user has to choose.
EXTRAS["dev"] = FOR_TESTS + sorted({p for name, extra in EXTRAS.items() if name != "metrics" for p in extra})


class BuildWithPresets(build_py):
    """Copies the presets and configs of the repository's folders into the package `teasr/shipped` of a wheel.

    An editable installation has no copies: there, teasr reads the files where they are.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self.shipped().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def shipped(self) -> dict[Path, Path]:
        """Return the files and their copies."""
        files = (file for pattern in SHIPPED for file in sorted(root.glob(pattern)))
        return {file: Path(self.build_lib, "teasr/shipped", file.relative_to(root)) for file in files}

    def get_outputs(self, include_bytecode=True):
        copies = [] if self.editable_mode else [str(target) for target in self.shipped().values()]
        return super().get_outputs(include_bytecode) + copies


setup(
    name="teasr",
    version=version,
    description="Any-step real-world super-resolution, distilled in one diffusion transformer",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    entry_points={"console_scripts": ["teasr = teasr.cli:main"]},
    cmdclass={"build_py": BuildWithPresets},
    packages=find_packages(include=["teasr*"]),
    package_data={"teasr": ["py.typed", "assets/*.md", "assets/*/*"]},
    python_requires=">=3.11",
    install_requires=[
        "numpy",
        "opencv-python-headless",
        "pillow",
        "psutil",
        "pyyaml",
        "safetensors",
        "torch",
        "tqdm",
    ],
    extras_require=EXTRAS,
)
