"""Package `teasr`: what things are. The folders data_prep, launch and eval hold what you run."""

from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (root / "teasr/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
setup(
    name="teasr",
    version=version,
    description="Any-step real-world super-resolution, distilled in one diffusion transformer",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    entry_points={"console_scripts": ["teasr = teasr.cli:main"]},
    packages=find_packages(include=["teasr*"]),
    package_data={"teasr": ["assets/*.md", "assets/*/*"]},
    python_requires=">=3.11",
    install_requires=[
        "accelerate",
        "deepspeed",
        "diffusers",
        "lpips",
        "mlflow",
        "numpy",
        "opencv-python-headless",
        "peft",
        "pillow",
        "psutil",
        "pyyaml",
        "safetensors",
        "scipy",
        "torch",
        "torchvision",
        "transformers",
        "webdataset",
    ],
    extras_require={
        "demo": ["gradio", "scikit-image"],  # the page of `teasr demo`; photographs for `make demo`
        "dev": [
            "bitsandbytes",
            "gradio",
            "jpeglib",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ray",
            "ruff",
            "scikit-image",
        ],
        "jpeg": ["jpeglib"],  # cutting JPEG photographs without a second loss
        "metrics": ["pyiqa"],  # PolyForm Noncommercial licence: reference metrics only, nothing here imports it
        "nf4": ["bitsandbytes"],  # frozen weights in 4 bits
        "ray": ["ray"],  # data preparation on a cluster
    },
)
